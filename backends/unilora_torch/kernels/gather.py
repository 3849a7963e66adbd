"""P and Pᵀ of ``balanced`` on CUDA: a launch each for any number of factors, the groups computed where they are used.

Pᵀ sums over the members of each group, π⁻¹(j + k·d), in the order of k: no atomics, the same bits in every run.
Source of the idea: Mitchell, Stokes, Frank and Holmes (2021), whose bijective shuffle gathers in the same way.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from unilora_core import ProjectionSpec
from unilora_core.grouping import permutation
from unilora_core.maps.gather import problem_of
from unilora_torch.kernels.permutation import backwards, forwards

__all__ = ["Permuted", "permuted", "project", "project_transpose", "tiles"]


BLOCK = 1024
MEMBERS = 64
"""How many members of a group one program sums; of larger groups the sums are added in order."""


@dataclass(frozen=True)
class Permuted:
    """What the kernels know of a grouping.

    Attributes:
        keys, outside, before: int32, as in `unilora_core.grouping.Permutation`, on the device.
    """

    keys: Tensor
    outside: Tensor
    before: Tensor
    a: int
    b: int
    size: int
    d: int


@functools.lru_cache(maxsize=64)
def permuted(spec: ProjectionSpec, device: torch.device) -> Permuted:
    """Make the permutation of a spec whose positions are one segment."""
    pi = permutation(problem_of(spec), 0)
    keys, outside, before = (
        torch.tensor(part, dtype=torch.int32, device=device) for part in (pi.keys, pi.outside, pi.before)
    )
    return Permuted(keys, outside, before, pi.a, pi.b, pi.size, spec.d)


@functools.lru_cache(maxsize=512)
def tiles(spec: ProjectionSpec, spans: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Say what each program of `project` does: (tiles, 4) int32 of first position, how many, where to, what is added.

    No tile crosses a factor; d is added to the groups of those that start at zero.

    Args:
        spans: start and stop of slices of θ_D, which are joined in this order.
    """
    rows, done = [], 0
    for first, last in spans:
        for name, at in spec.layout.slices.items():
            start, stop = max(first, at.start), min(last, at.stop)
            if start < stop:
                begins = np.arange(start, stop, BLOCK)
                shift = np.full_like(begins, spec.d if spec.start == "identity" and spec.shifted(name) else 0)
                rows.append(np.stack([begins, np.minimum(BLOCK, stop - begins), begins - start + done, shift], axis=1))
                done += stop - start
    return torch.from_numpy(np.concatenate(rows).astype(np.int32)).to(device)


def project(table: Tensor, pi: Permuted, programs: Tensor, out: Tensor) -> None:
    """Write table[g(i)] of the positions of all `tiles` into ``out``, in its dtype.

    Args:
        table: (d,) or (2d,) float32, see `unilora_torch.gather.scaled`.
        programs: what `tiles` gives.
        out: (n,) float32, bfloat16 or float16, contiguous.
    """
    many = pi.size > pi.d
    _project[(len(programs),)](
        *(table, out, programs, pi.keys, pi.outside, pi.a, pi.b, pi.size, pi.d),
        WALKS=len(pi.outside) > 0,
        MANY=many,
        BLOCK=BLOCK,
    )


def project_transpose(y: Tensor, pi: Permuted, scale: Tensor) -> Tensor:
    """Compute Pᵀ y of all of θ_D: (d,) float32, summed in float32 in the order of `ProjectionSpec.members`.

    Args:
        y: (D,) float32, bfloat16 or float16, contiguous.
        scale: (d,) float32.
    """
    parts = triton.cdiv(triton.cdiv(pi.size, pi.d), MEMBERS)
    sums, summed = scale.new_empty(parts, pi.d), torch.empty_like(scale)
    blocks = triton.cdiv(pi.d, BLOCK)
    _sum_members[(blocks, parts)](
        *(y, sums, pi.keys, pi.before, pi.a, pi.b, pi.size, pi.d),
        WALKS=len(pi.before) > 0,
        MEMBERS=MEMBERS,
        BLOCK=BLOCK,
    )
    _sum_parts[(blocks,)](sums, scale, summed, parts, pi.d, BLOCK=BLOCK)
    return summed


@triton.jit
def _project(
    table, out, tiles, keys, outside, a, b, size, d, WALKS: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr
):
    tile = tiles + 4 * tl.program_id(0)
    first, count, place, shift = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    i = tl.arange(0, BLOCK)
    inside = i < count
    group = forwards(tl.where(inside, first + i, first), keys, outside, a, b, size, WALKS)
    if MANY:
        group = group % d
    value = tl.load(table + group + shift, mask=inside)
    tl.store(out + place + i, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_members(y, sums, keys, before, a, b, size, d, WALKS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(MEMBERS):
        image = j.to(tl.int64) + (part * MEMBERS + k).to(tl.int64) * d  # past 2^31 where it is masked
        there = (j < d) & (image < size)
        position = backwards(tl.where(there, image, 0).to(tl.int32), keys, before, a, b, size, WALKS)
        total += tl.load(y + position, mask=there, other=0).to(tl.float32)
    tl.store(sums + part.to(tl.int64) * d + j, total, mask=j < d)


@triton.jit
def _sum_parts(sums, scale, summed, parts, d, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    row = sums + j
    for _ in range(parts):
        total += tl.load(row, mask=j < d, other=0)
        row += d
    tl.store(summed + j, total * tl.load(scale + j, mask=j < d), mask=j < d)
