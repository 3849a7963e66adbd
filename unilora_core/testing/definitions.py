"""Every map computed from its definition: words drawn one by one in plain Python, matrices multiplied out, loops.

The code is written from ``docs/format.md``, without the core's arithmetic; it is slow, and for small layouts.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from unilora_core.layout import Layout
from unilora_core.spec import ProjectionSpec
from unilora_core.testing.reference import GROUPS, LAYOUT, threefry

__all__ = [
    "FURTHER",
    "by_definition",
    "codebook",
    "codebook_pullback",
    "columns",
    "fastfood",
    "gaussian",
    "matrix",
    "normals",
    "permutations",
    "signs",
    "theta_D",
    "uniform",
    "weights",
    "word",
]

ROWS = Layout([("v.A", (3, 40)), ("q.Bt", (3, 48)), ("q.A", (3, 40)), ("v.Bt", (3, 8))])
"""A layout with D = 408; sub-vectors of 4 or 8 fill each row."""

CODEBOOK: dict[str, Any] = {
    "layout": ROWS,
    "d": 6 * 8 + 51 * 6,
    "options": (("length", 8), ("topk", 3), ("vectors", 6)),
}

FURTHER: dict[str, dict[str, Any]] = {
    "local": {},
    "by-factor": {},
    "unnormalised": {},
    "identity": {"d": LAYOUT.size},
    "fastfood": {},
    "gaussian": {},
    "codebook": CODEBOOK,
}
"""The maps beyond one grouping for all positions → the fields of their spec that differ from `LAYOUT` and d = 50."""


def by_definition(name: str, **fields: Any) -> ProjectionSpec:
    """Make a small spec of this map."""
    usual: dict[str, Any] = {"layout": LAYOUT, "d": 50, "seed": 3, "grouping": name}
    return ProjectionSpec(**usual | FURTHER[name] | fields)


# ---- draws, one by one ----------------------------------------------------------------------------------------------


def word(text: str, i: int) -> int:
    """Return word i under a text: the counters (0, 0), (0, 1) … give two words each."""
    digest = hashlib.sha256(text.encode()).digest()
    k0, k1 = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4))
    return threefry(k0, k1, 0, i // 2)[i % 2]


def uniform(text: str, n: int, bound: float) -> np.ndarray:
    """Draw (n,) float32 from 24 bits each."""
    return np.array([(((word(text, i) >> 8) + 0.5) / 2**23 - 1) * bound for i in range(n)]).astype(np.float32)


def signs(text: str, n: int) -> list[int]:
    """Draw n signs: 1 for an even word, -1 for an odd one."""
    return [1 - 2 * (word(text, i) % 2) for i in range(n)]


def normals(text: str, n: int) -> list[float]:
    """Draw n normal numbers by Box and Muller: two of each pair of words."""
    pairs = [_normal(word(text, i), word(text, i + 1)) for i in range(0, n, 2)]
    return [value for pair in pairs for value in pair][:n]


def permutations(text: str, rows: int, n: int) -> list[list[int]]:
    """Draw a permutation for each row: the positions in the order of their words as signed integers."""
    signed = [(word(text, i) + 2**31) % 2**32 for i in range(rows * n)]
    return [sorted(range(n), key=signed[row * n : (row + 1) * n].__getitem__) for row in range(rows)]


def _normal(first: int, second: int) -> tuple[float, float]:
    u, v = (((x >> 9) + 0.5) / 2**23 for x in (first, second))
    radius = math.sqrt(-2 * math.log(u))
    return radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)


# ---- maps whose rows have one entry ---------------------------------------------------------------------------------


def columns(spec: ProjectionSpec) -> list[int]:
    """Return the column of each row."""
    if spec.grouping == "identity":
        return list(range(spec.D))
    if spec.grouping == "unnormalised":
        return [GROUPS["balanced"](spec.D, spec.d, spec.seed, i) for i in range(spec.D)]
    found = {}
    for k, (names, first, end) in enumerate(_classes(spec)):
        rows = [i for name in names for i in range(spec.layout.slices[name].start, spec.layout.slices[name].stop)]
        digest = hashlib.sha256(f"unilora/class/1 seed={spec.seed} class={k}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        for p, row in enumerate(rows):
            found[row] = first + GROUPS["balanced"](len(rows), end - first, seed, p)
    return [found[row] for row in range(spec.D)]


def weights(spec: ProjectionSpec) -> np.ndarray:
    """Return the entry of each column: (d,) float64."""
    counts = np.bincount(columns(spec), minlength=spec.d)
    return np.ones(spec.d) if spec.grouping == "unnormalised" else 1 / np.sqrt(np.maximum(counts, 1))


def _classes(spec: ProjectionSpec) -> list[tuple[list[str], int, int]]:
    """Return (factors, first column, end) of each class, in order of its first factor."""
    part = {"local": 0, "by-factor": 2}[spec.grouping]
    found: dict[str, list[str]] = {}
    for name in spec.layout.shapes:
        found.setdefault(name.rpartition(".")[part], []).append(name)
    sizes = [sum(math.prod(spec.layout.shapes[name]) for name in names) for names in found.values()]
    shares = sizes if spec.grouping == "local" else list(range(1, len(sizes) + 1))
    ends = [0] + [round(spec.d * sum(shares[: k + 1]) / sum(shares)) for k in range(len(shares))]
    return list(zip(found.values(), ends[:-1], ends[1:], strict=True))


# ---- maps whose rows are dense --------------------------------------------------------------------------------------


def gaussian(spec: ProjectionSpec) -> np.ndarray:
    """Make P: (D, d), N(0, 1/D); the words of row i and columns 2j, 2j + 1 are those of the counter (i, j)."""
    digest = hashlib.sha256(f"unilora/gaussian/1 seed={spec.seed} D={spec.D} d={spec.d}".encode()).digest()
    k0, k1 = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4))
    P = np.zeros((spec.D, spec.d + 1))
    for i in range(spec.D):
        for j in range(0, spec.d, 2):
            P[i, j : j + 2] = _normal(*threefry(k0, k1, i, j // 2))
    return P[:, : spec.d] / math.sqrt(spec.D)


def fastfood(spec: ProjectionSpec) -> np.ndarray:
    """Make P: (D, d), blocks of H·G·Π·H·B one below the other, their first d columns, times √(n/D); H is orthogonal."""
    n = next(2**k for k in range(32) if 2**k >= spec.d)
    blocks = math.ceil(spec.D / n)
    text = f"unilora/fastfood/1 seed={spec.seed} D={spec.D} d={spec.d}"
    B = np.reshape(signs(f"{text} B", blocks * n), (blocks, n))
    G = np.reshape(normals(f"{text} G", blocks * n), (blocks, n))
    orders, H = permutations(f"{text} Pi", blocks, n), np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    H = H / math.sqrt(n)
    made = []
    for b, g, order in zip(B, G, orders, strict=True):
        Pi = np.eye(n)[order]  # row i of Π·x is x[order[i]]
        made.append(H @ np.diag(g / np.sqrt((g**2).mean())) @ Pi @ H @ np.diag(b))
    return np.concatenate(made)[: spec.D, : spec.d] * math.sqrt(n / spec.D)


@functools.lru_cache(maxsize=32)
def matrix(spec: ProjectionSpec) -> np.ndarray:
    """Make P of a linear map: (D, d) float64."""
    if spec.grouping in ("gaussian", "fastfood"):
        return {"gaussian": gaussian, "fastfood": fastfood}[spec.grouping](spec)
    P = np.zeros((spec.D, spec.d))
    P[range(spec.D), columns(spec)] = weights(spec)[columns(spec)]
    return P


# ---- the map that is not linear -------------------------------------------------------------------------------------


def codebook(spec: ProjectionSpec, theta_d: np.ndarray) -> np.ndarray:
    """Compute θ_D: each sub-vector mixes the vectors with the largest logits, weighed by softmax: (D,) float64."""
    return np.concatenate([share @ vectors[best] for best, share, vectors in _mixtures(spec, theta_d)])


def codebook_pullback(spec: ProjectionSpec, theta_d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute the gradient of ⟨θ_D, y⟩, by the derivative of softmax: (d,) float64."""
    count, length = int(spec.chosen["vectors"]), int(spec.chosen["length"])
    of_vectors, of_logits = np.zeros((count, length)), []
    for s, (best, share, vectors) in enumerate(_mixtures(spec, theta_d)):
        part = y[s * length : (s + 1) * length].astype(np.float64)
        along = vectors[best] @ part
        row = np.zeros(count)
        row[best] = share * (along - share @ along)
        of_vectors[best] += np.outer(share, part)
        of_logits.append(row)
    return np.concatenate([of_vectors.reshape(-1), *of_logits])


def _mixtures(spec: ProjectionSpec, theta_d: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield (chosen vectors, their shares, all vectors) of each sub-vector."""
    count, length, topk = (int(spec.chosen[name]) for name in ("vectors", "length", "topk"))
    theta = theta_d.astype(np.float64)
    vectors = theta[: count * length].reshape(count, length)
    for logits in theta[count * length :].reshape(-1, count):
        best = [j for _, j in sorted(zip(-logits, range(count), strict=True))][:topk]
        exp = np.exp(logits[best] - logits.max())
        yield best, exp / exp.sum(), vectors


def theta_D(spec: ProjectionSpec, theta_d: np.ndarray) -> np.ndarray:
    """Compute θ_D of any of these maps, from either start: (D,) float64."""
    if spec.grouping == "codebook":
        return codebook(spec, theta_d)
    P, theta = matrix(spec), theta_d.astype(np.float64)
    found = P @ theta
    if spec.start == "identity":
        moved = P @ (theta - spec.init().astype(np.float64))
        for name, at in spec.layout.slices.items():
            if name.endswith(".B"):
                found[at] = moved[at]
    return found
