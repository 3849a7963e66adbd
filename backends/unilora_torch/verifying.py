"""Verifying: a run in each mode finds out whether every target is reached and lets a gradient through to θ_d."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_core import TargetError
from unilora_torch.checks import without_idle_experts
from unilora_torch.untouched import in_mode
from unilora_torch.vector import Vector

__all__ = ["floats", "verify"]


@dataclass(frozen=True)
class _Run:
    """The result of one run: the targets that ran, those through which the outputs have a gradient, and those that ran
    and let none through.
    """

    ran: frozenset[str] = frozenset()
    alive: frozenset[str] = frozenset()
    cut: frozenset[str] = frozenset()


def verify(vector: Vector, args: tuple, kwargs: Mapping[str, Any], whole: bool = True) -> list[str]:
    """Run the model in evaluation and in training mode and check every target; see `Adapter.verify`.

    Args:
        whole: whether to refuse targets in parts of the model that did not run, too; else they are returned, unless
            nothing ran.
    """
    if not vector.live.acts():
        raise TargetError("verify: the adapter is merged or disabled, so no gradient reaches θ_d; unmerge it first.")
    with vector.alone("verify"):
        with in_mode(vector.model, training=False):
            evaluated = _run(vector, args, kwargs)
        with in_mode(vector.model, training=True):
            trained = _in_training(vector, args, kwargs)
    alive, names = evaluated.alive | trained.alive, [target.name for target in vector.targets]
    dead = without_idle_experts({name: name in alive for name in names})
    ran = evaluated.ran | trained.ran
    asleep = [name for name in dead if name not in ran] if ran and not whole else []
    dead = [name for name in dead if name not in asleep]
    if dead:
        raise TargetError(f"{dead[0]}: no gradient reaches θ_d through this target ({len(dead)} such); exclude it.")
    if cut := [name for name in names if name in trained.cut]:
        raise TargetError(
            f"{cut[0]}: in training no gradient reaches θ_d through this target, though one does in evaluation "
            f"({len(cut)} such); exclude it."
        )
    return asleep


def _in_training(vector: Vector, args: tuple, kwargs: Mapping[str, Any]) -> _Run:
    """Return the run in training mode; an empty one where the model does not train on these inputs (without labels,
    say).
    """
    try:
        return _run(vector, args, kwargs)
    except TargetError:
        raise
    except Exception:  # a model may raise anything
        return _Run()


def _run(vector: Vector, args: tuple, kwargs: Mapping[str, Any]) -> _Run:
    loss = vector.theta_d.new_zeros((), requires_grad=True)
    with torch.enable_grad(), vector.live.watching() as seen:
        output = vector.model(*args, **kwargs)
        for tensor in floats(output):
            noise = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape).cos()
            loss = loss + (tensor.float() * noise).sum()
        names, tensors = [], []
        for name, mine in seen.items():
            names += [name] * len(mine)
            tensors += mine
        grads = torch.autograd.grad(loss, tensors, allow_unused=True) if tensors else ()
    reached = {name for name, grad in zip(names, grads, strict=True) if grad is not None}
    alive = {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.any()}
    cut = frozenset() if _is_recomputed(loss) else seen.keys() - reached
    return _Run(frozenset(seen), frozenset(alive), frozenset(cut))


def _is_recomputed(loss: Tensor) -> bool:
    """Say whether a reentrant checkpoint is in the graph, which shows nothing of what is inside it."""
    todo, known = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in known:
            known.add(node)
            todo += [above for above, _ in node.next_functions]
    return any(node.name().startswith("CheckpointFunction") for node in known)


def floats(output: Any) -> list[Tensor]:
    """Return every floating-point tensor with a gradient in a nested output."""
    leaves = torch.utils._pytree.tree_leaves(output if not hasattr(output, "to_tuple") else output.to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
