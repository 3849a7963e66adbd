"""Runs that leave no trace: attributes, submodules, buffers, modes and random numbers are as they were before."""

import contextlib
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unilora_torch.live import Live
from unilora_torch.structure import Structure
from unilora_torch.vector import Vector

__all__ = ["in_mode", "untouched"]

Step = Callable[[], object]

NOT_LOOKED_INTO = (Vector, Live, Structure, type, types.FunctionType, types.MethodType, types.ModuleType)
"""The types that have attributes, but hold no state of a model."""

DEPTH = 3
"""The depth to which objects that a module holds are looked into: its config, the config of its text model, the dicts
in these."""

LARGE = 2**20
"""The size from which a table of integers is a quantised weight, which no run writes to."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo whatever happens to the model inside the ``with``, also after an interrupt.

    Put back are the attributes of each module (its mode among them) and of the objects that it holds, such as a config
    that modules share; what stands in lists and dicts; submodules and hooks; buffers, and parameters of one axis;
    which parameters train, and their gradients; and the state of every generator of random numbers. Weights are not put
    back: a copy of them would double the memory.
    """
    steps = [*_random(model), *_held(model)]
    try:
        try:
            yield
        finally:
            _take(steps)
    finally:  # again, where an interrupt kept the first from being done
        _take(steps)


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Keep the model in one mode inside the ``with``; it is `untouched` afterwards.

    In training mode dropout and the like, batch norms and checkpoints stay out of it: they make outputs zero by chance,
    need more than one row, and hide the gradients of what is inside.
    """
    with untouched(model):
        for module in model.modules():
            drops = not module._modules and not module._parameters and not module._buffers
            norms = isinstance(module, nn.modules.batchnorm._NormBase)
            module.training = training and not drops and not norms
            for flag in ("gradient_checkpointing", "grad_checkpointing"):  # transformers, timm
                if training and vars(module).get(flag):
                    setattr(module, flag, False)
        yield


def _take(steps: list[Step]) -> None:
    with torch.no_grad():
        for step in steps:
            step()


def _held(model: nn.Module) -> Iterator[Step]:
    """Yield steps that put back each thing that the model holds, once."""
    seen: dict[int, Any] = {}
    todo: deque[tuple[Any, int]] = deque([(model, 0)])
    while todo:
        value, depth = todo.popleft()
        if isinstance(value, Vector):  # an adapter keeps what it has learnt of its model
            yield partial(setattr, value, "training", value.training)
        if id(value) in seen or depth > DEPTH or isinstance(value, NOT_LOOKED_INTO):
            continue
        if isinstance(value, Tensor) and depth:  # of an object, such as the weights that accelerate keeps elsewhere
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield from _tensor(value)
            todo.append((vars(value), depth + 1))  # bitsandbytes moves the numbers of an 8-bit weight to its layer
        elif type(value) in (dict, OrderedDict, defaultdict):
            yield partial(_fill_dict, value, dict(value))
            todo += [(each, depth) for each in value.values()]
        elif type(value) in (list, set, deque):
            yield partial(_fill, value, list(value))
            todo += [(each, depth) for each in value]
        elif isinstance(value, tuple):
            todo += [(each, depth) for each in value]
        elif (step := _generator(value)) is not None:
            yield step
        elif hasattr(value, "__dict__"):
            todo.append((vars(value), 0 if isinstance(value, nn.Module) else depth + 1))


def _fill_dict(held: MutableMapping, before: dict) -> None:
    for key in held.keys() - before.keys():
        held.pop(key, None)
    for key, value in before.items():
        if key not in held or held[key] is not value:
            held[key] = value
    if list(held) != list(before):  # the order of submodules is that of the state_dict
        held.clear()
        held.update(before)


def _fill(held: Any, before: list) -> None:
    if len(held) != len(before) or any(one is not other for one, other in zip(held, before, strict=True)):
        held.clear()
        (held.update if isinstance(held, set) else held.extend)(before)


def _tensor(tensor: Tensor) -> Iterator[Step]:
    if tensor.is_leaf:
        yield partial(_set_leaf, tensor, tensor.requires_grad, tensor.grad)
    weight = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
    quantised = not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel() >= LARGE
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta
    if plain and not weight and not quantised:
        yield partial(_set_values, tensor, tensor.detach().clone())


def _set_leaf(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    if tensor.grad is not grad:
        tensor.grad = grad


def _set_values(tensor: Tensor, before: Tensor) -> None:
    if tensor.shape != before.shape or tensor.device != before.device:
        tensor.data = before.clone()
    elif not torch.equal(tensor, before):
        tensor.copy_(before)


def _generator(value: Any) -> Step | None:
    """Return the step that puts a generator back; None for anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _random(model: nn.Module) -> Iterator[Step]:
    """Yield steps that put back the generators that all modules share."""
    yield partial(random.setstate, random.getstate())
    yield partial(np.random.set_state, np.random.get_state())
    yield partial(torch.set_rng_state, torch.get_rng_state())
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        yield partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
