"""All factors of a spec from one θ_d: positions → groups → numbers, a whole bundle of equal shapes at a time.

A kernel per factor would make XLA compile hundreds of copies of it; factors of one shape share one. A group is a
function of its position alone, so on a mesh each device computes the groups of the slice that it needs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from unilora_core import ProjectionSpec
from unilora_core import grouping as _grouping
from unilora_jax.projection import project

__all__ = ["Factors", "Stack", "factors_of"]

Names = tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """Factors of one shape that are used as one array: those of all layers of a stacked weight, or just one.

    Attributes:
        names: of the factors, as in the layout; one for each layer.
        starts: where each begins in its segment of θ_D.
        shape: rows and columns, as in the layout.
        transposed: whether the array is (layers, columns, rows): Bᵀ is gathered as it is used, and never copied.
        from_origin: factors B of ``start="identity"``, made of θ_d - θ_d⁰.
        segment: of the grouping, which all positions lie in; None where a factor crosses its end.
    """

    names: Names
    starts: tuple[int, ...]
    shape: tuple[int, int]
    transposed: bool
    from_origin: bool
    segment: int | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """θ_d → every factor. A pytree: the arrays are its leaves, the rest is static.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰, for ``start="identity"``.
        tables: the groups of each stack, int32; None where they are computed in each step.
    """

    spec: ProjectionSpec = field(metadata={"static": True})
    stacks: tuple[Stack, ...] = field(metadata={"static": True})
    scale: Array
    origin: Array | None
    tables: tuple[Array | None, ...]

    def __call__(self, theta_d: Array, shardings: Sequence[NamedSharding | None] | None = None) -> dict[Names, Array]:
        """Names of each stack → its array, in the dtype of ``theta_d`` and differentiable in it.

        Args:
            shardings: of each stack's array, on a mesh with explicit axes.
        """
        groups: dict[Names, Array] = {}
        alike: dict[tuple, list[Stack]] = {}
        for stack, table, sharding in zip(
            self.stacks, self.tables, shardings or [None] * len(self.stacks), strict=True
        ):
            if table is None:
                key = stack.shape, len(stack.names), stack.transposed, stack.from_origin, stack.segment, sharding
                alike.setdefault(key, []).append(stack)
            else:
                groups[stack.names] = table if sharding is None else jax.sharding.reshard(table, sharding)
        for (*_, sharding), stacks in alike.items():
            computed = _groups(
                self.spec, stacks[0], _behind(sharding), np.asarray([s.starts for s in stacks], np.int32)
            )
            groups |= {stack.names: computed[i] for i, stack in enumerate(stacks)}
        return project(theta_d, groups, self.scale, self.origin)


def factors_of(spec: ProjectionSpec, names: Sequence[tuple[Names, bool]], *, cached: bool) -> Factors:
    """Prepare the factors of ``spec``.

    Args:
        names: the factors of each stack, and whether it is transposed.
        cached: whether groups are kept as int32, 4 bytes per LoRA parameter. ``numpy-shuffle`` and the rare factor that
            crosses position 2^31 have no kernel, and are cached in either case.
    """
    stacks = tuple(_stack(spec, factors, transposed) for factors, transposed in names)
    tables = tuple(_table(spec, stack) if cached or not _has_kernel(spec, stack) else None for stack in stacks)
    origin = jnp.asarray(spec.init()) if spec.start == "identity" else None
    return Factors(spec, stacks, jnp.asarray(spec.scale()), origin, tables)


def _stack(spec: ProjectionSpec, names: Names, transposed: bool) -> Stack:
    slices = [spec.layout.slices[name] for name in names]
    length = _grouping.ALGORITHMS[spec.grouping].segment(_problem(spec))
    segments = {at.start // length for at in slices} | {(at.stop - 1) // length for at in slices}
    segment = segments.pop() if len(segments) == 1 else None
    starts = tuple(at.start - (segment or 0) * length for at in slices)
    from_origin = spec.start == "identity" and names[0].endswith(".B")
    rows, columns = spec.layout.shapes[names[0]]
    return Stack(names, starts, (rows, columns), transposed, from_origin, segment)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _groups(spec: ProjectionSpec, like: Stack, sharding: NamedSharding | None, starts: Array) -> Array:
    """The groups of several stacks ``like`` one, (stacks, layers, …), elementwise from their positions."""
    of_segment = _grouping.ALGORITHMS[spec.grouping].kernel
    assert of_segment is not None  # see _has_kernel
    assert like.segment is not None
    kernel = of_segment(_problem(spec), like.segment, jnp, None)
    shape = (*starts.shape, *(like.shape[::-1] if like.transposed else like.shape))

    def compute(starts: Array) -> Array:
        first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
        row, column = (second, first) if like.transposed else (first, second)
        return kernel(starts[:, :, None, None] + row * like.shape[1] + column) + spec.d * like.from_origin

    if sharding is None:
        return compute(starts)
    return jax.sharding.auto_axes(compute, out_sharding=sharding)(starts)


def _table(spec: ProjectionSpec, stack: Stack) -> Array:
    """The groups of one stack, made on the host: nothing has to be compiled for them."""
    slices = [spec.layout.slices[name] for name in stack.names]
    table = np.stack([spec.groups(at.start, at.stop).reshape(stack.shape) for at in slices])
    return jnp.asarray((table.swapaxes(1, 2) if stack.transposed else table) + np.int32(spec.d * stack.from_origin))


def _has_kernel(spec: ProjectionSpec, stack: Stack) -> bool:
    return stack.segment is not None and _grouping.ALGORITHMS[spec.grouping].kernel is not None


def _problem(spec: ProjectionSpec) -> _grouping.Problem:
    return _grouping.Problem(spec.D, spec.d, spec.seed)


def _behind(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of an array with one more axis in front."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
