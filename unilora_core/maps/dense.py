"""Maps whose rows have d entries: Gaussian, and Fastfood, which multiplies by H·G·Π·H·B in O(D log d).

Both keep distances on average, not exactly: E[PᵀP] = I_d.
"""

import math
from types import ModuleType

import numpy as np

from unilora_core import draws
from unilora_core._namespace import Array, array_namespace, device, standard
from unilora_core.errors import SpecError
from unilora_core.maps.gather import sixteenth, theta_rate
from unilora_core.maps.mapping import Frozen, Instance, Map
from unilora_core.schema import shown

__all__ = ["FASTFOOD", "GAUSSIAN", "hadamard"]

MOST = 2**31
ENTRIES = 2**19
"""The number of entries of a Gaussian P that are made at a time."""


def _check(of: Instance) -> None:
    if of.D > MOST:
        raise SpecError(f"ProjectionSpec: a dense P is for D up to 2^31, got {of.D}; take the grouping 'balanced'.")
    if not 1 <= of.d <= of.D:
        raise SpecError(f"ProjectionSpec: expected 1 ≤ d ≤ D, got d = {shown(of.d)} with D = {of.D}.")


# ---- Gaussian: P_ij ~ N(0, 1/D), generated in blocks of rows, never stored -------------------------------------------


def _rows(of: Instance, start: Array | int, n: int, xp: ModuleType, where: object) -> Array:
    """Draw n rows of P from ``start`` on, (n, d) float32: the counter of an entry is (row, column // 2)."""
    key = draws.keys(f"unilora/gaussian/1 seed={of.seed} D={of.D} d={of.d}")[:2]
    row = xp.reshape(xp.arange(n, dtype=xp.int32, device=where) + start, (-1, 1))
    column = xp.reshape(xp.arange(-(-of.d // 2), dtype=xp.int32, device=where), (1, -1))
    pairs = draws.normals(*draws.threefry(key, row + 0 * column, column + 0 * row), xp)
    return xp.reshape(xp.stack(pairs, axis=2), (n, -1))[:, : of.d] * of.D**-0.5


def _gaussian_project(of: Instance, theta: Array, _: Frozen, start: int, stop: int) -> Array:
    xp, block = array_namespace(theta), max(1, ENTRIES // of.d)
    parts = [
        xp.astype(_rows(of, at, min(block, stop - at), xp, device(theta)), theta.dtype) @ theta
        for at in range(start, stop, block)
    ]
    return xp.concat(parts) if parts else theta[:0]


def _gaussian_transpose(of: Instance, y: Array, _: Frozen, start: int) -> Array:
    xp, block, size = array_namespace(y), max(1, ENTRIES // of.d), y.shape[0]
    total = xp.zeros(of.d, dtype=y.dtype, device=device(y))
    for at in range(0, size, block):
        part = y[at : min(at + block, size)]
        rows = _rows(of, start + at, part.shape[0], xp, device(y))
        total = total + part @ xp.astype(rows, y.dtype)
    return total


# ---- Fastfood: blocks of n = 2^⌈log2 d⌉ rows, each H·G·Π·H·B ---------------------------------------------------------


def _side(of: Instance) -> int:
    return 1 << (of.d - 1).bit_length()


def _fastfood_frozen(of: Instance, xp: ModuleType, where: object) -> Frozen:
    """Draw B and G (k, n) float32, Π and its inverse (k·n,) int32, for k blocks. The mean square of a block's G is 1.

    The original Fastfood's last matrix S gives rows the lengths of Gaussian ones; a projection needs no such lengths.
    """
    n = _side(of)
    k = -(-of.D // n)
    text = f"unilora/fastfood/1 seed={of.seed} D={of.D} d={of.d}"
    B, G = draws.signs(f"{text} B", (k, n)), draws.normal(f"{text} G", (k, n))
    square = np.einsum("kn,kn->k", G, G, dtype=np.float64) / n
    np.divide(G, np.sqrt(square)[:, None], out=G, casting="same_kind")  # in float64, a piece at a time
    order = draws.permutations(f"{text} Pi", k, n)
    order = (order + np.arange(k)[:, None] * n).reshape(-1).astype(np.int32)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(k * n, dtype=np.int32)
    xp = standard(xp)
    return tuple(xp.asarray(array, device=where) for array in (B, G, order, inverse))


def _fastfood_project(of: Instance, theta: Array, frozen: Frozen, start: int, stop: int) -> Array:
    xp, n = array_namespace(theta), _side(of)
    first, last = start // n, -(-stop // n)
    B, G, order, _ = _of_blocks(frozen, first, last, n, theta.dtype)
    padded = xp.concat([theta, xp.zeros(n - of.d, dtype=theta.dtype, device=device(theta))])
    x = hadamard(padded * B, xp)
    x = xp.reshape(xp.take(xp.reshape(x, (-1,)), order, axis=0), (-1, n)) * G
    return xp.reshape(hadamard(x, xp), (-1,))[start - first * n : stop - first * n] * math.sqrt(n / of.D)


def _fastfood_transpose(of: Instance, y: Array, frozen: Frozen, start: int) -> Array:
    xp, n = array_namespace(y), _side(of)
    first, last = start // n, -(-(start + y.shape[0]) // n)
    B, G, _, inverse = _of_blocks(frozen, first, last, n, y.dtype)
    before, size = start - first * n, (last - first) * n
    zeros = [xp.zeros(count, dtype=y.dtype, device=device(y)) for count in (before, size - before - y.shape[0])]
    x = hadamard(xp.reshape(xp.concat([zeros[0], y, zeros[1]]), (-1, n)), xp) * G
    x = hadamard(xp.reshape(xp.take(xp.reshape(x, (-1,)), inverse, axis=0), (-1, n)), xp) * B
    return xp.sum(x, axis=0)[: of.d] * math.sqrt(n / of.D)


def _of_blocks(frozen: Frozen, first: int, last: int, n: int, dtype: object) -> Frozen:
    """Return B, G, Π and its inverse of the blocks first … last-1, numbered from the first of them."""
    B, G, *tables = frozen
    xp = array_namespace(B)
    signs, scales = (xp.astype(array[first:last, :], dtype) for array in (B, G))
    return (signs, scales, *(table[first * n : last * n] - first * n for table in tables))


def hadamard(x: Array, xp: ModuleType) -> Array:
    """Compute x·H/√n for each row of x (k, n), n a power of 2. Each of log2 n passes puts the sums of neighbours before
    their differences, so that all passes have one shape and a compiler sees one.
    """
    k, n = x.shape
    for _ in range(n.bit_length() - 1):
        pairs = xp.reshape(x, (k, n // 2, 2))
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = xp.concat([a + b, a - b], axis=1)
    return x / n**0.5


def _nothing(*_: object) -> Frozen:
    return ()


GAUSSIAN = Map(
    version=1,
    width=sixteenth,
    check=_check,
    frozen=_nothing,
    project=_gaussian_project,
    transpose=_gaussian_transpose,
    rows=_rows,
    rate=theta_rate,
    source="the dense projection of intrinsic dimension, Li et al. 2018 (arXiv 1804.08838)",
)

FASTFOOD = Map(
    version=1,
    width=sixteenth,
    check=_check,
    frozen=_fastfood_frozen,
    project=_fastfood_project,
    transpose=_fastfood_transpose,
    rate=theta_rate,
    source="Le, Sarlós and Smola 2013, as used by Aghajanyan et al. 2020 (arXiv 2012.13255)",
)
