"""θ_d and a tree of parameters, held against what was planned; and numbers that are none."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unilora_core import MismatchError, ValuesError
from unilora_jax.projection import check
from unilora_jax.targets import check_leaf, leaves_of, nearest

__all__ = ["check_finite", "check_merged", "checked_theta", "places_of"]


def checked_theta(theta_d: Any, d: int, what: str) -> Array:
    """θ_d as an array of JAX, of the shape and the kind that fit.

    Raises:
        ValuesError: it has others.
    """
    if isinstance(theta_d, (np.ndarray, np.generic)):
        theta_d = jnp.asarray(theta_d)
    check(theta_d, (d,), f"{what}: theta_d")
    return theta_d


def places_of(params: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Position among the leaves → path, of each adapted leaf.

    Raises:
        MismatchError: the tree lacks one, or its shape is another.
    """
    leaves = leaves_of(params)
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
        ValuesError: there are some.
    """
    if not isinstance(values, jax.core.Tracer) and not np.isfinite(np.asarray(values)).all():
        raise ValuesError(
            f"{what} holds NaN or infinity; training diverged (a lower learning rate, or gradient clipping). "
            "Nothing was written or changed."
        )


def check_merged(path: str, weight: Any, merged: Array) -> None:
    """Refuse W + B·A that is NaN or infinite where W is finite.

    Raises:
        ValuesError: with the count of such values.
    """
    bad = jnp.isfinite(weight) & ~jnp.isfinite(merged)
    if not isinstance(bad, jax.core.Tracer) and (count := int(bad.sum())):
        raise ValuesError(
            f"merge: {path}: {count} of {merged.size} values of W + B·A are no numbers that {merged.dtype} holds; "
            "training diverged, or the weight needs a wider dtype. Nothing was changed."
        )
