"""θ_D = P θ_d with its gradient Pᵀ, in JAX.

The scale is applied to θ_d, then one gather spreads it. The backward pass is one scatter-add: XLA sums in order on the
CPU, in no fixed order on a GPU (``XLA_FLAGS=--xla_gpu_deterministic_ops=true`` fixes it).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unilora_core import ValuesError

__all__ = ["explicit_sharding", "project", "project_transpose"]


def project(theta_d: Array, groups: Array, scale: Array) -> Array:
    """(θ_d·s)[g], differentiable in ``theta_d``, by reverse mode.

    Args:
        theta_d: (d,) floating point. Narrower floats than float32 are computed in float32.
        groups: int32 of any shape, values below d.
        scale: (d,) float32, 1/√n_j.

    Returns:
        The shape of ``groups``, in the dtype of ``theta_d``.

    Raises:
        ValuesError: ``theta_d`` has another shape than ``scale``, or is not floating point.
    """
    _check(theta_d, scale.shape, "project: theta_d")
    return _project(theta_d.astype(_wide(theta_d)), groups, scale).astype(theta_d.dtype)


def project_transpose(y: Array, groups: Array, scale: Array) -> Array:
    """Pᵀ y: the sum of y over each group, times 1/√n_j.

    Args:
        y: floating point, the shape of ``groups``.
        groups: int32 of any shape, values below d.
        scale: (d,) float32.

    Returns:
        (d,) in the dtype of ``y``.

    Raises:
        ValuesError: ``y`` has another shape than ``groups``, or is not floating point.
    """
    _check(y, groups.shape, "project_transpose: y")
    wide = _wide(y)
    whole = None if explicit_sharding(groups) is None else PartitionSpec(None)
    summed = jnp.zeros(scale.shape, wide).at[groups].add(y.astype(wide), mode="promise_in_bounds", out_sharding=whole)
    return (summed * scale.astype(wide)).astype(y.dtype)


@jax.custom_vjp
def _project(theta_d: Array, groups: Array, scale: Array) -> Array:
    table = theta_d * scale.astype(theta_d.dtype)
    return table.at[groups].get(mode="promise_in_bounds", out_sharding=explicit_sharding(groups))


def _forward(theta_d: Array, groups: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(theta_d, groups, scale), (groups, scale)


def _backward(saved: tuple[Array, Array], y: Array) -> tuple[Array, None, None]:
    return project_transpose(y, *saved), None, None


_project.defvjp(_forward, _backward)


def explicit_sharding(x: Array) -> NamedSharding | None:
    """The sharding that is part of x's type, where its mesh has explicit axes; gathers and scatters must be told it."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check(x: Array, shape: tuple[int, ...], what: str) -> None:
    """What is said of another type, shape or dtype; the text is the core's."""
    if not isinstance(x, jax.Array) or x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
        found = (
            f"{tuple(x.shape)} {x.dtype}" if isinstance(x, jax.Array) else f"a {type(x).__module__}.{type(x).__name__}"
        )
        raise ValuesError(f"{what}: expected shape {tuple(shape)} and a floating-point dtype, got {found}.")
