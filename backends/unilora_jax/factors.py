"""All factors of a spec from one θ_d: positions → groups → numbers, a whole bundle of equal shapes at a time.

A kernel per factor would make XLA compile hundreds of copies of it; factors of one shape share one. A group is a
function of its position, so each device computes the groups of the slice that it holds, and nothing is gathered.
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unilora_core import ProjectionSpec
from unilora_core import grouping as _grouping
from unilora_jax.projection import project

__all__ = ["Factors", "Stack"]


@dataclass(frozen=True)
class Stack:
    """Factors of one shape that are used as one array: those of all layers of a stacked weight, or just one.

    Attributes:
        names: of the factors, as in the layout; one for each layer.
        transposed: whether the array holds the transposes (Bᵀ is gathered as it is used: no copy of it is made).
        sharding: how the array (layers, rows, columns) lies on its mesh; None on one device.
    """

    names: tuple[str, ...]
    transposed: bool = False
    sharding: NamedSharding | None = None


@dataclass(frozen=True)
class Bundle:
    """Stacks of one size whose groups are computed together, as an array (stacks, layers, …).

    Attributes:
        shape: rows and columns of the factors in the layout.
        transposed: whether the array is (stacks, layers, columns, rows).
        from_origin: factors B of ``start="identity"``, made of θ_d - θ_d⁰.
        segment: which segment of the grouping all positions lie in; None where a factor crosses its end.
        cached: whether the groups are stored.
    """

    stacks: tuple[Stack, ...]
    shape: tuple[int, int]
    transposed: bool
    from_origin: bool
    segment: int | None
    cached: bool
    sharding: NamedSharding | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """θ_d → every factor. A pytree: the arrays are its leaves, the rest is static.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰, for ``start="identity"``.
        recipes: of each bundle, int32: where its factors begin in their segment of θ_D (stacks, layers); or its groups.
    """

    spec: ProjectionSpec = field(metadata={"static": True})
    bundles: tuple[Bundle, ...] = field(metadata={"static": True})
    scale: Array
    origin: Array | None
    recipes: tuple[Array, ...]

    def __call__(self, theta_d: Array) -> dict[tuple[str, ...], Array]:
        """Names of each stack → (layers, rows, columns), or transposed; differentiable in ``theta_d``."""
        groups = {}
        for bundle, recipe in zip(self.bundles, self.recipes, strict=True):
            table = recipe if bundle.cached else _groups(self.spec, bundle, recipe)
            groups |= {stack.names: table[i] for i, stack in enumerate(bundle.stacks)}
        return project(theta_d, groups, self.scale, self.origin)


def factors_of(spec: ProjectionSpec, stacks: tuple[Stack, ...], groups: Literal["computed", "cached"]) -> Factors:
    """Prepare the factors of ``spec``.

    Args:
        groups: ``"computed"`` in each step, or ``"cached"`` as int32, 4 bytes per LoRA parameter. ``numpy-shuffle`` and
            the rare factor that crosses position 2^31 have no kernel, and are cached in either case.
    """
    bundles = _bundles(spec, stacks, cached=groups == "cached")
    recipes = tuple(_table(spec, bundle) if bundle.cached else _starts(spec, bundle) for bundle in bundles)
    origin = jnp.asarray(spec.init()) if spec.start == "identity" else None
    return Factors(spec, bundles, jnp.asarray(spec.scale()), origin, recipes)


def _bundles(spec: ProjectionSpec, stacks: tuple[Stack, ...], cached: bool) -> tuple[Bundle, ...]:
    length, kernel = _segment(spec), _grouping.ALGORITHMS[spec.grouping].kernel
    alike: dict[tuple, list[Stack]] = {}
    for stack in stacks:
        slices = [spec.layout.slices[name] for name in stack.names]
        segments = {at.start // length for at in slices} | {(at.stop - 1) // length for at in slices}
        segment = segments.pop() if len(segments) == 1 else None
        from_origin = spec.start == "identity" and stack.names[0].endswith(".B")
        shape = spec.layout.shapes[stack.names[0]]
        key = shape, len(stack.names), stack.transposed, from_origin, segment, stack.sharding
        alike.setdefault(key, []).append(stack)
    return tuple(
        Bundle(
            stacks=tuple(members),
            shape=shape,
            transposed=transposed,
            from_origin=from_origin,
            segment=segment,
            cached=cached or kernel is None or segment is None,
            sharding=_behind(sharding),
        )
        for (shape, _, transposed, from_origin, segment, sharding), members in alike.items()
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _groups(spec: ProjectionSpec, bundle: Bundle, starts: Array) -> Array:
    """The groups of a bundle, elementwise from their positions: each device makes its own slice."""
    kernel = _grouping.ALGORITHMS[spec.grouping].kernel(_problem(spec), bundle.segment, jnp, None)
    shape = (*starts.shape, *(bundle.shape[::-1] if bundle.transposed else bundle.shape))
    first, second = (constrain(jax.lax.broadcasted_iota(jnp.int32, shape, axis), bundle.sharding) for axis in (2, 3))
    row, column = (second, first) if bundle.transposed else (first, second)
    return kernel(starts[:, :, None, None] + row * bundle.shape[1] + column) + spec.d * bundle.from_origin


def _starts(spec: ProjectionSpec, bundle: Bundle) -> Array:
    first = (bundle.segment or 0) * _segment(spec)
    starts = [[spec.layout.slices[name].start - first for name in stack.names] for stack in bundle.stacks]
    return jnp.asarray(np.asarray(starts, np.int32))


def _table(spec: ProjectionSpec, bundle: Bundle) -> Array:
    if bundle.segment is not None and _grouping.ALGORITHMS[spec.grouping].kernel is not None:
        return _groups(spec, bundle, _starts(spec, bundle))
    slices = [[spec.layout.slices[name] for name in stack.names] for stack in bundle.stacks]
    table = np.stack([np.stack([spec.groups(at.start, at.stop) for at in row]) for row in slices])
    table = table.reshape(*table.shape[:2], *bundle.shape) + np.int32(spec.d * bundle.from_origin)
    table = table.swapaxes(2, 3) if bundle.transposed else table
    return jnp.asarray(table) if bundle.sharding is None else jax.device_put(table, bundle.sharding)


def _problem(spec: ProjectionSpec) -> _grouping.Problem:
    return _grouping.Problem(spec.D, spec.d, spec.seed)


def _segment(spec: ProjectionSpec) -> int:
    return _grouping.ALGORITHMS[spec.grouping].segment(_problem(spec))


def _behind(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of an array with one more axis in front."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def constrain(x: Array, sharding: NamedSharding | None) -> Array:
    """Lay x out as ``sharding`` says, in either sharding mode of JAX."""
    if sharding is None:
        return x
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)
