"""PEFT's UniLora adapters, read and written without PEFT.

The format is ``adapter_config.json`` and ``adapter_model.safetensors`` with the one tensor
``base_model.unilora_theta_d``, as PEFT 0.20 and 0.21 write them. P is dealt over A, then B, of each adapted layer in
the order of ``model.modules()``. PEFT rounds P's scale to the base's dtype; here it stays float32, so on a bf16 base
the outputs agree to that rounding.
"""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import unilora_torch
from unilora_core import (
    AdapterFileError,
    CorruptFileError,
    MismatchError,
    ProjectionSpec,
    SpecError,
    TargetError,
    ValuesError,
)
from unilora_core.files import alone, new_files
from unilora_core.lora import check_rank
from unilora_core.schema import read_json, shown, typed
from unilora_torch import Adapter, Target
from unilora_torch.attach import layout_of
from unilora_torch.heads import head_states
from unilora_transformers.attach import finish, require_model
from unilora_transformers.targets import to_target

__all__ = ["load_peft", "save_peft"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
THETA = "base_model.unilora_theta_d"
PREFIX = "base_model.model."
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_weights"}
WITHOUT_EFFECT |= {"peft_version", "revision", "save_indices", "task_type", "runtime_config"}
GROUPING = "numpy-shuffle"
SECONDS = 1.0
"""The time that the regular expressions of a folder may take over the names of a model: some take for ever."""

LONGEST = 10_000
"""The largest length of such an expression, and the largest product of its counted repeats."""

Matches = Callable[..., Any]


@dataclass(frozen=True)
class _Config:
    """The fields of ``adapter_config.json`` that are read."""

    r: int
    proj_seed: int
    theta_d_length: int
    target_modules: str | tuple[str, ...] | None
    peft_type: str
    modules_to_save: tuple[str, ...] | None = None
    init_theta_d_bound: float | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    bias: str = "none"
    unilora_dropout: float = 0.0


def load_peft(model: PreTrainedModel, folder: str | os.PathLike, *, any_rank: bool = False) -> Adapter:
    """Read a UniLora adapter that PEFT saved, and attach it to its base model.

    Args:
        model: the base model, changed in place.
        folder: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        any_rank: whether to take factors of any rank, not only up to `unilora_core.lora.largest_rank`.

    Raises:
        AdapterFileError: there is no UniLora adapter, a file is damaged, or a setting is not supported; the error names
            it.
        MismatchError: the adapter belongs to another model.
        TargetError: a layer cannot be adapted rightly. In each case the model is unchanged.
    """
    require_model(model)
    folder = Path(folder)
    with alone(folder, shared=True):
        config, tensors = _read_config(folder / CONFIG), _read_tensors(folder / TENSORS)
    targets, heads = _targets(folder, model, config), _heads(model, config)
    if not targets:
        raise MismatchError(f"{folder}: no layer of the model matches target_modules = {shown(config.target_modules)}.")
    for target in () if any_rank else targets:
        check_rank(folder, target.name, config.r, target.in_features, target.out_features)
    theta_d = _take_theta(folder, config, tensors)
    saved = [key for key in tensors if key.startswith(tuple(f"{PREFIX}{name}." for name in heads))] if heads else []
    states = head_states(folder, model, heads, {key.removeprefix(PREFIX): tensors.pop(key) for key in saved})
    indices = {key: tensors.pop(key) for key in list(tensors) if "unilora_indices" in key or "unilora_scales" in key}
    if tensors:
        raise AdapterFileError(f"{folder}: these tensors are not supported: {shown(sorted(tensors))}.")
    adapter = unilora_torch.attach(
        model,
        targets,
        rank=config.r,
        d=config.theta_d_length,
        seed=config.proj_seed,
        grouping=GROUPING,
        start="paper",
        bound=config.init_theta_d_bound,
        modules_to_save=heads,
    )
    try:
        _check_indices(folder, adapter.spec, indices)
    except BaseException:
        adapter.detach()
        raise
    with torch.no_grad():
        adapter.theta_d.copy_(theta_d)
    for name, state in states.items():
        model.get_submodule(name).load_state_dict(state)
    return finish(model, adapter)


def save_peft(adapter: Adapter, folder: str | os.PathLike) -> None:
    """Write a UniLora adapter that PEFT loads.

    PEFT knows one grouping, one start and one order of the factors, so this takes
    ``attach(…, grouping="numpy-shuffle", start="paper")`` over whole layers; `Adapter.export_lora` takes others.

    Raises:
        SpecError: PEFT would build another P; nothing is written.
        ValuesError: θ_d holds NaN or infinity; nothing is written.
    """
    model, config = adapter.model, _config(adapter)
    _check_peft_builds(model, adapter, config)
    if not torch.isfinite(adapter.theta_d).all():
        raise ValuesError("save_peft: theta_d holds NaN or infinity; training diverged. Nothing was written.")
    state = {THETA: adapter.theta_d.detach().cpu().clone()}
    for name, tensor in adapter.heads().items():
        state[f"{PREFIX}{name}"] = tensor.detach().cpu().clone().contiguous()
    with new_files(Path(folder) / TENSORS, Path(folder) / CONFIG) as (weights, settings):
        save_file(state, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- reading --------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> _Config:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder that PEFT's save_pretrained wrote.")
    said = read_json(path)
    if (kind := said.get("peft_type")) != "UNILORA":
        raise AdapterFileError(
            f"{path}: expected peft_type UNILORA, got {shown(kind)}; this reads UniLora adapters only."
        )
    names = {field.name: field for field in fields(_Config)}
    if missing := {name for name, field in names.items() if field.default is MISSING} - said.keys():
        raise CorruptFileError(f"{path}: {sorted(missing)} are missing.")
    if unknown := sorted(key for key in said.keys() - names.keys() - WITHOUT_EFFECT if said[key]):
        raise AdapterFileError(f"{path}: these settings are not supported: {shown(unknown)}.")
    config = typed(_Config, {name: value for name, value in said.items() if name in names}, str(path))
    if config.bias != "none":
        raise AdapterFileError(f"{path}: bias = {shown(config.bias)} is not supported, only 'none'.")
    if not config.target_modules or config.target_modules == "all-linear":
        raise AdapterFileError(f"{path}: target_modules = {config.target_modules!r} names no modules.")
    if config.unilora_dropout:
        warnings.warn(f"{path}: unilora_dropout = {config.unilora_dropout} is ignored in training.", stacklevel=3)
    return config


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; save the adapter as safetensors, PEFT's default.")
    try:
        # PyTorch reads it, since NumPy lacks bfloat16
        tensors = load_file(path)
        return {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            for name, tensor in tensors.items()
        }
    except (SafetensorError, KeyError, TypeError) as error:  # the latter two: a dtype that PyTorch or NumPy lacks
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error}); fetch it again.") from error


def _take_theta(folder: Path, config: _Config, tensors: dict[str, np.ndarray]) -> Tensor:
    if THETA not in tensors:
        raise CorruptFileError(f"{folder}: there is no tensor {THETA!r} in {TENSORS}.")
    theta_d = torch.from_numpy(tensors.pop(THETA))
    finite = theta_d.float().isfinite() if theta_d.is_floating_point() else torch.zeros(0)
    if tuple(theta_d.shape) != (config.theta_d_length,) or not theta_d.is_floating_point() or not finite.all():
        raise ValuesError(
            f"{folder}: expected {config.theta_d_length} finite values of theta_d, got {theta_d.dtype} of shape "
            f"{tuple(theta_d.shape)}, {int((~finite.bool()).sum())} of them NaN or infinite."
        )
    return theta_d.float()


def _check_indices(folder: Path, spec: ProjectionSpec, saved: Mapping[str, np.ndarray]) -> None:
    """Refuse saved indices (save_indices=True) that are not the ones that the seed gives."""
    groups = spec.groups()
    for name, at in spec.layout.slices.items():
        key = f"{PREFIX}{name[:-2]}.unilora_indices_{name[-1]}"
        if key in saved and not np.array_equal(saved[key].ravel(), groups[at]):
            raise AdapterFileError(f"{folder}: {key} is not what proj_seed gives; such a P cannot be rebuilt.")


# ---- PEFT's rules ---------------------------------------------------------------------------------------------------


def _targets(folder: str | os.PathLike, model: nn.Module, config: _Config) -> tuple[Target, ...]:
    """Return the layers that PEFT adapts, in the order in which it deals P to them (`check_target_module_exists`)."""
    chosen = config.target_modules
    names = [name for name, _ in model.named_modules()]
    with _expressions(folder) as matches:
        if config.modules_to_save:
            inside = rf"(?:^|.*\.)(?:{'|'.join(config.modules_to_save)})(?:$|\..*)"
            names = [name for name in names if not matches(inside, name)]
        if isinstance(chosen, str):
            names = [name for name in names if matches(chosen, name, regex.fullmatch)]
        else:
            whole, ends = set(chosen or ()), tuple(f".{end}" for end in chosen or ())
            names = [n for n in names if n in whole or (n.endswith(ends) and _selects_layer(config, n, matches))]
    return tuple(to_target(name, model.get_submodule(name)) for name in names)


def _selects_layer(config: _Config, name: str, matches: Matches) -> bool:
    layers, patterns = config.layers_to_transform, config.layers_pattern or ()
    if layers is None or layers == ():
        return True
    found = (
        matches(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        for pattern in ((patterns,) if isinstance(patterns, str) else patterns) or (r"[^.]*",)
    )
    number = next((int(match[1]) for match in found if match and (match[1] or "").isdigit()), None)
    return number is not None and number in ((layers,) if isinstance(layers, int) else layers)


@contextlib.contextmanager
def _expressions(folder: str | os.PathLike) -> Iterator[Matches]:
    """Yield `regex.match` with a limit of time; a folder's own expressions may not end.

    Raises:
        AdapterFileError: the time is up, or an expression is invalid.
    """
    end = time.monotonic() + SECONDS

    def matches(expression: str, name: str, how: Callable[..., Any] = regex.match) -> Any:
        counts = [int(count[:9]) for count in regex.findall(r"[1-9]\d*(?=[\d,\s]*\})", expression[:LONGEST])]
        if len(expression) > LONGEST or math.prod(counts) > LONGEST:  # the compiled form is as long as its repeats
            raise OverflowError("an expression that is too long")
        return how(expression, name, timeout=max(1e-3, end - time.monotonic()))

    try:
        yield matches
    except (regex.error, TimeoutError, RecursionError, IndexError, OverflowError) as error:
        raise AdapterFileError(
            f"{folder}: its target_modules, modules_to_save or layers_pattern cannot be matched with the names of the "
            f"model ({type(error).__name__}: {error}); give plain names in a list."
        ) from error


def _heads(model: nn.Module, config: _Config) -> tuple[str, ...]:
    """Return the modules that PEFT wraps: every one whose name ends so. Names that the model lacks (PEFT adds some
    itself) are no error.
    """
    ends = config.modules_to_save or ()
    return tuple(name for name, _ in model.named_modules() if name and name.endswith(ends)) if ends else ()


# ---- writing --------------------------------------------------------------------------------------------------------


def _config(adapter: Adapter) -> dict[str, Any]:
    spec = adapter.spec
    return {
        "base_model_name_or_path": str(getattr(adapter.model, "name_or_path", None) or "") or None,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in adapter.targets),
        "inference_mode": True,
        "init_theta_d_bound": spec.bound,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "peft_type": "UNILORA",
        "proj_seed": spec.seed,
        "r": next(iter(spec.layout.shapes.values()))[0],
        "save_indices": False,
        "target_modules": [target.module for target in adapter.targets],
        "task_type": None,
        "theta_d_length": spec.d,
        "unilora_dropout": 0.0,
    }


def _check_peft_builds(model: nn.Module, adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose P is not the one that PEFT would build from ``config``."""
    spec, remedy = adapter.spec, "export_lora writes the adapter as a plain LoRA instead."
    if spec.form.dense:
        remedy = "merge the adapter into the base model instead."
    for field, needed in (("frame", "pair"), ("grouping", GROUPING), ("start", "paper")):
        if getattr(spec, field) != needed:
            raise SpecError(f"save_peft: PEFT knows {field} {needed!r} only, not {getattr(spec, field)!r}; {remedy}")
    built_from = typed(_Config, {name: config[name] for name in _Config.__annotations__}, "save_peft")
    try:
        same = _targets("save_peft", model, built_from) == adapter.targets
    except TargetError:
        same = False
    same = same and set(_heads(model, built_from)) == set(adapter.modules_to_save)
    built = layout_of(adapter.targets, built_from.r) if same else None
    if built != spec.layout:
        raise SpecError(f"save_peft: PEFT would adapt other layers, blocks or ranks, or in another order; {remedy}")
