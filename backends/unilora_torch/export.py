"""Export to a plain LoRA folder in PEFT's format (`unilora_core.lora`): A and B are known exactly, no SVD is needed."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unilora_core import AdapterFileError, TargetError
from unilora_core.engines import Lora, refuse, served_rank
from unilora_core.files import new_files
from unilora_core.lora import Block, lora_config, lora_names, lora_state
from unilora_torch.chains import product
from unilora_torch.export_parameters import parameter_state, parameters_of, rank_of
from unilora_torch.heads import check_modules
from unilora_torch.targets import Target, features, is_conv
from unilora_torch.vector import Vector

__all__ = ["export_lora", "lora_tensors"]


def export_lora(
    vector: Vector,
    folder: str | os.PathLike,
    base_model: str | None = None,
    rank: int | None = None,
    engine: str | None = None,
) -> None:
    """Write an adapter as a PEFT LoRA folder.

    Targets that adapt blocks of one layer (q and v of a fused qkv) become one LoRA of the summed rank, whose B has a
    block for each. Every layer gets the same rank, filled up by zeros, and alpha equals it, so the scaling is 1.
    Parameters (the experts of a mixture) become PEFT's ``target_parameters``, which no engine is known to read.

    Args:
        base_model: the name or path of the base model for ``base_model_name_or_path``; by default the model's own
            ``name_or_path``, where it has one.
        rank: the rank of every layer; by default the largest that one needs, and for vLLM the next that it can be
            started with.
        engine: ``"vllm"``, ``"sglang"``, ``"lorax"`` or ``"llama.cpp"``, to write only what it would serve
            (`unilora_core.engines`).

    Raises:
        AdapterFileError: ``engine`` would not serve the export; the error has every reason.
        SpecError: a layer needs a rank above ``rank``, or the engine is unknown.
        TargetError: PEFT does not adapt a parameter or a convolution in the same way, or the method makes whole
            weights.
        ValuesError: θ_d holds NaN or infinity. In each case nothing is written.
    """
    config, state = lora_tensors(vector, base_model, rank, engine)
    # the config comes last: it makes the folder a LoRA
    with new_files(Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json") as (weights, says):
        save_file(state, weights, metadata={"format": "pt"})
        says.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def lora_tensors(
    vector: Vector, base_model: str | None = None, rank: int | None = None, engine: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `export_lora` writes: the config, and the tensors by name, float32 on the CPU.

    Raises:
        AdapterFileError, SpecError, TargetError, ValuesError: as in `export_lora`.
    """
    parameters = parameters_of(vector.targets)
    _check_exportable(vector, parameters, engine)
    arrays, modules, rank = _arrays(vector, parameters, rank, engine)
    state: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name, tensor in vector.heads().items():
        state[f"base_model.model.{name}"] = tensor.detach().cpu().clone().contiguous()
    config = lora_config(
        modules,
        rank,
        base_model=base_model or str(getattr(vector.model, "name_or_path", None) or "") or None,
        fan_in_fan_out=any(t.transposed and not _looks_up(vector.model, t) for t in vector.targets if not t.parameter),
        modules_to_save=vector.modules_to_save,
    )
    if parameters:
        config["target_parameters"] = list(parameters)
    if engine is not None:
        refuse(Lora(config, {name: tuple(tensor.shape) for name, tensor in state.items()}), engine)
    return config, state


def _check_exportable(vector: Vector, parameters: Iterable[str], engine: str | None) -> None:
    if vector.spec.form.dense:
        raise TargetError(
            f"export_lora: the frame {vector.spec.frame!r} makes whole weights, which no plain LoRA holds; merge the "
            "adapter into the base model instead."
        )
    check_modules(vector.model, vector.modules_to_save, "export_lora")
    vector.structure.check("export_lora")
    vector.check_finite("export_lora")
    if engine is not None and (adapted := list(parameters)):
        raise AdapterFileError(
            f"{engine}: {adapted[0]} is adapted as a parameter, and no engine is known to read PEFT's "
            "target_parameters; merge the adapter into the base model and serve that."
        )


def _arrays(
    vector: Vector, parameters: Mapping[str, list[Target]], rank: int | None, engine: str | None
) -> tuple[dict[str, np.ndarray], list[str], int]:
    """Return all A and B under their names in the file, the adapted layers, and the rank that all have."""
    model = vector.model
    pairs = _pairs(vector)
    blocks: dict[str, list[Block]] = {}
    heights: dict[str, int] = {}
    for target in (target for target in vector.targets if target.parameter is None):
        A, B = pairs[target.name]
        blocks.setdefault(target.module, []).append((A, B, target.first_row))
        heights[target.module] = features(model.get_submodule(target.module), target.transposed)[1]
    widths = [sum(len(A) for A, _, _ in parts) for parts in blocks.values()]
    if engine is not None and rank is None:
        rank = served_rank(engine, max(widths))
    if parameters and rank is None:
        rank = max(widths + [rank_of(parts, pairs) for parts in parameters.values()])
    arrays, rank = lora_state(blocks, heights, rank) if blocks else ({}, rank or 0)
    arrays |= parameter_state(model, parameters, pairs, rank)
    for module in blocks:
        _as_layer(module, model.get_submodule(module), arrays)
    return arrays, list(blocks), rank


def _pairs(vector: Vector) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute A = F_1 and B = F_k·…·F_2 of each target."""
    with torch.no_grad():
        factors = vector()
        chains = {target.name: vector.chain(factors, target) for target in vector.targets}
        return {name: (chain[0].cpu().numpy(), product(chain[1:]).cpu().numpy()) for name, chain in chains.items()}


def _as_layer(module: str, layer: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Give the arrays of an embedding the names, and those of a convolution the shapes, that PEFT has for them."""
    A, B = lora_names(module)
    if isinstance(layer, nn.Embedding):
        for name, letter in ((A, "A"), (B, "B")):
            arrays[f"base_model.model.{module}.lora_embedding_{letter}"] = arrays.pop(name)
    elif is_conv(layer):
        _check_conv(module, layer)
        rank = len(arrays[A])
        arrays[A] = arrays[A].reshape(rank, layer.in_channels, *layer.kernel_size)
        arrays[B] = arrays[B].reshape(-1, rank, *(1 for _ in layer.kernel_size))


def _looks_up(model: nn.Module, target: Target) -> bool:
    return isinstance(model.get_submodule(target.module), nn.Embedding)


def _check_conv(name: str, layer: nn.Module) -> None:
    """Refuse a convolution that PEFT does not adapt in the same way. PEFT 0.21 makes its A from the class, the kernel
    size, the stride and the padding (`peft.tuners.lora.layer`).
    """
    plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not plain or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        raise TargetError(
            f"export_lora: {name}: PEFT's LoRA leaves out the dilation and the padding mode of a convolution, and what "
            f"a {type(layer).__name__} does by itself; merge the adapter instead."
        )
