"""Gradient checkpointing beside a frozen model: it is made to give θ_d its gradient."""

import contextlib
import functools
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from unilora_core import TargetError

__all__ = ["enable_checkpointing", "tracked_checkpoints", "watch_checkpointing"]


def watch_checkpointing(model: PreTrainedModel) -> list[Any]:
    """Return handles of the hooks that make reentrant checkpointing give θ_d its gradient; they act once checkpointing
    is on.

    Checkpointing may be switched on at any time (the Trainer does so when training begins), so this is looked up in
    each pass, also in a pass of a model inside this one.
    """
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    made = [(each, TrackedCheckpoints(each)) for each in inner]
    return [handle for each, tracked in made for handle in (tracked, each.register_forward_pre_hook(tracked))]


def enable_checkpointing(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Switch gradient checkpointing on, as a model's own method takes it; transformers 5.23 renamed that."""
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)(*args, **kwargs)


@contextlib.contextmanager
def tracked_checkpoints(model: PreTrainedModel) -> Iterator[None]:
    """Make reentrant checkpointing give θ_d its gradient in the passes inside the ``with``."""
    handles = watch_checkpointing(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TrackedCheckpoints:
    """A forward pre-hook that has a model's layers checkpointed by `tracked`.

    Non-reentrant checkpointing needs nothing, and stays as it is.
    """

    def __init__(self, model: PreTrainedModel):
        kind = type(model).__name__
        named = ((f"{kind}.{name}" if name else kind, module) for name, module in model.named_modules())
        self.layers = {name: module for name, module in named if hasattr(module, "gradient_checkpointing")}

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Track the checkpoints, before each forward pass of the model; a compiled one keeps no gradient back."""
        if torch.compiler.is_compiling():
            return
        for name, layer in self.layers.items():
            if layer.gradient_checkpointing:
                function: Any = getattr(layer, "_gradient_checkpointing_func", None)
                if _may_reenter(function):
                    layer._gradient_checkpointing_func = functools.partial(tracked, name, function)

    def remove(self) -> None:
        """Leave the layers as they were, as the handle of a hook does."""
        for layer in self.layers.values():
            function: Any = getattr(layer, "_gradient_checkpointing_func", None)
            if _is_tracked(function):
                layer._gradient_checkpointing_func = function.args[1]


def _is_tracked(function: Any) -> bool:
    return isinstance(function, functools.partial) and function.func is tracked


def _may_reenter(function: Any) -> bool:
    """Say whether a function may checkpoint by reentering, as far as is known; PyTorch's default is reentrant."""
    if function is None or _is_tracked(function):
        return False
    return not isinstance(function, functools.partial) or function.keywords.get("use_reentrant") is not False


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a nested value."""

    index: int


def tracked(where: str, checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Return what ``checkpoint(function, *args)`` gives, with all gradients.

    Reentrant checkpointing sees only the tensors among the positional arguments and in a flat output. Where no argument
    requires a gradient, as in a frozen model, it also drops the gradients of what is inside. So every tensor, those of
    the keywords included, is given as an argument beside one that requires a gradient, and every tensor of the output
    comes back in a flat tuple.

    Raises:
        TargetError: the layer writes into an argument, so that tensors leave it without a gradient.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args)
    if not torch.is_grad_enabled():  # inside another checkpoint, too, where PyTorch 2.9 would warn of lost gradients
        return function(*args)
    keywords = function.keywords if isinstance(function, functools.partial) else {}
    (packed_args, packed_keywords), tensors = _packed((args, keywords))
    structure: Any = None

    def run(_always: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        nonlocal structure
        inputs, named = _mapped((packed_args, packed_keywords), Slot, lambda slot: given[slot.index])
        before = _contents((inputs, named))
        output = function(*inputs, **named)
        if before != _contents((inputs, named)):
            raise TargetError(
                f"{where}: this layer hands tensors on in an argument that it changes, and reentrant checkpointing "
                "would drop their gradients; enable gradient checkpointing with {'use_reentrant': False}."
            )
        structure, found = _packed(output)
        return _differentiable(found)

    found = checkpoint(run, torch.zeros((), requires_grad=True), *tensors)
    return _mapped(structure, Slot, lambda slot: found[slot.index])


def _differentiable(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors. Where they are computed again for a backward pass, one of them is made to require a gradient,
    or PyTorch refuses the pass: maybe nothing in the layer is trained.
    """
    if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in tensors):
        return tuple(tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors)
    return tuple(tensors)


def _packed(value: Any) -> tuple[Any, list[Tensor]]:
    """Return a nested value with a `Slot` for each tensor, and the tensors, each once."""
    slots: dict[int, Slot] = {}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Slot:
        if id(tensor) not in slots:
            slots[id(tensor)] = Slot(len(tensors))
            tensors.append(tensor)
        return slots[id(tensor)]

    return _mapped(value, Tensor, pack), tensors


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return a nested value with all values of a kind changed. Other objects, such as caches, stay the same."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _mapped(each, kind, change) for key, each in value.items()})
    if type(value) is dict:
        return {key: _mapped(each, kind, change) for key, each in value.items()}
    if isinstance(value, tuple | list):
        make = getattr(value, "_make", type(value))  # a named tuple has its own constructor
        return make(_mapped(each, kind, change) for each in value)
    return value


def _contents(value: Any) -> list[Any]:
    """Return what lies in the lists and mappings of a nested value, by identity."""
    if isinstance(value, MutableMapping):
        return [(key, id(each), _contents(each)) for key, each in value.items()]
    return [(id(each), _contents(each)) for each in value] if isinstance(value, tuple | list) else []
