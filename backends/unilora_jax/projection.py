"""θ_D = P θ_d with its gradient Pᵀ, in JAX.

The scale is applied to θ_d, then one gather spreads it. The backward pass is one scatter-add, which XLA sums in order
on the CPU, in no fixed order on a GPU; an adapter has another way there, see `members`.
"""

import functools
import re
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unilora_core import ValuesError

__all__ = [
    "check",
    "explicit_sharding",
    "here",
    "project",
    "project_transpose",
    "slow_scatter",
    "varying_as",
    "wide_of",
]

SLOW = (0, 10, 2), (0, 11, 0)
"""The first and the last jaxlib that compile a float32 scatter-add on CUDA to compare-and-swap (jax #38806)."""


def project(theta_d: Array, groups: Any, scale: Array, origin: Array | None = None) -> Any:
    """Compute (θ_d·s)[g], differentiable in ``theta_d``, by reverse mode.

    Args:
        theta_d: (d,) floating point. Narrower floats than float32 are computed in float32.
        groups: int32 of any shape, values below d, with ``origin`` below 2d; or any pytree of such arrays.
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰. Groups from d to 2d-1 then mean ((θ_d - θ_d⁰)·s)[g - d], for the factors B of
            ``start="identity"``.

    Returns:
        Arrays of the shapes of ``groups``, in the same tree, in the dtype of ``theta_d``.

    Raises:
        ValuesError: ``theta_d`` has another shape than ``scale``, or is not floating point.
    """
    check(theta_d, scale.shape, "project: theta_d")
    theta_D = _project(theta_d.astype(wide_of(theta_d)), groups, scale, origin)
    return jax.tree.map(lambda part: part.astype(theta_d.dtype), theta_D)


def project_transpose(y: Any, groups: Any, scale: Array) -> Array:
    """Compute Pᵀ y: the sum of y over each group, times 1/√n_j.

    Args:
        y: floating point, the shape of ``groups``; or the same pytree of such arrays.
        groups: int32 of any shape, values below d; or any pytree of such arrays.
        scale: (d,) float32.

    Returns:
        (d,) in the dtype of ``y``.

    Raises:
        ValuesError: ``y`` has another shape than ``groups``, or is not floating point.
    """
    pairs = list(zip(jax.tree.leaves(y), jax.tree.leaves(groups), strict=True))
    for part, at in pairs:
        check(part, at.shape, "project_transpose: y")
    _warn_of(slow_scatter(*here()))
    wide = wide_of(pairs[0][0])
    summed = jnp.zeros(scale.shape, wide)
    for part, at in reversed(pairs):  # a model's last gradients come first, and need not wait for the others
        whole = None if explicit_sharding(at) is None else PartitionSpec(None)
        summed = summed.at[at].add(part.astype(wide), mode="promise_in_bounds", out_sharding=whole)
    return (summed * scale.astype(wide)).astype(pairs[0][0].dtype)


def here() -> tuple[str, str]:
    """Say where this process computes by default, "cpu", "cuda", …, and the version of jaxlib."""
    backend = jax.extend.backend.get_backend()
    platform = "cuda" if "cuda" in backend.platform_version.lower() else backend.platform
    return platform, version("jaxlib")


def slow_scatter(platform: str, version: str) -> str | None:
    """Return the warning for the scatter-add of this jaxlib there, where it takes hundreds of times what it should."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if platform != "cuda" or not SLOW[0] <= numbers <= SLOW[1]:
        return None
    return (
        f"jaxlib {version} compiles a float32 scatter-add on CUDA to a loop that takes hundreds of times what it "
        "should, and the gradient of θ_d is made by one here. Take jaxlib 0.12 or later; or let an adapter make it "
        "(plan, wrap, factors), which sums over members instead, but on a mesh with explicit axes or beyond D = 2^31."
    )


@functools.cache
def _warn_of(what: str | None) -> None:
    """Warn, once in a process."""
    if what is not None:
        warnings.warn(what, stacklevel=3)


@jax.custom_vjp
def _project(theta_d: Array, groups: Any, scale: Array, origin: Array | None) -> Any:
    table = theta_d * scale.astype(theta_d.dtype)
    if origin is not None:
        table = jnp.concatenate([table, (theta_d - origin.astype(theta_d.dtype)) * scale.astype(theta_d.dtype)])
    return jax.tree.map(
        lambda at: table.at[at].get(mode="promise_in_bounds", out_sharding=explicit_sharding(at)), groups
    )


def _forward(theta_d: Array, groups: Any, scale: Array, origin: Array | None) -> tuple[Any, tuple]:
    return _project(theta_d, groups, scale, origin), (groups, scale, origin)


def _backward(saved: tuple, y: Any) -> tuple[Array, None, None, None]:
    groups, scale, origin = saved
    if origin is not None:  # both halves of the table are made of the same θ_d
        d = scale.shape[0]
        groups = jax.tree.map(lambda at: jnp.where(at < d, at, at - d), groups)
    return project_transpose(y, groups, scale), None, None, None


_project.defvjp(_forward, _backward)


def explicit_sharding(x: Array) -> NamedSharding | None:
    """Return the sharding in x's type, where its mesh has explicit axes; gathers and scatters must be told it."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def varying_as(x: Array, arrays: Iterable[Any]) -> Array:
    """Mark x, inside `shard_map`, as different on each device, as one of the arrays is: then the gradient of θ_d is
    summed once, over d numbers.
    """
    axes = (
        frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
        - jax.typeof(x).manual_axis_type.varying
    )
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def wide_of(x: Array) -> jnp.dtype:
    """Return the dtype that an array is computed in: its own, or float32 where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def check(x: Array, shape: tuple[int, ...], what: str) -> None:
    """Refuse another type, shape or dtype; the text is the core's."""
    if not isinstance(x, jax.Array) or x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
        found = (
            f"{tuple(x.shape)} {x.dtype}" if isinstance(x, jax.Array) else f"a {type(x).__module__}.{type(x).__name__}"
        )
        raise ValuesError(f"{what}: expected shape {tuple(shape)} and a floating-point dtype, got {found}.")
