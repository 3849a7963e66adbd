"""The update in the weights themselves: merged, taken out again bit for bit, and the base inside a ``with``."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from unilora_core import TargetError, UniLoraError
from unilora_torch.checks import check_merged, plain_weight
from unilora_torch.live import Entered
from unilora_torch.targets import Target, block_of, weight_name
from unilora_torch.vector import Vector, attached

__all__ = ["add_update", "disabled", "merge", "unmerge"]


def merge(vector: Vector) -> None:
    """Add the update of each target to its weight, once; see `Adapter.merge`."""
    if vector.live.merged:
        return
    vector.check_finite("merge")
    for name, other in attached(vector.model).items():
        if other.live.merged:
            raise TargetError(f"merge: the adapter {name!r} is merged; unmerge it, or detach(merge=True) it, first.")
    if vector.live.off.open:
        raise TargetError("merge: it is disabled inside a `with`, which promises the base; leave that first.")
    with vector.alone("merge"):
        weights = {weight_name(target): plain_weight(vector.model, target) for target in vector.targets}
        originals = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            vector.originals = originals
            for target in vector.targets:
                before, after = originals[weight_name(target)], weights[weight_name(target)]
                add_update(after, target, vector.delta_weight(target))
                check_merged(f"merge: {target.name}", block_of(before, target), block_of(after, target))
            vector.live.merged = True
        except BaseException:
            _restore(vector)
            raise


@torch.no_grad()
def add_update(weight: Tensor, target: Target, update: Tensor) -> None:
    """Add what `Vector.delta_weight` gives to a target's block of a weight, in float32, rounded once."""
    block = block_of(weight, target)
    block.copy_(block.float() + update)


def unmerge(vector: Vector) -> None:
    """Put the original weights back, bit for bit; see `Adapter.unmerge`."""
    if vector.live.merged:
        with vector.alone("unmerge"):
            _restore(vector)


def _restore(vector: Vector) -> None:
    """The original weights; an interrupt lets it begin again, so that it is never half done."""
    try:
        _copy_originals(vector)
    except BaseException:
        _copy_originals(vector)
        raise


@torch.no_grad()
def _copy_originals(vector: Vector) -> None:
    for name, original in vector.originals.items():
        owner, _, key = name.rpartition(".")
        getattr(vector.model.get_submodule(owner), key).copy_(original)
    vector.live.merged = False
    vector.originals = {}


@contextlib.contextmanager
def disabled(vector: Vector) -> Iterator[None]:
    """The base model's outputs inside the ``with``; see `Adapter.disabled`."""
    off, entered = vector.live.off, Entered(vector.live.off, True)
    try:
        try:
            off.begin(entered)
            if vector.live.merged:
                _take_out(vector)
            else:
                vector.live.acts()  # where another thread has just taken it out, this one is refused
            yield
        finally:
            off.end(entered)
            _put_back(vector)
    finally:  # again, where an interrupt kept the first from being done
        off.end(entered)
        _put_back(vector)


def _take_out(vector: Vector) -> None:
    """What is merged, until `_put_back`."""
    claim = vector.alone("disabled() of a merged adapter")
    claim.__enter__()
    vector.taken_out = claim
    unmerge(vector)


def _put_back(vector: Vector) -> None:
    """What was taken out, if it was, and once nobody has the adapter disabled any more."""
    claim = vector.taken_out
    if claim is None or vector.live.off.open:
        return
    try:
        try:
            merge(vector)
        except UniLoraError:  # θ_d has become NaN, say: the weights stay the base's
            raise
        except BaseException:
            merge(vector)
            raise
    finally:
        claim.__exit__(None, None, None)
        vector.taken_out = None
