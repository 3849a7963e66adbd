"""Layers that a model does not call: a run of the model shows which module uses their weight instead.

WavLM hands ``q_proj.weight`` to a function, BEiT, EVA-02 and Swin v2 compute ``F.linear(x, self.qkv.weight, …)``,
and `nn.MultiheadAttention` reads ``out_proj.weight``: what stands beside such a layer is never reached. Its weight is
then a parameter of the module that reads it, and is W + ΔW while that module runs (`unilora_torch.Target`,
``parameter``).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unilora_torch.checks import is_plain
from unilora_torch.targets import Target
from unilora_torch.untouched import in_mode
from unilora_torch.verifying import floats

__all__ = ["through_readers"]

LAYER = (None, "weight")
"""The values of `Target.parameter` of a layer: it is adapted beside its weight, or inside it (a convolution with
groups)."""


def through_readers(model: nn.Module, targets: Iterable[Target], run: Callable[[], Any]) -> tuple[Target, ...]:
    """Return the targets, where a bypassed layer becomes a parameter of the module that reads its weight.

    A layer may be called in one mode and bypassed in the other, so the model is run in both, unless it does not train
    on these inputs. A layer that is neither called nor read stays as it is; no gradient will reach it.

    Args:
        run: a function that runs the model once and returns its output.
    """
    found = tuple(targets)
    layers = {target.module for target in found if target.parameter in LAYER}
    readers = _bypassed(model, layers, run, training=False)
    with contextlib.suppress(Exception):  # a model may raise anything, for lack of labels, say
        for layer, reader in _bypassed(model, layers, run, training=True).items():
            readers[layer] = min(reader, readers.get(layer, reader), key=len)  # the outer one
    return tuple(
        _inside(target, readers[target.module]) if target.parameter in LAYER and target.module in readers else target
        for target in found
    )


def _bypassed(model: nn.Module, layers: set[str], run: Callable[[], Any], training: bool) -> dict[str, str]:
    """Return for each layer that one mode does not call its reader in that mode."""
    with in_mode(model, training):
        missed = layers - _called(model, run)
        return _readers(model, missed, run) if missed else {}


def _inside(target: Target, reader: str) -> Target:
    parameter = f"{target.module}.weight".removeprefix(f"{reader}." if reader else "")
    return dataclasses.replace(target, module=reader, parameter=parameter)


def _called(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Return the names of the modules that one forward pass calls."""
    called: set[str] = set()
    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: called.add(name)))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return called


def _readers(model: nn.Module, layers: Iterable[str], run: Callable[[], Any]) -> dict[str, str]:
    """Return for each layer the innermost module above it that reads its weight in one forward pass; absent where none
    does.

    Each module above a layer puts a copy of its own in the place of the weight while it runs; the copy on which the
    output depends tells the reader.
    """
    weights = {layer: getattr(model.get_submodule(layer), "weight", None) for layer in layers}
    pairs = [
        (layer, reader)
        for layer, weight in weights.items()
        if isinstance(weight, nn.Parameter) and is_plain(weight)
        for reader in _above(layer)
    ]
    stand_ins: list[tuple[str, str, _StandIn]] = []
    handles: list[RemovableHandle] = []
    try:
        for layer, reader in pairs:
            stand_in, module = _StandIn(layer.removeprefix(f"{reader}." if reader else "")), model.get_submodule(reader)
            handles.append(module.register_forward_pre_hook(stand_in.open))
            # before another adapter's own hook puts the weight back
            handles.append(module.register_forward_hook(stand_in.close, prepend=True, always_call=True))
            stand_ins.append((layer, reader, stand_in))
        with torch.enable_grad():
            outputs = floats(run())
    finally:
        for handle in handles:
            handle.remove()
        for layer, _ in pairs:  # PyTorch runs no hook after an interrupt
            vars(model.get_submodule(layer)).pop("weight", None)
    copies = [(layer, reader, copy) for layer, reader, stand_in in stand_ins for copy in stand_in.made]
    if not outputs or not copies:
        return {}
    with torch.enable_grad():
        total = torch.stack([output.float().sum() for output in outputs]).sum()
    grads = torch.autograd.grad(total, [copy for *_, copy in copies], allow_unused=True)
    return {layer: reader for (layer, reader, _), grad in zip(copies, grads, strict=True) if grad is not None}


class _StandIn:
    """The forward hooks of a module above a layer, which put a copy of the layer's weight in its place while the module
    runs.

    The layer is looked up in the module that runs, which may be a copy that another adapter made of it.
    """

    def __init__(self, path: str):
        self.path = path
        self.made: list[Tensor] = []
        self.outer: list[Tensor | None] = []

    def open(self, module: nn.Module, _args: Any) -> None:
        """Put the copy in its place, before the module's forward pass."""
        layer = module.get_submodule(self.path)
        self.outer.append(vars(layer).get("weight"))
        weight: Any = layer.weight
        vars(layer)["weight"] = copied = weight.detach().requires_grad_()
        self.made.append(copied)

    def close(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Put the weight back, after the module's forward pass."""
        held, outer = vars(module.get_submodule(self.path)), self.outer.pop()
        if outer is None:
            del held["weight"]
        else:
            held["weight"] = outer


def _above(name: str) -> Iterator[str]:
    """Yield the names of the modules around one, from the nearest to the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name
