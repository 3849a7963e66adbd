"""All factors of a spec from one θ_d: positions → groups → numbers, a whole bundle of equal shapes at a time.

A kernel per factor would make XLA compile hundreds of copies of it; factors of one shape share one. A group is a
function of its position, so each device computes the groups of the slice that it holds, and nothing is gathered.
"""

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
        sharding: how the array (len(names), *shape) lies on its mesh; None on one device.
    """

    names: tuple[str, ...]
    sharding: NamedSharding | None = None


@dataclass(frozen=True)
class Bundle:
    """Stacks of one size whose groups are computed together, as an array (stacks, layers, rows, columns).

    Attributes:
        starts: where each factor begins in its segment of θ_D: (stacks, layers).
        from_origin: factors B of ``start="identity"``, made of θ_d - θ_d⁰.
        segment: which segment of the grouping all positions lie in; None where a factor crosses its end.
    """

    stacks: tuple[Stack, ...]
    starts: tuple[tuple[int, ...], ...]
    shape: tuple[int, int]
    from_origin: bool
    segment: int | None
    sharding: NamedSharding | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """θ_d → every factor. A pytree: the arrays are its leaves, the rest is static.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰, for ``start="identity"``.
        tables: the groups of each bundle, int32; None for those that are computed inside the compiled step.
    """

    spec: ProjectionSpec = field(metadata={"static": True})
    bundles: tuple[Bundle, ...] = field(metadata={"static": True})
    scale: Array
    origin: Array | None
    tables: tuple[Array | None, ...]

    def __call__(self, theta_d: Array) -> dict[tuple[str, ...], Array]:
        """Names of each stack → (layers, rows, columns) float32, differentiable in ``theta_d``."""
        found = {}
        for bundle, table in zip(self.bundles, self.tables, strict=True):
            groups = _groups(self.spec, bundle) if table is None else table
            moved = theta_d - self.origin if bundle.from_origin else theta_d
            arrays = project(moved, groups, self.scale)
            found |= {stack.names: arrays[i] for i, stack in enumerate(bundle.stacks)}
        return found


def factors_of(spec: ProjectionSpec, stacks: tuple[Stack, ...], groups: Literal["computed", "cached"]) -> Factors:
    """Prepare the factors of ``spec``.

    Args:
        groups: ``"computed"`` in each step, or ``"cached"`` as int32, 4 bytes per LoRA parameter. ``numpy-shuffle`` and
            the rare factor that crosses position 2^31 have no kernel, and are cached in either case.
    """
    bundles = _bundles(spec, stacks)
    kernel = _grouping.ALGORITHMS[spec.grouping].kernel is not None
    tables = tuple(
        None if groups == "computed" and kernel and bundle.segment is not None else _table(spec, bundle, kernel)
        for bundle in bundles
    )
    origin = jnp.asarray(spec.init()) if spec.start == "identity" else None
    return Factors(spec, bundles, jnp.asarray(spec.scale()), origin, tables)


def _bundles(spec: ProjectionSpec, stacks: tuple[Stack, ...]) -> tuple[Bundle, ...]:
    length = _grouping.ALGORITHMS[spec.grouping].segment(_grouping.Problem(spec.D, spec.d, spec.seed))
    alike: dict[tuple, list[Stack]] = {}
    for stack in stacks:
        slices = [spec.layout.slices[name] for name in stack.names]
        segments = {at.start // length for at in slices} | {(at.stop - 1) // length for at in slices}
        segment = segments.pop() if len(segments) == 1 else None
        from_origin = spec.start == "identity" and stack.names[0].endswith(".B")
        key = spec.layout.shapes[stack.names[0]], len(stack.names), from_origin, segment, stack.sharding
        alike.setdefault(key, []).append(stack)
    return tuple(
        Bundle(
            stacks=tuple(members),
            starts=tuple(
                tuple(spec.layout.slices[name].start - (segment or 0) * length for name in stack.names)
                for stack in members
            ),
            shape=shape,
            from_origin=from_origin,
            segment=segment,
            sharding=_behind(sharding),
        )
        for (shape, _, from_origin, segment, sharding), members in alike.items()
    )


def _groups(spec: ProjectionSpec, bundle: Bundle) -> Array:
    """The groups of a bundle, elementwise from their positions: each device makes its own slice."""
    kernel = _grouping.ALGORITHMS[spec.grouping].kernel(
        _grouping.Problem(spec.D, spec.d, spec.seed), bundle.segment, jnp, None
    )
    starts = np.asarray(bundle.starts, np.int32)
    shape = (*starts.shape, *bundle.shape)
    row, column = (constrain(jax.lax.broadcasted_iota(jnp.int32, shape, axis), bundle.sharding) for axis in (2, 3))
    start = jnp.asarray(starts)[:, :, None, None]
    return kernel(start + row * bundle.shape[1] + column)


def _table(spec: ProjectionSpec, bundle: Bundle, kernel: bool) -> Array:
    if kernel and bundle.segment is not None:
        return jax.jit(lambda: _groups(spec, bundle))()
    slices = [[spec.layout.slices[name] for name in stack.names] for stack in bundle.stacks]
    table = np.stack([np.stack([spec.groups(at.start, at.stop) for at in row]) for row in slices])
    table = table.reshape(*table.shape[:2], *bundle.shape)
    return jnp.asarray(table) if bundle.sharding is None else jax.device_put(table, bundle.sharding)


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
