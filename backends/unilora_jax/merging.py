"""Merging: W + B·A takes the place of W."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from unilora_jax.chains import Chains
from unilora_jax.checks import check_finite, check_merged, checked_theta, places_of
from unilora_jax.projection import explicit_sharding

__all__ = ["merged"]


def merged(chains: Chains, params: Any, theta_d: Array) -> Any:
    """Make a new tree; see `Adapter.merge`."""
    places = places_of(params, dict(chains.shapes))
    theta_d = checked_theta(chains, theta_d, "merge")
    check_finite(theta_d, "merge: theta_d")
    pairs = chains.pairs(theta_d)
    leaves, tree = jax.tree.flatten(params)
    for i, path in places.items():
        leaves[i] = _sum(path, jnp.asarray(leaves[i]), *pairs[path])
    return jax.tree.unflatten(tree, leaves)


def _sum(path: str, weight: Array, down: Array, up: Array) -> Array:
    """Compute W + B·A in float32 or what is wider, rounded once to the weight's dtype."""
    update = jnp.einsum("r...,r...->...", down, up)
    if (sharding := explicit_sharding(weight)) is not None:
        update = jax.sharding.reshard(update, sharding)
    wide = max(update.dtype, weight.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    found = (weight.astype(wide) + update.astype(wide)).astype(weight.dtype)
    check_merged(path, weight, found)
    return found
