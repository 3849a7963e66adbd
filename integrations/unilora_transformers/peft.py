"""PEFT's UniLora adapters, read and written without PEFT.

Format: ``adapter_config.json`` and ``adapter_model.safetensors`` with the one tensor ``base_model.unilora_theta_d``,
as PEFT 0.20 and 0.21 write them. P is dealt over A, then B, of each adapted layer in the order of ``model.modules()``.
PEFT rounds P's scale to the base's dtype; here it stays float32, so on a bf16 base the outputs agree to that rounding.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
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
from unilora_torch import Adapter, Target
from unilora_torch.attach import layout_of
from unilora_torch.heads import head_state
from unilora_transformers.attach import finish, require_model
from unilora_transformers.targets import to_target

__all__ = ["load_peft", "save_peft"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
THETA = "base_model.unilora_theta_d"
PREFIX = "base_model.model."
READ = {"r", "proj_seed", "theta_d_length", "target_modules", "modules_to_save", "init_theta_d_bound"}
READ |= {"layers_to_transform", "layers_pattern", "bias", "unilora_dropout", "peft_type"}
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_weights"}
WITHOUT_EFFECT |= {"peft_version", "revision", "save_indices", "task_type", "runtime_config"}
GROUPING = "numpy-shuffle"


def load_peft(model: PreTrainedModel, folder: str | os.PathLike) -> Adapter:
    """Read a UniLora adapter that PEFT saved, and attach it to its base model.

    Args:
        model: the base model, changed in place.
        folder: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterFileError: no UniLora adapter, a damaged file, or a setting that is not supported, by its name.
        MismatchError: the adapter belongs to another model.
        TargetError: a layer that cannot be adapted rightly. In each case the model is unchanged.
    """
    require_model(model)
    folder = Path(folder)
    config, tensors = _read_config(folder / CONFIG), _read_tensors(folder / TENSORS)
    targets, heads = _targets(model, config), _heads(model, config)
    if not targets:
        raise MismatchError(f"{folder}: no layer of the model matches target_modules = {config['target_modules']!r}.")
    theta_d = _take_theta(folder, config, tensors)
    states = {name: _take_head(folder, model, name, tensors) for name in heads}
    indices = {key: tensors.pop(key) for key in list(tensors) if "unilora_indices" in key or "unilora_scales" in key}
    if tensors:
        raise AdapterFileError(f"{folder}: these tensors are not supported: {sorted(tensors)[:8]}.")
    adapter = unilora_torch.attach(
        model,
        targets,
        rank=config["r"],
        d=config["theta_d_length"],
        seed=config["proj_seed"],
        grouping=GROUPING,
        start="paper",
        bound=config.get("init_theta_d_bound"),
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
    ``attach(…, grouping="numpy-shuffle", start="paper")`` over whole layers; `Adapter.export_lora` takes every adapter.

    Raises:
        SpecError: PEFT would build another P; nothing is written.
        ValuesError: θ_d holds NaN or infinity; nothing is written.
    """
    model, config = adapter._root[0], _config(adapter)
    _check_peft_builds(model, adapter, config)
    if not torch.isfinite(adapter.theta_d).all():
        raise ValuesError("save_peft: theta_d holds NaN or infinity; training diverged. Nothing was written.")
    state = {THETA: adapter.theta_d.detach().cpu().clone()}
    for name, tensor in adapter.heads().items():
        state[f"{PREFIX}{name}"] = tensor.detach().cpu().clone().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- reading --------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give the folder that PEFT's save_pretrained wrote.") from None
    except ValueError as error:
        raise CorruptFileError(f"{path}: not JSON ({error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "UNILORA":
        raise AdapterFileError(f"{path}: expected peft_type UNILORA, got {kind!r}; this reads UniLora adapters only.")
    if missing := {"r", "proj_seed", "theta_d_length", "target_modules"} - config.keys():
        raise CorruptFileError(f"{path}: {sorted(missing)} are missing.")
    unknown = sorted(key for key in config.keys() - READ - WITHOUT_EFFECT if config[key])
    if unknown:
        raise AdapterFileError(f"{path}: these settings are not supported: {unknown}.")
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{path}: bias = {config['bias']!r} is not supported, only 'none'.")
    if not config["target_modules"] or config["target_modules"] == "all-linear":
        raise AdapterFileError(f"{path}: target_modules = {config['target_modules']!r} names no modules.")
    if config.get("unilora_dropout"):
        warnings.warn(f"{path}: unilora_dropout = {config['unilora_dropout']} is ignored in training.", stacklevel=3)
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; save the adapter as safetensors, PEFT's default.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error}); fetch it again.") from error


def _take_theta(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    if THETA not in tensors:
        raise CorruptFileError(f"{folder}: there is no tensor {THETA!r} in {TENSORS}.")
    theta_d = tensors.pop(THETA).float()
    if tuple(theta_d.shape) != (config["theta_d_length"],) or not torch.isfinite(theta_d).all():
        raise ValuesError(
            f"{folder}: expected {config['theta_d_length']} finite values of theta_d, got shape "
            f"{tuple(theta_d.shape)}, {int((~theta_d.isfinite()).sum())} of them NaN or infinite."
        )
    return theta_d


def _take_head(folder: Path, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    keys = [key for key in tensors if key.startswith(f"{PREFIX}{name}.")]
    found = {key.removeprefix(PREFIX): tensors.pop(key) for key in keys}
    return head_state(folder, model, name, found)


def _check_indices(folder: Path, spec: ProjectionSpec, saved: Mapping[str, Tensor]) -> None:
    """Indices that were saved (save_indices=True) must be the ones that the seed gives."""
    groups = torch.from_numpy(spec.groups())
    for name, at in spec.layout.slices.items():
        key = f"{PREFIX}{name[:-2]}.unilora_indices_{name[-1]}"
        if key in saved and not torch.equal(saved[key].flatten().to(torch.int32), groups[at]):
            raise AdapterFileError(f"{folder}: {key} is not what proj_seed gives; such a P cannot be rebuilt.")


# ---- PEFT's rules ---------------------------------------------------------------------------------------------------


def _targets(model: PreTrainedModel, config: Mapping[str, Any]) -> tuple[Target, ...]:
    """The layers that PEFT adapts, in the order in which it deals P to them."""
    return tuple(to_target(name, module) for name, module in model.named_modules() if _selects(config, name))


def _selects(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's `check_target_module_exists`."""
    if any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in config.get("modules_to_save") or ()):
        return False
    targets = config["target_modules"]
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{end}") for end in targets) and _selects_layer(config, name)


def _selects_layer(config: Mapping[str, Any], name: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
    matches = (re.match(expression, name) for expression in expressions or [r".*?\.[^.]*\.(\d+)\."])
    match = next(filter(None, matches), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _heads(model: PreTrainedModel, config: Mapping[str, Any]) -> tuple[str, ...]:
    """PEFT wraps every module whose name ends so; names that the model lacks (it adds some itself) are no fault."""
    ends = tuple(config.get("modules_to_save") or ())
    return tuple(name for name, _ in model.named_modules() if name.endswith(ends)) if ends else ()


# ---- writing --------------------------------------------------------------------------------------------------------


def _config(adapter: Adapter) -> dict[str, Any]:
    spec = adapter.spec
    return {
        "base_model_name_or_path": getattr(adapter._root[0], "name_or_path", None),
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


def _check_peft_builds(model: PreTrainedModel, adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose P is not the one that PEFT would build from ``config``."""
    spec, remedy = adapter.spec, "export_lora writes the adapter as a plain LoRA instead."
    for field, needed in (("grouping", GROUPING), ("start", "paper")):
        if getattr(spec, field) != needed:
            raise SpecError(f"save_peft: PEFT knows {field} {needed!r} only, not {getattr(spec, field)!r}; {remedy}")
    try:
        same = _targets(model, config) == adapter.targets
    except TargetError:
        same = False
    same = same and set(_heads(model, config)) == set(adapter.modules_to_save)
    built = layout_of(adapter.targets, config["r"]) if same else None
    if built != spec.layout:
        raise SpecError(f"save_peft: PEFT would adapt other layers, blocks or ranks, or in another order; {remedy}")
