"""The update in the weights themselves: it is merged, taken out again bit for bit, or disabled inside a ``with``."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unilora_core import TargetError, UniLoraError
from unilora_torch.checks import check_adds, check_merged, check_untied, own_weight, owners_of
from unilora_torch.live import Entered
from unilora_torch.paths import BesideHook
from unilora_torch.targets import Target, block_of, weight_name
from unilora_torch.vector import Vector, attached

__all__ = ["add_update", "check_unmerge", "disabled", "merge", "unmerge"]


def merge(vector: Vector) -> None:
    """Add the update of each target to its weight, once; see `Adapter.merge`."""
    if vector.live.merged:
        return
    vector.structure.check("merge")
    vector.check_finite("merge")
    for name, other in attached(vector.model).items():
        if other.live.merged:
            raise TargetError(f"merge: the adapter {name!r} is merged; unmerge it, or detach(merge=True) it, first.")
    if vector.live.off.open:
        raise TargetError("merge: the adapter is disabled inside a `with` here; leave that block first.")
    with vector.alone("merge"):
        weights = _weights(vector)
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


def _weights(vector: Vector) -> dict[str, Tensor]:
    """Return the weights that the update is added to, by name, after all checks."""
    weights, owners = {}, owners_of(vector.model)
    for target in vector.targets:
        module = vector.structure.modules[target.module]
        weights[weight_name(target)] = own_weight(module, target)
        check_untied(module, target, owners)
        if target.parameter is None:
            _check_first(module, target)
            check_adds(module, target)
    return weights


def _check_first(module: nn.Module, target: Target) -> None:
    """Refuse a layer where a foreign hook takes the output before B·A is added: merged, it would take the sum.

    Raises:
        TargetError: there is such a hook; the error names it.
    """
    first = next(iter(module._forward_hooks.values()), None)
    if not isinstance(first, BesideHook):
        raise TargetError(
            f"{target.name}: the forward hook {first!r} takes the layer's output before B·A is added, so the merged "
            "model would be another; register it after the adapter was put on, without prepend=True. Nothing was "
            "changed."
        )


@torch.no_grad()
def add_update(weight: Tensor, target: Target, update: Tensor) -> None:
    """Add what `Vector.delta_weight` gives to a target's block of a weight, in float32, rounded once."""
    block = block_of(weight, target)
    block.copy_(block.float() + update)


def unmerge(vector: Vector) -> None:
    """Put the original weights back, bit for bit; see `Adapter.unmerge`."""
    if vector.live.merged:
        check_unmerge(vector, "unmerge")
        with vector.alone("unmerge"):
            _restore(vector)


def check_unmerge(vector: Vector, what: str) -> None:
    """Refuse to put the original weights where they do not belong any more: a layer was replaced while merged.

    Raises:
        TargetError: a layer was replaced; the error names ``what``.
    """
    if vector.live.merged:
        vector.structure.check(what)
        for target in vector.targets:
            own_weight(vector.structure.modules[target.module], target)


def _restore(vector: Vector) -> None:
    """Put the original weights back; after an interrupt it begins again, so that it is never half done."""
    try:
        _copy_originals(vector)
    except BaseException:
        _copy_originals(vector)
        raise


@torch.no_grad()
def _copy_originals(vector: Vector) -> None:
    places = {weight_name(target): (vector.structure.modules[target.module], target) for target in vector.targets}
    for name, original in vector.originals.items():
        own_weight(*places[name]).copy_(original)
    vector.live.merged = False
    vector.originals = {}


@contextlib.contextmanager
def disabled(vector: Vector) -> Iterator[None]:
    """Give the base model's outputs inside the ``with``; see `Adapter.disabled`."""
    off, entered = vector.live.off, Entered(vector.live.off, True)
    try:
        try:
            off.begin(entered)
            if vector.live.merged:
                _take_out(vector)
            else:
                vector.live.acts()  # refuses this thread, where another has just taken it out
            yield
        finally:
            off.end(entered)
            _put_back(vector)
    finally:  # again, where an interrupt kept the first from being done
        off.end(entered)
        _put_back(vector)


def _take_out(vector: Vector) -> None:
    """Take what is merged out of the weights, until `_put_back`."""
    claim = vector.alone("disabled() of a merged adapter")
    claim.__enter__()
    vector.taken_out = claim
    unmerge(vector)


def _put_back(vector: Vector) -> None:
    """Put back what was taken out, if it was, and once no ``with`` has the adapter disabled any more."""
    claim = vector.taken_out
    if claim is None or vector.live.off.open:
        return
    try:
        try:
            merge(vector)
        except UniLoraError:  # θ_d has become NaN, say; the weights stay as in the base
            raise
        except BaseException:
            merge(vector)
            raise
    finally:
        claim.__exit__(None, None, None)
        vector.taken_out = None
