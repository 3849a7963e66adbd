"""Grouping: the group g(i) ∈ {0 … d-1} of each position i ∈ {0 … D-1}, an exact function of (seed, D, d, i).

A grouping is part of the file format: what is written here never changes; another algorithm gets another name.
Reasons and statistics are in ``docs/grouping.md``.

Arrays are int32 and wrap on overflow. Only operations are used that mean the same in NumPy, array-api-strict, PyTorch
and JAX, also under ``jit`` and ``torch.compile``: ``+ - * ^ & <<``, ``>>`` followed by a mask, and ``//`` of
non-negative numbers. A position past 2^31 is a pair (segment, offset) whose segment is a Python integer.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from unilora_core._namespace import Array, is_numpy_namespace, standard
from unilora_core.draws import keys, shift, signed, threefry

__all__ = [
    "ALGORITHMS",
    "MAX_D",
    "MAX_d",
    "Permutation",
    "Problem",
    "counts",
    "groups",
    "members",
    "permutation",
    "uniform",
    "wide",
]

MAX_D = 2**48
MAX_d = 2**31

WORD = 2**31
"""The largest length of a segment, so that every offset fits int32."""

BLOCK = 2**16
"""The number of positions that NumPy takes at a time: the temporaries stay in the L2 cache (2 to 3 times faster)."""

SHARE, THREADS = 2**20, 4
"""The positions that each thread takes in turn of a longer slice, and the number of threads; more would wait for
Python's lock."""


Kernel = Callable[[Array], Array]
"""A function from positions in a segment, int32 of any shape, to their groups."""


@dataclass(frozen=True)
class Problem:
    """All that a grouping depends on.

    Attributes:
        first_d: the d that the keys and the segments of ``balanced`` belong to; None for d itself.
    """

    D: int
    d: int
    seed: int
    first_d: int | None = None

    @property
    def keyed_d(self) -> int:
        """The d that keys and segments belong to."""
        return self.d if self.first_d is None else self.first_d


# ---- balanced: g(i) = π(i) mod d, π a keyed permutation of each segment -----------------------------------------

ROUNDS = 8
WINDOW = 2**16


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of {0 … size-1}: an unbalanced Feistel network on Z_a × Z_b, a·b ≥ size.

    Attributes:
        outside: where cycle walking leads from each of the few points {size … a·b-1}.
        before: where it leads from them backwards.
    """

    size: int
    a: int
    b: int
    keys: tuple[int, ...]
    outside: tuple[int, ...] = ()
    before: tuple[int, ...] = ()

    def __call__(self, p: Array, xp: ModuleType, device: object = None) -> Array:
        """Return π(p); p: (n,) int32 in {0 … size-1}."""
        return self._inside(self.network(p), self.outside, xp, device)

    def inverse(self, q: Array, xp: ModuleType, device: object = None) -> Array:
        """Return π⁻¹(q); q: int32 of any shape in {0 … size-1}."""
        return self._inside(self.backwards(q), self.before, xp, device)

    def _inside(self, y: Array, walked: tuple[int, ...], xp: ModuleType, device: object) -> Array:
        """Return where the walk that has come to y ends."""
        if not walked:
            return y
        over = y >= self.size
        ends = xp.asarray(np.asarray(walked, np.int32), device=device)
        return xp.where(over, xp.take(ends, xp.where(over, y - self.size, 0 * y), axis=0), y)

    def network(self, p: Array) -> Array:
        """Apply the Feistel network itself, a permutation of {0 … a·b-1}."""
        left = p // self.b
        right = p - left * self.b
        m, n = self.a, self.b
        for key in self.keys:
            word = _lowbias32(right ^ key)
            word &= 0x3FFFFFFF
            word += left
            left, right = right, _mod(word, m)
            m, n = n, m
        left *= self.b
        left += right
        return left

    def backwards(self, y: Array) -> Array:
        """Apply the inverse of `network`: the same rounds from the last to the first."""
        left = y // self.b
        right = y - left * self.b
        m, n = (self.a, self.b) if len(self.keys) % 2 else (self.b, self.a)
        for key in reversed(self.keys):
            left, right = _mod(right - _mod(_lowbias32(left ^ key) & 0x3FFFFFFF, m) + m, m), left
            m, n = n, m
        return left * self.b + right


def _balanced_segment(problem: Problem) -> int:
    """Return the length of a segment: as many whole rounds of all d groups as fit a word.

    So every segment but the last is exactly balanced. With ``first_d`` they are rounds of that many groups, so that π
    stays what it was; where d is a multiple of it, the groups then differ by at most one in each segment.
    """
    return min(problem.D, WORD // problem.keyed_d * problem.keyed_d)


@functools.lru_cache(maxsize=64)
def permutation(problem: Problem, segment: int) -> Permutation:
    """Return the permutation of one segment of ``balanced``."""
    longest = _balanced_segment(problem)
    size = min(longest, problem.D - segment * longest)
    a, b = _factor(size)
    bare = Permutation(size, a, b, _words("balanced", problem, segment)[:ROUNDS])
    outside, before = (_walked(step, size, a * b) for step in (bare.network, bare.backwards))
    return replace(bare, outside=outside, before=before)


def _walked(step: Kernel, size: int, end: int) -> tuple[int, ...]:
    """Return where a walk by steps leads from each of {size … end-1}."""
    points = step(np.arange(size, end, dtype=np.int32))
    for _ in range(points.size):  # a walk still outside after that is a cycle that no position inside leads to
        if not (over := points >= size).any():
            break
        points[over] = step(points[over])
    return tuple(points.tolist())


def _factor(size: int) -> tuple[int, int]:
    """Return (a, b), a·b ≥ size, a from ⌈√size⌉ upwards: the pair with the fewest points outside, or the first."""
    root = math.isqrt(size - 1) + 1
    a = np.arange(root, min(2 * root, root + WINDOW), dtype=np.int64)
    b = -(-size // a)
    best = int(np.argmin(a * b))
    return int(a[best]), int(b[best])


def _balanced(problem: Problem, segment: int, xp: ModuleType, device: object) -> Kernel:
    pi, d = permutation(problem, segment), problem.d
    if pi.size <= d:
        return lambda p: pi(p, xp, device)
    return lambda p: _mod(pi(p, xp, device), d)


def _balanced_sizes(problem: Problem) -> list[int]:
    """Return the sizes of the segments."""
    whole, rest = divmod(problem.D, length := _balanced_segment(problem))
    return [length] * whole + [rest] * (rest > 0)


def _balanced_counts(problem: Problem, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the sizes of the groups start … stop-1."""
    segments, rest = divmod(problem.D, length := _balanced_segment(problem))
    found = np.zeros((problem.d if stop is None else stop) - start, np.int64)
    for times, size in ((segments, length), (1, rest)):
        least, more = divmod(size, problem.d)
        found += times * least
        found[: max(more - start, 0)] += times
    return found


def wide(D: int, xp: ModuleType) -> Any:
    """Return the integer dtype that holds all positions of a θ_D, and D."""
    return xp.int32 if D < WORD else xp.int64


def members(problem: Problem, start: int, stop: int, xp: ModuleType, device: object = None) -> tuple[Array, Array]:
    """Compute the inverse of ``balanced``: the members of the groups start … stop-1, and where each group begins and
    ends.

    The members of group j are π⁻¹(j + k·d) for k = 0, 1, … in each segment, so nothing is sorted.

    Returns:
        offsets (stop-start+1,) and the positions of one group after those of another: int32, int64 if D ≥ 2^31.
    """
    xp, sizes = standard(xp), _balanced_sizes(problem)
    dtype = wide(problem.D, xp)
    each = _balanced_counts(problem, start, stop)
    offsets = xp.asarray(np.concatenate([[0], np.cumsum(each)]), dtype=dtype, device=device)
    alike = {start, stop, *(size % problem.d for size in sizes if start < size % problem.d < stop)}
    step = max(1, BLOCK // int(each.max(initial=1))) if is_numpy_namespace(xp) else MAX_d
    parts = [
        _grid(problem, sizes, low, min(low + step, last), xp, device)
        for first, last in itertools.pairwise(sorted(alike))
        for low in range(first, last, step)
    ]
    return offsets, xp.concat(parts) if parts else xp.zeros(0, dtype=dtype, device=device)


def _grid(problem: Problem, sizes: list[int], start: int, stop: int, xp: ModuleType, device: object) -> Array:
    """Return the members of groups of which all have equally many in every segment."""
    length, columns, dtype = _balanced_segment(problem), [], wide(problem.D, xp)
    first = xp.reshape(_positions(start, stop - start, xp, device), (-1, 1))
    for segment, size in enumerate(sizes):
        if n := size // problem.d + (start < size % problem.d):
            k = xp.reshape(_positions(0, n, xp, device), (1, -1))
            images = xp.reshape(first + k * problem.d if n > 1 else first, (-1,))
            offset = permutation(problem, segment).inverse(images, xp, device)
            columns.append(xp.reshape(xp.astype(offset, dtype) + segment * length, (-1, n)))
    return xp.reshape(xp.concat(columns, axis=1), (-1,)) if columns else xp.zeros(0, dtype=dtype, device=device)


# ---- iid: g(i) = ⌊u·d / 2^64⌋, u the 64 bits that Threefry-2x32-20 gives for the counter i -----------------------


def _iid_segment(problem: Problem) -> int:
    return min(problem.D, WORD)


def _iid(problem: Problem, segment: int, xp: ModuleType, _device: object) -> Kernel:
    key, d = _words("iid", problem, 0)[:2], problem.d
    return lambda p: _times_shifted(*threefry(key, 0 * p + segment, p), d, xp)


def _times_shifted(high: Array, low: Array, d: int, xp: ModuleType) -> Array:
    """Return ⌊(high·2^32 + low)·d / 2^64⌋ of two unsigned words, d ≤ 2^31."""
    top, middle = _multiply(high, d)
    carried = middle + _multiply(low, d)[0]
    carry = (carried ^ -WORD) < (middle ^ -WORD)  # an unsigned comparison: the 32-bit sum wrapped
    return xp.where(carry, top + 1, top)


def _multiply(word: Array, d: int) -> tuple[Array, Array]:
    """Return the high and the low 32 bits of the unsigned product word·d, d ≤ 2^31, by 16-bit limbs."""
    w1, w0 = shift(word, 16), word & 0xFFFF
    d1, d0 = d >> 16, d & 0xFFFF
    low, cross_w, cross_d = w0 * d0, w1 * d0, w0 * d1
    middle = shift(low, 16) + (cross_w & 0xFFFF) + (cross_d & 0xFFFF)
    high = w1 * d1 + shift(cross_w, 16) + shift(cross_d, 16) + shift(middle, 16)
    return high, (middle << 16) | (low & 0xFFFF)


def _iid_counts(problem: Problem) -> np.ndarray:
    found = np.zeros(problem.d, np.int64)
    for start in range(0, problem.D, 2**24):
        block = groups("iid", problem, start, min(start + 2**24, problem.D), np)
        found += np.bincount(block, minlength=problem.d)
    return found


# ---- numpy-shuffle: what PEFT ≥ 0.20 generates, so that its adapters can be read ----------------------------------


@functools.lru_cache(maxsize=2)
def _shuffled(problem: Problem) -> np.ndarray:
    """Return all D groups: ⌊D/d⌋ of each, some once more at random, shuffled by `numpy.random.Generator.shuffle`."""
    rng = np.random.default_rng(problem.seed)
    least, more = divmod(problem.D, problem.d)
    table = np.repeat(np.arange(problem.d, dtype=np.int32), least)
    if more:
        table = np.concatenate([table, rng.choice(problem.d, size=more, replace=False).astype(np.int32)])
    rng.shuffle(table)
    table.flags.writeable = False
    return table


def _shuffle_segment(problem: Problem) -> int:
    return problem.D


def _numpy_shuffle(problem: Problem, _segment: int, offset: int, n: int, xp: ModuleType, device: object) -> Array:
    return xp.asarray(_shuffled(problem)[offset : offset + n].copy(), device=device)


def _shuffle_counts(problem: Problem) -> np.ndarray:
    return np.bincount(_shuffled(problem), minlength=problem.d)


# ---- the three, and what they share -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    """A grouping as data: its version, and how segments, groups and counts are computed.

    Attributes:
        groups: (problem, segment, offset, n, xp, device) → the groups of n positions of a segment.
        kernel: (problem, segment, xp, device) → the function from positions to groups that a backend may compile; None
            where a table takes its place.
    """

    version: int
    segment: Callable[[Problem], int]
    groups: Callable[[Problem, int, int, int, ModuleType, object], Array]
    counts: Callable[[Problem], np.ndarray]
    kernel: Callable[[Problem, int, ModuleType, object], Kernel] | None = None


def _elementwise(
    kernel: Callable[[Problem, int, ModuleType, object], Kernel],
) -> Callable[[Problem, int, int, int, ModuleType, object], Array]:
    def run(problem: Problem, segment: int, offset: int, n: int, xp: ModuleType, device: object) -> Array:
        return kernel(problem, segment, xp, device)(_positions(offset, n, xp, device))

    return run


ALGORITHMS = {
    "balanced": Algorithm(1, _balanced_segment, _elementwise(_balanced), _balanced_counts, _balanced),
    "iid": Algorithm(1, _iid_segment, _elementwise(_iid), _iid_counts, _iid),
    "numpy-shuffle": Algorithm(1, _shuffle_segment, _numpy_shuffle, _shuffle_counts),
}


def groups(name: str, problem: Problem, start: int, stop: int, xp: ModuleType, device: object = None) -> Array:
    """Return g(start) … g(stop-1): (stop-start,) int32 in the namespace ``xp``."""
    xp = standard(xp)
    algorithm = ALGORITHMS[name]
    length = algorithm.segment(problem)
    if is_numpy_namespace(xp):
        found = np.empty(stop - start, np.int32)

        def fill(first: int) -> None:
            for segment, offset, n in _pieces(first, min(first + SHARE, stop), length, BLOCK):
                at = segment * length + offset - start
                found[at : at + n] = algorithm.groups(problem, segment, offset, n, xp, device)

        _each(fill, range(start, stop, SHARE))
        return found
    parts = [algorithm.groups(problem, *piece, xp, device) for piece in _pieces(start, stop, length, length)]
    return xp.concat(parts) if parts else xp.zeros(0, dtype=xp.int32, device=device)


def uniform(problem: Problem, bound: float) -> np.ndarray:
    """Return U(-bound, bound) at 2^24 equidistant points: (d,) float32, NumPy, from Threefry under a key of its own."""
    key = _words("init", problem, 0)[:2]
    values = np.empty(problem.d, np.float32)

    def fill(first: int) -> None:
        for start in range(first, last := min(first + SHARE, problem.d), BLOCK):
            j = np.arange(start, min(start + BLOCK, last), dtype=np.int32)
            word, _ = threefry(key, 0 * j, j)
            values[start : start + len(j)] = ((shift(word, 8) + 0.5) / 2**23 - 1) * bound

    _each(fill, range(0, problem.d, SHARE))
    return values


def counts(name: str, problem: Problem) -> np.ndarray:
    """Return n_j, how many positions each group has: (d,) int64, NumPy."""
    return ALGORITHMS[name].counts(problem)


def _each(fill: Callable[[int], None], shares: Sequence[int]) -> None:
    """Fill the first share, and with it the caches; then the others on all cores, as NumPy frees Python's lock."""
    for first in shares[:1]:
        fill(first)
    if len(shares) > 1:
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, shares[1:]):  # what fails in a thread is raised here
                pass


def _pieces(start: int, stop: int, segment: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Cut {start … stop-1} into (segment number, offset in it, length), none longer than a block."""
    while start < stop:
        number, offset = divmod(start, segment)
        n = min(stop - start, segment - offset, block)
        yield number, offset, n
        start += n


def _positions(offset: int, n: int, xp: ModuleType, device: object) -> Array:
    return xp.arange(n, dtype=xp.int32, device=device) + offset


def _words(name: str, problem: Problem, segment: int) -> tuple[int, ...]:
    """Return eight int32 keys: the SHA-256 of everything that a segment depends on, read as little-endian words."""
    text = f"unilora/{name}/1 seed={problem.seed} D={problem.D} d={problem.keyed_d} segment={segment}"
    return keys(text)


def _lowbias32(x: Array) -> Array:
    """Apply a bijection of 32-bit words with low avalanche bias (C. Wellons, hash-prospector, "lowbias32")."""
    x = x ^ shift(x, 16)
    x *= 0x7FEB352D
    x ^= shift(x, 15)
    x *= signed(0x846CA68B)
    x ^= shift(x, 16)
    return x


def _mod(x: Array, m: int) -> Array:
    """Return x mod m, x ≥ 0 (NumPy divides by a constant much faster than it takes the remainder)."""
    multiple = x // m
    multiple *= m
    return x - multiple
