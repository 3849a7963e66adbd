"""Modules that train in full beside the adapter, such as a new classifier: which can, and their saved values."""

import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from unilora_core import MismatchError, TargetError
from unilora_torch.checks import is_plain
from unilora_torch.targets import nearest

__all__ = ["check_apart", "check_heads", "head_state", "submodule"]


def check_heads(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a module that cannot train beside a frozen base.

    Raises:
        TargetError: a weight that is tied to one outside, that has no values, or that is quantised.
    """
    names = tuple(names)
    inside = tuple(f"{name}." for name in names)
    owners: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(parameter_name)
    for name in names:
        for parameter_name, parameter in model.get_submodule(name).named_parameters(name):
            outside = [other for other in owners[id(parameter)] if not other.startswith(inside)]
            if outside:
                raise TargetError(
                    f"modules_to_save: {parameter_name} is tied, it is also {', '.join(outside)}; training one would "
                    "change the other. Leave it out, or untie the weights first."
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
        TargetError: with the remedy.
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


def head_state(
    where: str | os.PathLike, model: nn.Module, name: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The saved state of one module, checked against the model's.

    Args:
        tensors: by name inside the whole model.

    Raises:
        MismatchError: no such module, or another shape.
    """
    expected = submodule(model, name, str(where)).state_dict()
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in expected.items()}
    if shapes != wanted:
        raise MismatchError(
            f"{where}: {name}: the file holds {shapes}, the model expects {wanted}; "
            "build the model with the number of classes that the adapter was trained for."
        )
    return state


def submodule(model: nn.Module, name: str, where: str, error: type[Exception] = MismatchError) -> nn.Module:
    """A module by name.

    Raises:
        ``error``: there is none; the nearest names are listed.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise error(f"{where}: the model has no module {name!r}; the nearest are {nearest(model, name)}.") from None
