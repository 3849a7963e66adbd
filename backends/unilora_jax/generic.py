"""All factors from one θ_d by the core's own map, where P is no gather: with its transpose as the gradient where it is
linear, else differentiated as it stands.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from unilora_core import ProjectionSpec
from unilora_jax.gather import Names
from unilora_jax.projection import varying_as

__all__ = ["Mapped", "mapped"]

ENTRIES = 2**22
"""How many numbers of P are held at a time, where P is generated."""

EXACT = lax.Precision.HIGHEST
"""P is the same on every device: a GPU's matrix units would round it to 10 bits."""

Frozen = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Mapped:
    """The function from θ_d to every factor. It is a pytree: the arrays are its leaves, the rest is static.

    Attributes:
        stacks: the names of factors of one shape that are used as one array.
        frozen: what the map keeps beside θ_d.
        origin: (d,) float32, θ_d⁰, for ``start="identity"``.
    """

    spec: ProjectionSpec = field(metadata={"static": True})
    stacks: tuple[Names, ...] = field(metadata={"static": True})
    frozen: Frozen
    origin: Array | None

    def __call__(self, theta_d: Array, _shardings: object = None) -> dict[Names, Array]:
        """Compute the factors (layers, …) of each stack, by its names, in the dtype of ``theta_d``, differentiably.

        On a mesh every device has all of θ_D.
        """
        wide = theta_d.astype(jnp.promote_types(theta_d.dtype, jnp.float32))
        if self.origin is None:
            plain = moved = self._project(wide)
        else:  # both at once: a P that is generated is generated once
            both = jnp.stack([wide, wide - self.origin.astype(wide.dtype)])
            plain, moved = jax.vmap(self._project)(both)
        slices, shapes = self.spec.layout.slices, self.spec.layout.shapes

        def factor(name: str) -> Array:
            theta_D = moved if self.spec.shifted(name) else plain
            return theta_D[slices[name]].reshape(shapes[name]).astype(theta_d.dtype)

        return {names: jnp.stack([factor(name) for name in names]) for names in self.stacks}

    def _project(self, theta_d: Array) -> Array:
        linear = self.spec.map.transpose is not None
        return (_linear if linear else _any)(self.spec, theta_d, self.frozen)


def mapped(spec: ProjectionSpec, stacks: Iterable[Names]) -> Mapped:
    """Prepare the factors of ``spec``, whatever its map."""
    origin = jnp.asarray(spec.init()) if spec.start == "identity" else None  # with "zero", θ_d⁰ is 0
    return Mapped(spec, tuple(stacks), spec.map.frozen(spec, jnp, None), origin)


def _any(spec: ProjectionSpec, theta_d: Array, frozen: Frozen) -> Array:
    """Compute θ_D (D,)."""
    if spec.map.rows is None:
        with jax.numpy_rank_promotion("allow"):  # the core broadcasts, whatever the user's own code may
            return spec.map.project(spec, theta_d, frozen, 0, spec.D)
    n, starts = _blocks(spec)
    product = functools.partial(jnp.matmul, precision=EXACT)
    return lax.map(lambda start: product(_rows(spec, start, n, theta_d), theta_d), starts).reshape(-1)[: spec.D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(spec: ProjectionSpec, theta_d: Array, frozen: Frozen) -> Array:
    return _any(spec, theta_d, frozen)


def _forward(spec: ProjectionSpec, theta_d: Array, frozen: Frozen) -> tuple[Array, Frozen]:
    return _any(spec, theta_d, frozen), frozen


def _backward(spec: ProjectionSpec, frozen: Frozen, y: Array) -> tuple[Array, Any]:
    return _transpose(spec, y, frozen), None


_linear.defvjp(_forward, _backward)


def _transpose(spec: ProjectionSpec, y: Array, frozen: Frozen) -> Array:
    """Compute Pᵀ y (d,)."""
    if spec.map.rows is None:
        assert spec.map.transpose is not None  # see _project
        with jax.numpy_rank_promotion("allow"):
            return spec.map.transpose(spec, y, frozen, 0)
    n, starts = _blocks(spec)
    parts = jnp.pad(y, (0, n * len(starts) - spec.D)).reshape(-1, n)

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        start, part = block
        return total + jnp.matmul(part, _rows(spec, start, n, y), precision=EXACT), None

    return lax.scan(add, varying_as(jnp.zeros(spec.d, y.dtype), [y]), (starts, parts))[0]


def _blocks(spec: ProjectionSpec) -> tuple[int, Array]:
    """Say how many rows of P are generated at a time, and where each block of them begins."""
    n = max(1, min(spec.D, ENTRIES // spec.d))
    return n, jnp.arange(0, spec.D, n, dtype=jnp.int32)


def _rows(spec: ProjectionSpec, start: Array, n: int, like: Array) -> Array:
    """Generate n rows of P; those past the last are multiplied by nothing, or cut off."""
    assert spec.map.rows is not None  # see _any
    return spec.map.rows(spec, start, n, jnp, None).astype(like.dtype)
