"""Putting an adapter on and taking it off: its hooks, its name in the model, and what trains."""

import contextlib

from unilora_torch.calls import surround
from unilora_torch.merging import merge, unmerge
from unilora_torch.paths import add_paths
from unilora_torch.structure import StructureHook
from unilora_torch.vector import Vector, attached
from unilora_torch.watch import CallerHook, by_caller

__all__ = ["detach", "put_on"]


def put_on(vector: Vector, name: str) -> None:
    """Hook an adapter to its model under this name; see `Adapter.put_on`."""
    model = vector.model
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with vector.alone("attach"):
        try:
            _register(vector)
            model.requires_grad_(False)
            for parameter in vector.saved_parameters().values():
                parameter.requires_grad_(True)
            model.add_module(name, vector)
            vector.structure.look("attach")  # the adapter is now among the model's children
        except BaseException:  # nothing is left half done
            _unregister(vector)
            model._modules.pop(name, None)
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in trained)
            raise


def _register(vector: Vector) -> None:
    """Register the hooks, each with its handle in ``handles`` as soon as it is there."""
    model, live, handles = vector.model, vector.live, vector.handles
    handles.append(surround(model, live))
    for caller in vector.structure.levels:
        hook = StructureHook(vector.structure, caller or None)
        handles.append(model.get_submodule(caller).register_forward_pre_hook(hook))
    handles.append(model.register_forward_pre_hook(live.open))
    known = {name: set(module._forward_hooks) for name, module in vector.structure.modules.items()}
    add_paths(live, model, vector.targets, handles)
    for name, module in vector.structure.modules.items():
        vector.structure.hooks += [(name, module, number) for number in module._forward_hooks.keys() - known[name]]
    for caller, modules in by_caller(model, dict.fromkeys(target.module for target in vector.targets)).items():
        handles.append(model.get_submodule(caller).register_forward_hook(CallerHook(live, caller, modules)))
    handles.append(model.register_forward_hook(live.close, always_call=True))


def _unregister(vector: Vector) -> None:
    for handle in vector.handles:
        handle.remove()


def detach(vector: Vector, in_weights: bool) -> None:
    """Take an adapter off its model, and leave its update in the weights or not; see `Adapter.detach`."""
    with vector.alone("detach"):
        (merge if in_weights else unmerge)(vector)
        try:
            _take_off(vector)
        except BaseException:  # what has begun is brought to its end
            _take_off(vector)
            raise


def _take_off(vector: Vector) -> None:
    model = vector.model
    _unregister(vector)
    others = {name: child for name, child in attached(model).items() if child is not vector}
    model._modules = {name: child for name, child in model._modules.items() if child is not vector}
    still = {name for other in others.values() for name in other.saved_parameters()}
    for name in vector.saved_parameters().keys() - still:
        model.get_parameter(name).requires_grad_(False)
    if not others:
        for name in vector.trained_before:
            with contextlib.suppress(AttributeError):  # of a module that was replaced
                model.get_parameter(name).requires_grad_(True)
    vector.originals, vector.live.merged = {}, False
