"""Checks of θ_d and of a tree of parameters against the plan, and of NaN and infinity."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unilora_core import MismatchError, ValuesError
from unilora_jax.chains import Chains
from unilora_jax.projection import check
from unilora_jax.targets import check_leaf, leaves_of, nearest

__all__ = ["check_finite", "check_merged", "checked_theta", "places_of"]


ARRAYS = (jnp.float32, jnp.int32)
"""The dtypes of an adapter's arrays."""


def checked_theta(chains: Chains, theta_d: Any, what: str) -> Array:
    """Return θ_d as an array of JAX, if its shape and dtype fit.

    Raises:
        ValuesError: they do not fit, or θ_d or the adapter was cast: with ``start="identity"`` B is made of θ_d - θ_d⁰,
            which narrower floats do not hold.
    """
    if isinstance(theta_d, (np.ndarray, np.generic)):
        theta_d = jnp.asarray(theta_d)
    check(theta_d, (chains.spec.d,), f"{what}: theta_d")
    if jnp.finfo(theta_d.dtype).bits < 32:
        raise ValuesError(
            f"{what}: theta_d: expected float32, got {theta_d.dtype}, in which the adapted model would not start as "
            "the base. Keep θ_d in float32; A and B are cast to the dtype of the products by themselves."
        )
    if cast := [leaf.dtype for leaf in jax.tree.leaves(chains) if leaf.dtype not in ARRAYS]:
        raise ValuesError(
            f"{what}: the arrays of an adapter are float32 and int32, got {cast[0]}: this one was cast, and would not "
            "start as the base. Cast the parameters without the adapter."
        )
    return theta_d


def places_of(params: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Return the path of each adapted leaf by its position among the leaves.

    Raises:
        MismatchError: the tree lacks a leaf, or its shape differs.
    """
    leaves = leaves_of(params)
    if leaves.keys() == {""} and "" not in shapes:
        raise MismatchError(
            f"expected a tree of parameters with {next(iter(shapes))}, got a single {type(params).__name__}; params "
            "and theta_d seem to be swapped: params come first."
        )
    position = {path: i for i, path in enumerate(leaves)}
    for path, shape in shapes.items():
        if path not in leaves:
            raise MismatchError(
                f"{path}: expected a weight of shape {shape}, the tree has no such leaf; the nearest are "
                f"{nearest(leaves, path)}."
            )
        check_leaf(path, leaves[path])
        if tuple(leaves[path].shape) != shape:
            raise MismatchError(
                f"{path}: expected shape {shape}, got {tuple(leaves[path].shape)}; the adapter was planned for "
                "another model."
            )
    return {position[path]: path for path in shapes}


def check_finite(values: Any, what: str) -> None:
    """Refuse NaN and infinity; inside `jax.jit` no value can be looked at.

    Raises:
        ValuesError: there is such a value.
    """
    if not isinstance(values, jax.core.Tracer) and not np.isfinite(np.asarray(values)).all():
        raise ValuesError(
            f"{what} holds NaN or infinity; training diverged (a lower learning rate, or gradient clipping). "
            "Nothing was written or changed."
        )


def check_merged(path: str, weight: Any, merged: Array) -> None:
    """Refuse W + B·A that is NaN or infinite where W is finite.

    Raises:
        ValuesError: there is such a value; the error has their count.
    """
    bad = jnp.isfinite(weight) & ~jnp.isfinite(merged)
    if not isinstance(bad, jax.core.Tracer) and (count := int(bad.sum())):
        raise ValuesError(
            f"merge: {path}: {count} of {merged.size} values of W + B·A are no numbers that {merged.dtype} holds; "
            "training diverged, or the weight needs a wider dtype. Nothing was changed."
        )
