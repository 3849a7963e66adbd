"""Whether every target is reached and lets a gradient through to θ_d, found out by one run."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import TargetError
from unilora_torch.checks import without_idle_experts
from unilora_torch.vector import Vector

__all__ = ["verify"]


def verify(vector: Vector, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Run the model once and check every target; see `Adapter.verify`."""
    if not vector.live.acts():
        raise TargetError("verify: the adapter is merged or disabled, so no gradient reaches θ_d; unmerge it first.")
    alive = _alive(vector, args, kwargs)
    dead = without_idle_experts({target.name: target.name in alive for target in vector.targets})
    if dead:
        raise TargetError(f"{dead[0]}: no gradient reaches θ_d through this target ({len(dead)} such); exclude it.")


def _alive(vector: Vector, args: tuple, kwargs: Mapping[str, Any]) -> set[str]:
    """The names of the targets through whose chains some function of the outputs gets a gradient."""
    model, loss = vector.model, vector.theta_d.new_zeros((), requires_grad=True)
    with vector.alone("verify"), torch.enable_grad(), _evaluating(model), vector.live.watching() as seen:
        output = model(*args, **kwargs)
        for tensor in _floats(output):
            noise = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape).cos()
            loss = loss + (tensor.float() * noise).sum()
        names, tensors = [], []
        for name, mine in seen.items():
            names += [name] * len(mine)
            tensors += mine
        grads = torch.autograd.grad(loss, tensors, allow_unused=True) if tensors else ()
    return {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.any()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; the mode of each module is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        try:
            model.eval()
            yield
        finally:
            _train(training)
    finally:  # again, where an interrupt kept the first from being done
        _train(training)


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def _floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor with a gradient in a nested output."""
    leaves = torch.utils._pytree.tree_leaves(output if not hasattr(output, "to_tuple") else output.to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
