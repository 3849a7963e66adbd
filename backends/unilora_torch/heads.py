"""Modules and parameters that train in full beside the adapter, such as a new classifier: which can, and their saved
values.
"""

import os
import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from unilora_core import MismatchError, TargetError, ValuesError
from unilora_torch.checks import is_plain
from unilora_torch.targets import nearest

__all__ = [
    "check_apart",
    "check_heads",
    "check_modules",
    "head_states",
    "inside",
    "listed",
    "parameters_of",
    "part_of",
    "state_of",
    "submodule",
    "whole_names",
]


def part_of(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Return the module or the parameter of a name.

    Raises:
        AttributeError: neither exists.
    """
    owner, _, last = name.rpartition(".")
    parameter = model.get_submodule(owner)._parameters.get(last)
    return model.get_submodule(name) if parameter is None else parameter


def state_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the state of a module, or a parameter, under its names in the model's `state_dict`."""
    part = part_of(model, name)
    return part.state_dict(prefix=f"{name}.") if isinstance(part, nn.Module) else {name: part.detach()}


def whole_names(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `head_states` found, under the names in the model's `state_dict`."""
    return {f"{name}.{key}".removesuffix("."): value for name, state in states.items() for key, value in state.items()}


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a module, or a parameter, under their names in the model."""
    part = part_of(model, name)
    return dict(part.named_parameters(name)) if isinstance(part, nn.Module) else {name: part}


def inside(name: str, modules: Iterable[str]) -> bool:
    """Say whether a module or a parameter lies in one of these, or is one."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


def listed(names: Iterable[str]) -> str:
    """Return names as text for a message: those that differ in a number only as one, and no more than eight."""
    alike = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    return ", ".join(alike[:8]) + (f" and {len(alike) - 8} more" if len(alike) > 8 else "")


def check_modules(model: nn.Module, names: Iterable[str], what: str) -> None:
    """Refuse a parameter that trains by itself, where only modules are possible.

    Raises:
        TargetError: there is such a parameter; the error names ``what``.
    """
    for name in names:
        if isinstance(part_of(model, name), nn.Parameter):
            raise TargetError(
                f"{what}: {name} is a parameter that was trained in full by itself, which has no place there; merge "
                "the adapter into its base model, or attach with the module around it in modules_to_save."
            )


def check_heads(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a module or a parameter that cannot train beside a frozen base.

    Raises:
        TargetError: a weight is tied to one outside, has no values, or is quantised.
    """
    names = tuple(names)
    owners: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(parameter_name)
    for name in names:
        for parameter_name, parameter in parameters_of(model, name).items():
            outside = [other for other in owners[id(parameter)] if not inside(other, names)]
            if outside:
                raise TargetError(
                    f"modules_to_save: {parameter_name} is tied, it is also {', '.join(outside)}; training one would "
                    "change the other. Name both, leave it out, or untie the weights first."
                )
            if parameter.is_meta:
                raise TargetError(
                    f"modules_to_save: {parameter_name} is on the meta device (offloaded, or not loaded) and cannot "
                    "train; keep this module in memory by the device_map."
                )
            if not is_plain(parameter):
                raise TargetError(
                    f"modules_to_save: {parameter_name} is quantised ({type(parameter).__name__}, {parameter.dtype}) "
                    "and cannot train; leave this module out of the quantisation when the model is loaded "
                    f"(bitsandbytes: llm_int8_skip_modules=[{name!r}]; torchao: modules_to_not_convert=[{name!r}])."
                )


def check_apart(heads: Mapping[str, Iterable[str]]) -> None:
    """Refuse adapters that would act together and save one module.

    Args:
        heads: name of the adapter → its modules to save.

    Raises:
        TargetError: two save one module; the error has the remedy.
    """
    owners: dict[str, str] = {}
    for name, modules in heads.items():
        for module in modules:
            if module in owners:
                raise TargetError(
                    f"the adapters {owners[module]!r} and {name!r} both save {module!r}, which the model has once; let "
                    "one of them act at a time: unilora_torch.switch(model, ()) switches off those that are there."
                )
            owners[module] = name


def head_states(
    where: str | os.PathLike, model: nn.Module, names: Iterable[str], tensors: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Tensor]]:
    """Return the saved state of each module, checked against the model's; the state of a parameter has one entry,
    called "".

    Args:
        names: the names of the modules and parameters.
        tensors: the file's tensors by name inside the whole model, NumPy.

    Raises:
        MismatchError: the model has no such module, or other shapes, or real numbers where the file has integers.
        ValuesError: the model's dtype cannot hold a value.
    """
    expected = {name: _state(where, model, name) for name in names}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in expected}
    lengths = {len(name) for name in expected}
    for key, array in tensors.items():
        for name in (key[:length] for length in lengths if f"{key}."[length : length + 1] == "."):
            if name in states:
                states[name][key[len(name) + 1 :]] = torch.from_numpy(array)
    for name, state in states.items():
        _check_state(where, name, state, expected[name])
    return states


def _state(where: str | os.PathLike, model: nn.Module, name: str) -> dict[str, Tensor]:
    try:
        part = part_of(model, name)
    except AttributeError:
        part = submodule(model, name, str(where))
    return part.state_dict() if isinstance(part, nn.Module) else {"": part}


def _check_state(
    where: str | os.PathLike, name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in expected.items()}
    if shapes != wanted:
        raise MismatchError(
            f"{where}: {name}: the file holds {shapes}, the model expects {wanted}; "
            "build the model with the number of classes that the adapter was trained for."
        )
    for key, value in state.items():
        like = expected[key]
        if value.dtype != like.dtype and not (value.is_floating_point() and like.is_floating_point()):
            raise MismatchError(
                f"{where}: {name}.{key}: the file holds {value.dtype}, the model expects {like.dtype}; it was saved "
                "from another module."
            )
        if bad := int((~value.to(like.dtype).isfinite()).sum()):
            raise ValuesError(
                f"{where}: {name}.{key}: {bad} of its {value.numel()} values are NaN or infinite as {like.dtype}; load "
                "the model in float32 or bfloat16."
            )


def submodule(model: nn.Module, name: str, where: str, error: type[Exception] = MismatchError) -> nn.Module:
    """Return a module by name.

    Raises:
        ``error``: there is none; the error lists the nearest names.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise error(f"{where}: the model has no module {name!r}; the nearest are {nearest(model, name)}.") from None
