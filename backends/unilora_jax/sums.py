"""Several adapters at once on one base: their updates add up."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from unilora_core import SpecError
from unilora_jax.adapter import Adapter
from unilora_jax.wrapping import wrapped_sum

__all__ = ["wrap"]


def wrap(
    adapters: Sequence[Adapter], function: Callable[..., Any], weights: Sequence[float | Array] | None = None
) -> Callable[..., Any]:
    """Make the model under several adapters: ``function(params, …)`` becomes ``f(params, thetas, …)``.

    Each weight W acts as W + Σ_k w_k B_k·A_k, exactly, whatever the adapters' ranks, d, targets or methods; see
    `Adapter.wrap`.

    Args:
        adapters: the adapters, planned on one tree; ``thetas`` is a list of the θ_d of each, in this order.
        weights: the weight w_k of each, numbers or scalar arrays, which may be traced; all 1 by default.

    Raises:
        SpecError: there is no adapter, or the number of weights differs.
        TargetError (when the wrapped function is called): two adapters give one leaf different shapes or inputs.
        ValuesError (likewise): the number of θ_d differs. Other errors are as in `Adapter.wrap`.
    """
    if not adapters or (weights is not None and len(weights) != len(adapters)):
        found = "no weights" if weights is None else f"{len(weights)} weights"
        raise SpecError(f"wrap: expected one adapter or more, and as many weights, got {len(adapters)} and {found}.")
    return wrapped_sum([adapter.chains for adapter in adapters], function, weights)
