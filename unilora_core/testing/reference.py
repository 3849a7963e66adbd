"""The references: plain Python integers for the groups, and the definition in NumPy for the projection.

They are written from ``docs/format.md``, without the core's arithmetic.
"""

import functools
import hashlib
import itertools
import math

import numpy as np
from hypothesis import strategies as st

from unilora_core import Layout, ProjectionSpec

__all__ = [
    "AWKWARD",
    "GROUPS",
    "LAYOUT",
    "SEEDS",
    "dense",
    "flat",
    "gathered",
    "image",
    "init",
    "lowbias32",
    "normal",
    "problems",
    "threefry",
    "transposed",
    "vector",
]

AWKWARD = [
    (7, 3),
    (2**31 - 1, 2**31 - 1),
    (2**31 - 1, 2**16),
    (2**31, 2**31),
    (2**31, 2**31 - 1),
    (2**31 + 1, 2**31),
    (2**31 + 1, 2**30 + 1),
    (2**32 + 5, 4096),
    (2**48, 2**31),
    (2**48, 3),
]
"""Pairs (D, d) around the borders of 32-bit words, primes and powers of two among them."""

LAYOUT = Layout([("v.A", (3, 40)), ("q.B", (50, 3)), ("q.A", (3, 40)), ("v.B", (7, 3))])
"""A layout with D = 411, in an order that is natural neither by name nor by size."""


def flat(D: int, d: int, **fields) -> ProjectionSpec:
    """Make a spec whose layout is one factor ``m.A`` of D numbers."""
    return ProjectionSpec(Layout([("m.A", (D,))]), d, **fields)


SEEDS = st.integers(0, 2**64 - 1) | st.integers(2**63, 2**64 - 1)
"""The seeds; half of them need all 64 bits."""


@st.composite
def problems(draw, largest: int = 2**48) -> tuple[int, int, int]:
    """Draw (D, d, seed): D of any magnitude or as large as it may be, and d likewise."""
    any_magnitude = st.integers(0, largest.bit_length() - 1).flatmap(lambda bits: st.integers(1, 2**bits))
    D = draw(any_magnitude | st.integers(largest // 2, largest))
    top = min(D, 2**31)
    d = draw(st.integers(0, 31).flatmap(lambda bits: st.integers(1, min(D, 2**bits))) | st.integers(-(-top // 2), top))
    return D, d, draw(SEEDS)


# ---- groups, position by position ---------------------------------------------------------------------------------


def lowbias32(x: int) -> int:
    """Return the hash of a 32-bit word."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def threefry(k0: int, k1: int, x0: int, x1: int) -> tuple[int, int]:
    """Compute Threefry-2x32 with 20 rounds, of 32-bit words."""
    keys = [k0, k1, 0x1BD11BDA ^ k0 ^ k1]
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    x0, x1 = (x0 + k0) % 2**32, (x1 + k1) % 2**32
    for step in range(20):
        r = rotations[step % 8]
        x0 = (x0 + x1) % 2**32
        x1 = ((x1 << r) % 2**32 | x1 >> (32 - r)) ^ x0
        if step % 4 == 3:
            j = step // 4 + 1
            x0, x1 = (x0 + keys[j % 3]) % 2**32, (x1 + keys[(j + 1) % 3] + j) % 2**32
    return x0, x1


def _balanced(D: int, d: int, seed: int, i: int) -> int:
    return image(D, d, seed, i)[1] % d


def image(D: int, d: int, seed: int, i: int) -> tuple[int, int]:
    """Return the segment of position i, and where the permutation of ``balanced`` takes it there."""
    longest = min(D, 2**31 // d * d)
    segment, p = i // longest, i % longest
    size = min(longest, D - segment * longest)
    a, b = _sides(size)
    keys = _words("balanced", D, d, seed, segment)
    while True:
        left, right, m, n = p // b, p % b, a, b
        for key in keys:
            left, right = right, (left + lowbias32(right ^ key) % 2**30) % m
            m, n = n, m
        p = left * b + right
        if p < size:
            return segment, p


def _iid(D: int, d: int, seed: int, i: int) -> int:
    k0, k1 = _words("iid", D, d, seed)[:2]
    high, low = threefry(k0, k1, i // 2**31, i % 2**31)
    return (high * 2**32 + low) * d // 2**64


GROUPS = {"balanced": _balanced, "iid": _iid}
"""The reference for each grouping: (D, d, seed, i) → g(i)."""


def init(D: int, d: int, seed: int, bound: float, j: int) -> np.float32:
    """Draw θ_d⁰[j]."""
    k0, k1 = _words("init", D, d, seed)[:2]
    word, _ = threefry(k0, k1, 0, j)
    return np.float32((((word >> 8) + 0.5) / 2**23 - 1) * bound)


def _words(name: str, D: int, d: int, seed: int, segment: int = 0) -> list[int]:
    text = f"unilora/{name}/1 seed={seed} D={D} d={d} segment={segment}"
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]


@functools.cache
def _sides(size: int) -> tuple[int, int]:
    """Return (a, b): every a from ⌈√size⌉ to twice that (65536 of them at most) is tried one by one."""
    root = next(r for r in itertools.count(math.isqrt(size)) if r * r >= size)
    candidates = range(root, max(root + 1, min(2 * root, root + 65536)))
    return min(((a, math.ceil(size / a)) for a in candidates), key=lambda pair: pair[0] * pair[1])


# ---- the projection, by its definition ----------------------------------------------------------------------------


def normal(size: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Draw (size,) standard normal numbers, the same each time."""
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def dense(spec: ProjectionSpec) -> np.ndarray:
    """Make P row by row: (D, d) float64."""
    rows = spec.groups().tolist()
    P = np.zeros((spec.D, spec.d))
    for i, group in enumerate(rows):
        P[i, group] = 1 / np.sqrt(rows.count(group))
    return P


def vector(spec: ProjectionSpec, theta_d: np.ndarray) -> np.ndarray:
    """Compute θ_D, each operation rounded to the dtype of θ_d: (D,), the bits that float32 must have."""
    groups = np.arange(spec.D) if spec.grouping == "identity" else spec.groups()
    return gathered(spec, theta_d, groups, _scale(spec, groups))


def gathered(spec: ProjectionSpec, theta_d: np.ndarray, groups: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Compute the same from the column of each row, and the scale of each column in float64."""
    scale = scale.astype(theta_d.dtype)
    theta_D = (theta_d * scale)[groups]
    if spec.start == "identity":
        moved = (theta_d - spec.init()) * scale
        for name, at in spec.layout.slices.items():
            if name.endswith(".B"):
                theta_D[at] = moved[groups[at]]
    return theta_D


def transposed(spec: ProjectionSpec, y: np.ndarray) -> np.ndarray:
    """Compute Pᵀ y: (d,) float64."""
    groups = spec.groups()
    return np.bincount(groups, y, minlength=spec.d) * _scale(spec, groups)


def _scale(spec: ProjectionSpec, groups: np.ndarray) -> np.ndarray:
    if spec.grouping == "unnormalised":
        return np.ones(spec.d)
    return 1 / np.sqrt(np.maximum(np.bincount(groups, minlength=spec.d), 1))
