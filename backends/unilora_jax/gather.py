"""All factors from one θ_d where P is a gather: positions → groups → numbers, a bundle of equal shapes at a time.

Most of the time to compile a step would go to hundreds of equal kernels, gathers and scatters, one per factor; those of
one shape are one, cut afterwards. A group is a function of its position alone, so on a mesh each device computes the
groups of the slice that it needs.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from unilora_core import ProjectionSpec
from unilora_core import grouping as _grouping
from unilora_core.maps.gather import problem_of
from unilora_jax.members import preferred, sums, table_of
from unilora_jax.projection import here, project, wide_of

__all__ = ["Gathered", "Names", "Stack", "gathered"]

Names = tuple[str, ...]
Bundle = tuple["Stack", ...]
"""Stacks of one segment that are gathered in one shape: one array (stacks, layers, …), A of some and Bᵀ of others."""


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

    @property
    def lies(self) -> tuple[int, int]:
        """The shape in which a factor is gathered."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def steps(self) -> tuple[int, int]:
        """The distance in θ_D of neighbours along these two axes."""
        return (1, self.shape[1]) if self.transposed else (self.shape[1], 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Gathered:
    """The function from θ_d to every factor. It is a pytree: the arrays are its leaves, the rest is static.

    Attributes:
        scale: (d,) float32, 1/√n_j.
        origin: (d,) float32, θ_d⁰, for ``start="identity"``.
        tables: the groups of each bundle, int32; None where they are computed in each step.
        sums_members: whether the gradient is summed over the members of each group, not scattered.
        members: their positions as `members.table_of` gives them; None where they are computed, or not used.
    """

    spec: ProjectionSpec = field(metadata={"static": True})
    bundles: tuple[Bundle, ...] = field(metadata={"static": True})
    scale: Array
    origin: Array | None
    tables: tuple[Array | None, ...]
    sums_members: bool = field(metadata={"static": True})
    members: Array | None

    def __call__(self, theta_d: Array, shardings: Mapping[Names, NamedSharding] | None = None) -> dict[Names, Array]:
        """Compute the factors (layers, …) of each stack, by its names, in the dtype of ``theta_d``, differentiably.

        Args:
            shardings: of the stacks as they are gathered, on a mesh with explicit axes.
        """
        parts = [part for each in zip(self.bundles, self.tables, strict=True) for part in _laid(*each, shardings or {})]
        groups = [self._groups(*part) for part in parts]
        found: dict[Names, Array] = {}
        if self.sums_members and not shardings:  # else all of y would come to each device
            made = _summed(self.spec, self.bundles, theta_d, groups, self.scale, self.origin, self.members)
        else:
            made = project(theta_d, groups, self.scale, self.origin)
        for (bundle, *_), numbers in zip(parts, made, strict=True):
            found |= {s.names: self._shaped(s, each) for s, each in zip(bundle, jnp.unstack(numbers), strict=True)}
        return found

    def _groups(self, bundle: Bundle, table: Array | None, sharding: NamedSharding | None) -> Array:
        if table is None:
            return _groups(self.spec, bundle, sharding)
        return table if sharding is None else jax.sharding.reshard(table, sharding)

    def _shaped(self, stack: Stack, numbers: Array) -> Array:
        """Give the numbers the shape of the factors; XLA takes the two transposes of B, here and in use, for none."""
        shape = self.spec.layout.shapes[stack.names[0]]
        rows_first = numbers.swapaxes(1, 2) if stack.transposed else numbers
        return rows_first if shape == stack.shape else rows_first.reshape(-1, *shape)


def gathered(
    spec: ProjectionSpec, stacks: Iterable[tuple[Names, bool]], *, cached: bool, sums_members: bool | None = None
) -> Gathered:
    """Prepare the factors of ``spec``, whose map is a gather.

    Args:
        stacks: the factors of each, and whether it is used transposed.
        cached: whether groups are kept as int32, 4 bytes per LoRA parameter. Groupings without a kernel, and the rare
            factor that crosses position 2^31, are cached in either case.
        sums_members: whether the gradient is summed over members; None: where that is better. Not beyond D = 2^31.
    """
    alike: dict[tuple, list[Stack]] = {}
    for stack in (_stack(spec, names, transposed) for names, transposed in stacks):
        alike.setdefault((stack.lies, len(stack.names), stack.segment), []).append(stack)
    bundles, groups = tuple(map(tuple, alike.values())), _groups_of(spec)
    tables = tuple(_table(spec, each, groups) if cached or not _has_kernel(spec, each[0]) else None for each in bundles)
    origin = jnp.asarray(spec.init()) if spec.start == "identity" else None  # with "zero", θ_d⁰ is 0
    if sums_members is None:
        sums_members = preferred(*here(), os.environ.get("XLA_FLAGS", ""))
    sums_members = sums_members and spec.D < _grouping.WORD
    kept = sums_members and (cached or spec.grouping != "balanced")
    members = jnp.asarray(table_of(spec)) if kept else None
    return Gathered(spec, bundles, jnp.asarray(spec.scale()), origin, tables, sums_members, members)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    _spec: ProjectionSpec,
    _bundles: tuple[Bundle, ...],
    theta_d: Array,
    groups: list[Array],
    scale: Array,
    origin: Array | None,
    _members: Array | None,
) -> list[Array]:
    """Compute `project`, the gradient of which is summed over members."""
    return project(theta_d, groups, scale, origin)


def _forward(_spec: ProjectionSpec, _bundles: tuple[Bundle, ...], *inputs: Any) -> tuple[list[Array], tuple]:
    theta_d, groups, scale, origin, members = inputs
    return project(theta_d, groups, scale, origin), (scale, members)


def _backward(spec: ProjectionSpec, bundles: tuple[Bundle, ...], saved: tuple, y: list[Array]) -> tuple:
    scale, members = saved
    wide = wide_of(y[0])
    summed = sums(spec, _joined(spec, bundles, y).astype(wide), members) * scale.astype(wide)
    return summed.astype(y[0].dtype), None, None, None, None


_summed.defvjp(_forward, _backward)


def _joined(spec: ProjectionSpec, bundles: tuple[Bundle, ...], y: list[Array]) -> Array:
    """Join in θ_D's own order what lies as the factors do: (D,)."""
    found: dict[str, Array] = {}
    for bundle, numbers in zip(bundles, y, strict=True):
        for stack, layers in zip(bundle, numbers, strict=True):
            rows_first = layers.swapaxes(1, 2) if stack.transposed else layers
            found |= zip(stack.names, rows_first.reshape(len(stack.names), -1), strict=True)
    return jnp.concatenate([found[name] for name in spec.layout.shapes])


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


def _laid(
    bundle: Bundle, table: Array | None, shardings: Mapping[Names, NamedSharding]
) -> Iterator[tuple[Bundle, Array | None, NamedSharding | None]]:
    """Give the stacks of a bundle that lie alike on an explicit mesh, the table of these, and how it lies."""
    alike: dict[NamedSharding | None, list[int]] = {}
    for i, stack in enumerate(bundle):
        alike.setdefault(shardings.get(stack.names), []).append(i)
    for sharding, mine in alike.items():
        part = table if table is None or len(alike) == 1 else table[np.asarray(mine)]
        yield tuple(bundle[i] for i in mine), part, _behind(sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _groups(spec: ProjectionSpec, bundle: Bundle, sharding: NamedSharding | None) -> Array:
    """Compute the groups of a bundle, elementwise from their positions."""
    like, of_segment = bundle[0], _grouping.ALGORITHMS[spec.grouping].kernel
    assert of_segment is not None  # see _has_kernel
    assert like.segment is not None
    kernel = of_segment(problem_of(spec), like.segment, jnp, None)
    starts = np.asarray([stack.starts for stack in bundle], np.int32)[..., None, None]
    steps = np.asarray([stack.steps for stack in bundle], np.int32).T[..., None, None, None]
    shift = np.asarray([spec.d * stack.from_origin for stack in bundle], np.int32)[:, None, None, None]

    def compute(starts: Array) -> Array:
        shape = (*starts.shape[:2], *like.lies)
        first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
        return kernel(starts + first * steps[0] + second * steps[1]) + shift

    return compute(starts) if sharding is None else jax.sharding.auto_axes(compute, out_sharding=sharding)(starts)


def _groups_of(spec: ProjectionSpec) -> Callable[[slice], np.ndarray]:
    """Return what computes the groups of a slice; all at once where one slice is about as much work as all."""
    if spec.grouping in _grouping.ALGORITHMS:
        return lambda at: spec.groups(at.start, at.stop)
    return spec.groups().__getitem__


def _table(spec: ProjectionSpec, bundle: Bundle, groups: Callable[[slice], np.ndarray]) -> Array:
    """Compute the groups of a bundle on the host: nothing has to be compiled for them."""

    def of_stack(stack: Stack) -> np.ndarray:
        table = np.stack([groups(spec.layout.slices[name]).reshape(stack.shape) for name in stack.names])
        return (table.swapaxes(1, 2) if stack.transposed else table) + np.int32(spec.d * stack.from_origin)

    return jnp.asarray(np.stack([of_stack(stack) for stack in bundle]))


def _has_kernel(spec: ProjectionSpec, stack: Stack) -> bool:
    algorithm = _grouping.ALGORITHMS.get(spec.grouping)
    return stack.segment is not None and algorithm is not None and algorithm.kernel is not None


def _behind(sharding: NamedSharding | None) -> NamedSharding | None:
    """Return the sharding of an array with one more axis in front."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
