"""All factors from one θ_d where P is a gather: positions → groups → numbers, a bundle of equal shapes at a time.

A kernel per factor would make XLA compile hundreds of copies of it; factors of one shape share one. A group is a
function of its position alone, so on a mesh each device computes the groups of the slice that it needs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from unilora_core import ProjectionSpec
from unilora_core import grouping as _grouping
from unilora_core.maps.gather import problem_of
from unilora_jax.projection import project

__all__ = ["Gathered", "Names", "Stack", "gathered"]

Names = tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """Factors of one shape that are used as one array: those of all layers of a stacked weight, or just one.

    Attributes:
        names: of the factors, as in the layout; one for each layer.
        starts: where each begins in its segment of θ_D.
        shape: rows and columns, as in the layout; a vector is one row.
        transposed: whether it is gathered as (layers, columns, rows), as B is used, and never copied.
        from_origin: factors that start at zero with ``start="identity"``, made of θ_d - θ_d⁰.
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
class Gathered:
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

    def __call__(self, theta_d: Array, shardings: Mapping[Names, NamedSharding] | None = None) -> dict[Names, Array]:
        """Names of each stack → its factors (layers, …), in the dtype of ``theta_d`` and differentiable in it.

        Args:
            shardings: of the stacks as they are gathered, on a mesh with explicit axes.
        """
        numbers = project(theta_d, self._all_groups(shardings or {}), self.scale, self.origin)
        return {stack.names: self._shaped(stack, numbers[stack.names]) for stack in self.stacks}

    def _all_groups(self, shardings: Mapping[Names, NamedSharding]) -> dict[Names, Array]:
        groups: dict[Names, Array] = {}
        alike: dict[tuple, list[Stack]] = {}
        for stack, table in zip(self.stacks, self.tables, strict=True):
            sharding = shardings.get(stack.names)
            if table is None:
                key = stack.shape, len(stack.names), stack.transposed, stack.from_origin, stack.segment, sharding
                alike.setdefault(key, []).append(stack)
            else:
                groups[stack.names] = table if sharding is None else jax.sharding.reshard(table, sharding)
        for (*_, sharding), stacks in alike.items():
            starts = np.asarray([stack.starts for stack in stacks], np.int32)
            computed = _groups(self.spec, stacks[0], _behind(sharding), starts)
            groups |= {stack.names: computed[i] for i, stack in enumerate(stacks)}
        return groups

    def _shaped(self, stack: Stack, numbers: Array) -> Array:
        """With the factors' own shape; XLA takes the two transposes of B, here and where it is used, for none."""
        shape = self.spec.layout.shapes[stack.names[0]]
        rows_first = numbers.swapaxes(1, 2) if stack.transposed else numbers
        return rows_first if shape == stack.shape else rows_first.reshape(-1, *shape)


def gathered(spec: ProjectionSpec, stacks: Iterable[tuple[Names, bool]], *, cached: bool) -> Gathered:
    """Prepare the factors of ``spec``, whose map is a gather.

    Args:
        stacks: the factors of each, and whether it is used transposed.
        cached: whether groups are kept as int32, 4 bytes per LoRA parameter. Groupings without a kernel, and the rare
            factor that crosses position 2^31, are cached in either case.
    """
    made = tuple(_stack(spec, names, transposed) for names, transposed in stacks)
    groups = _groups_of(spec)
    tables = tuple(_table(spec, stack, groups) if cached or not _has_kernel(spec, stack) else None for stack in made)
    origin = jnp.asarray(spec.init()) if spec.start == "identity" else None  # with "zero", θ_d⁰ is 0
    return Gathered(spec, made, jnp.asarray(spec.scale()), origin, tables)


def _stack(spec: ProjectionSpec, names: Names, transposed: bool) -> Stack:
    slices = [spec.layout.slices[name] for name in names]
    algorithm = _grouping.ALGORITHMS.get(spec.grouping)
    length = spec.D if algorithm is None else algorithm.segment(problem_of(spec))
    segments = {at.start // length for at in slices} | {(at.stop - 1) // length for at in slices}
    segment = segments.pop() if len(segments) == 1 else None
    starts = tuple(at.start - (segment or 0) * length for at in slices)
    *rows, columns = spec.layout.shapes[names[0]]
    from_origin = spec.start == "identity" and spec.shifted(names[0])
    return Stack(names, starts, (math.prod(rows), columns), transposed, from_origin, segment)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _groups(spec: ProjectionSpec, like: Stack, sharding: NamedSharding | None, starts: Array) -> Array:
    """The groups of several stacks ``like`` one, (stacks, layers, …), elementwise from their positions."""
    of_segment = _grouping.ALGORITHMS[spec.grouping].kernel
    assert of_segment is not None  # see _has_kernel
    assert like.segment is not None
    kernel = of_segment(problem_of(spec), like.segment, jnp, None)
    shape = (*starts.shape, *(like.shape[::-1] if like.transposed else like.shape))

    def compute(starts: Array) -> Array:
        first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
        row, column = (second, first) if like.transposed else (first, second)
        return kernel(starts[:, :, None, None] + row * like.shape[1] + column) + spec.d * like.from_origin

    if sharding is None:
        return compute(starts)
    return jax.sharding.auto_axes(compute, out_sharding=sharding)(starts)


def _groups_of(spec: ProjectionSpec) -> Callable[[slice], np.ndarray]:
    """The groups of a slice; all at once where one slice is about as much work as all."""
    if spec.grouping in _grouping.ALGORITHMS:
        return lambda at: spec.groups(at.start, at.stop)
    return spec.groups().__getitem__


def _table(spec: ProjectionSpec, stack: Stack, groups: Callable[[slice], np.ndarray]) -> Array:
    """The groups of one stack, made on the host: nothing has to be compiled for them."""
    table = np.stack([groups(spec.layout.slices[name]).reshape(stack.shape) for name in stack.names])
    return jnp.asarray((table.swapaxes(1, 2) if stack.transposed else table) + np.int32(spec.d * stack.from_origin))


def _has_kernel(spec: ProjectionSpec, stack: Stack) -> bool:
    algorithm = _grouping.ALGORITHMS.get(spec.grouping)
    return stack.segment is not None and algorithm is not None and algorithm.kernel is not None


def _behind(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of an array with one more axis in front."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
