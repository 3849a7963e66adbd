"""Saving of an adapted model as a plain one of timm, and as ONNX."""

import copy
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from unilora_core import TargetError
from unilora_core.files import new_files, try_files
from unilora_timm.attach import example_of
from unilora_torch.adapter import adapters

__all__ = ["check_onnx", "merged", "save_onnx"]

LARGE = 2**30
"""The bytes above which weights lie beside an ONNX file, which cannot hold 2 GB."""


def merged(model: nn.Module) -> nn.Module:
    """Make a plain copy of an adapted model, with the updates in its weights; the model itself stays as it is.

    The copy has neither hooks nor θ_d, so timm's own functions take it: `timm.models.save_for_hf`, `push_to_hf_hub`.
    Adapters that are switched off are left out.

    Raises:
        TargetError: the model has no adapter, or a weight cannot take the update (see `Adapter.merge`).
        ValuesError: θ_d holds NaN or infinity.
    """
    if not adapters(model):
        raise TargetError(
            f"merged: this {type(model).__name__} has no adapter; give the model itself that was adapted "
            "(timm.utils.unwrap_model takes it out of a compiled or a distributed one)."
        )
    plain = copy.deepcopy(model)
    for adapter in adapters(plain).values():
        adapter.detach(merge=adapter.enabled)
    return plain


def save_onnx(model: nn.Module, path: str | os.PathLike, example: Tensor | None = None) -> None:
    """Write a model as ONNX: ``images`` (batch, channels, height, width) in, ``logits`` out, for any batch size.

    An adapted model is merged first; the model itself stays as it is.

    Args:
        model: a model of timm, adapted or plain.
        path: the file to write; weights of more than a gigabyte are written beside it, in ``path`` with ``.data``. The
            files appear together, and whole or not at all.
        example: images of the height and width that the file is to take; by default of the model's size.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        TargetError, ValuesError: as in `merged`.
        RuntimeError: torch cannot export the model, or not for any batch size. Nothing is written then.
        OSError: a file cannot be written, which is tried first; the error names the path.
    """
    check_onnx()
    try_files(path)
    plain = (merged(model) if adapters(model) else copy.deepcopy(model)).eval()
    for module in plain.modules():
        if hasattr(module, "fused_attn"):  # as timm's exportable=True does: torch cannot export BEiT's
            module.fused_attn = False
    image = example_of(plain) if example is None else example
    pair = image[:1].expand(2, *image.shape[1:])  # a batch of one would be taken for a constant
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(plain, (pair,), **names, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False)
    assert program is not None
    arrays = [value.const_value for value in program.model.graph.initializers.values()]
    large = sum(array.nbytes for array in arrays if array is not None) > LARGE
    place = Path(os.path.realpath(path))
    beside = [place.with_name(f"{place.name}.data")] if large else []
    with new_files(*beside, place) as new:
        program.save(new[-1], external_data=large)


def check_onnx() -> None:
    """Check that the packages which `save_onnx` needs are installed.

    Raises:
        ModuleNotFoundError: one is missing; the error has the remedy.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"writing ONNX needs {name}, which is not installed: pip install 'unilora[onnx]'", name=name
            )
