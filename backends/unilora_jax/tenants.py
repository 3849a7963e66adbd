"""Tenants: many θ_d of one adapter train in one step, each by its own rows of a batch: `vmap` over θ_d, rows routed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unilora_core import ValuesError
from unilora_jax.adapter import Adapter

__all__ = ["Tenants", "route", "tenants"]

Trained = tuple[Array, Any]
"""θ_d (u, d) float32 of u tenants, and a tree of what else each trains, with u along the first axis: ``()``, heads."""


class Tenants(NamedTuple):
    """The two functions of a training, as optax has them; both can be jitted, and both are made of `jax.vmap`.

    Attributes:
        init: trained → the state of the optimiser for each tenant.
        step: (params, trained, state, batch, rows, mask, rates) → (trained, state, losses (u,)); see `tenants`.
    """

    init: Callable[[Trained], Any]
    step: Callable[..., tuple[Trained, Any, Array]]


def tenants(adapter: Adapter, loss: Callable[..., Array], optimizer: Any) -> Tenants:
    """Make the functions that train u tenants at once; each moves as it would alone.

    A step runs the base once for all rows. A tenant without a row in the batch, or with rates of 0 (it has stopped), is
    not moved, and neither is its state. Shard θ_d, the rest of what trains, the state, ``rows``, ``mask`` and
    ``rates`` along their first axis, one with automatic sharding, to spread tenants over devices.

    Args:
        adapter: the plan that all share.
        loss: (params, rest, batch, mask) → the loss of one tenant, a number: the mean over its k rows. ``rest`` is what
            it trains beside θ_d, the leaves of ``batch`` are (k, …), and ``mask`` (k,) is 0 for rows that fill up.
        optimizer: of optax, at rate 1, such as ``optax.adam(1.0)``. ``rates`` of a step, two arrays (u,), are those of
            θ_d and of the rest: ``adapter.learning_rate(2e-4)`` and 2e-4.

    Returns:
        ``init`` and ``step``. ``rows`` (u, k) and ``mask`` (u, k) of a step come from `route`; the leaves of ``batch``
        are (rows, …). The loss of a tenant without a row is 0.
    """
    each = jax.vmap(adapter.wrap(loss), in_axes=(None, 0, 0, 0, 0))

    def step(
        params: Any, trained: Trained, state: Any, batch: Any, rows: Array, mask: Array, rates: tuple[Array, Array]
    ) -> tuple[Trained, Any, Array]:
        routed = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], batch)
        present = mask.any(axis=1)

        def total(trained: Trained) -> tuple[Array, Array]:
            losses = jnp.where(present, each(params, *trained, routed, mask), 0.0)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(trained)
        updates, moved = jax.vmap(optimizer.update)(gradient, state, trained)
        active = present & ((rates[0] > 0) | (rates[1] > 0))
        new = tuple(_stepped(*pair) for pair in zip(trained, updates, rates, strict=True))
        return _chosen(active, new, trained), _chosen(active, moved, state), losses

    return Tenants(jax.vmap(optimizer.init), step)


def route(tenant: Any, count: int, capacity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows of a batch each tenant has; it runs outside of `jax.jit`.

    Args:
        tenant: (rows,) integers below ``count``, whose row it is.
        count: u, the number of tenants.
        capacity: k, the most rows of one tenant; by default as many as one has. A fixed k compiles a step once.

    Returns:
        rows (u, k) int32, filled up with 0, and mask (u, k) float32, 0 where it is filled up.

    Raises:
        ValuesError: a row is no tenant's, or one has more rows than ``capacity``.
    """
    tenant = np.asarray(tenant)
    if tenant.ndim != 1 or tenant.dtype.kind not in "iu":
        raise ValuesError(f"route: tenant: expected (rows,) integers, got {tenant.shape} {tenant.dtype}.")
    if (wrong := np.flatnonzero((tenant < 0) | (tenant >= count))).size:
        raise ValuesError(f"route: row {wrong[0]} names tenant {tenant[wrong[0]]}; expected 0 to {count - 1}.")
    numbers = np.bincount(tenant, minlength=count)
    most = int(numbers.max(initial=0))
    if capacity is not None and most > capacity:
        raise ValuesError(
            f"route: tenant {int(numbers.argmax())} has {most} rows, more than capacity = {capacity}; give a larger "
            "one, or leave rows for another batch."
        )
    rows = np.zeros((count, most if capacity is None else capacity), np.int32)
    mask = np.zeros(rows.shape, np.float32)
    for each in np.flatnonzero(numbers):
        rows[each, : numbers[each]] = np.flatnonzero(tenant == each)
        mask[each, : numbers[each]] = 1
    return rows, mask


def _along(x: Array, like: Array) -> Array:
    """Return x (u,) with as many axes as ``like`` (u, …)."""
    return x.reshape(-1, *[1] * (like.ndim - 1))


def _stepped(part: Any, update: Any, rate: Array) -> Any:
    return jax.tree.map(lambda leaf, step: leaf + (_along(rate, step) * step).astype(leaf.dtype), part, update)


def _chosen(active: Array, new: Any, old: Any) -> Any:
    """Return the new values of tenants that are active, and the old ones of the others."""
    return jax.tree.map(lambda a, b: jnp.where(_along(active, a), a, b), new, old)
