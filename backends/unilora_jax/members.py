"""Pᵀ without a scatter: a gather of the members of each group, and their sum in a fixed order.

Members are summed 64 at a time, one after the other, then those sums, as the kernels of unilora_torch do it: the bits
are the same on every device.
"""

import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from unilora_core import ProjectionSpec
from unilora_core import grouping as _grouping
from unilora_core.maps.gather import problem_of
from unilora_jax.projection import slow_scatter, varying_as

__all__ = ["preferred", "sums", "table_of"]

TOGETHER = 64
"""How many members of a group are summed one after the other; of larger groups the sums are added in order."""

DETERMINISTIC = re.compile(r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)")
"""The flags under which a scatter is a loop over positions (jax #17844)."""

Places = Callable[[Array], Array]
"""The function from k (n, 1) to the positions of the members k of each group: (n, d) int32, D where there is none."""


def preferred(platform: str, version: str, flags: str) -> bool:
    """Say whether Pᵀ is summed over members there: on CUDA, where the scatter is slow, or has to be deterministic.

    Elsewhere the scatter wins: it reads y as it lies, and a gather of members reads it all over.

    Args:
        platform, version: as `unilora_jax.projection.here` says them.
        flags: ``XLA_FLAGS``.
    """
    return platform == "cuda" and bool(slow_scatter(platform, version) or DETERMINISTIC.search(flags))


def sums(spec: ProjectionSpec, y: Array, table: Array | None) -> Array:
    """Sum y over each group: (d,) in the dtype of ``y``, (D,).

    Args:
        table: what `table_of` gives; None for ``balanced`` of one segment, whose members are computed.
    """
    if table is None:
        most, places = -(-spec.D // spec.d), _computed(spec)
    else:
        most, places = len(table), lambda k: table.at[k[:, 0]].get(mode="fill", fill_value=spec.D)
    first = TOGETHER * jnp.arange(-(-most // TOGETHER), dtype=jnp.int32)[:, None]

    def add(k: Array, total: Array) -> Array:
        return total + y.at[places(first + jnp.int32(k))].get(mode="fill", fill_value=0)

    def join(part: Array, total: Array) -> Array:
        return total + parts[part]

    parts = varying_as(jnp.zeros((len(first), spec.d), y.dtype), [y])
    parts = lax.fori_loop(0, min(most, TOGETHER), add, parts)
    return lax.fori_loop(0, len(first), join, jnp.zeros_like(parts[0]))


def table_of(spec: ProjectionSpec) -> np.ndarray:
    """List the positions of each group, (most, d) int32; D where a group has fewer."""
    offsets, positions = spec.members()
    counts = np.diff(offsets)
    table = np.full((counts.max(), spec.d), spec.D, np.int32)
    table[np.arange(spec.D) - np.repeat(offsets[:-1], counts), np.repeat(np.arange(spec.d), counts)] = positions
    return table


def _computed(spec: ProjectionSpec) -> Places:
    """Compute π⁻¹(j + k·d); a k beyond the last may not fit 32 bits times d, and is told by itself."""
    pi, (least, more) = _grouping.permutation(problem_of(spec), 0), divmod(spec.D, spec.d)
    j = jnp.arange(spec.d, dtype=jnp.int32)[None]

    def places(k: Array) -> Array:
        there = k < least + (j < more)
        return jnp.where(there, pi.inverse(jnp.where(there, j + k * spec.d, 0), jnp), spec.D)

    return places
