"""Random numbers as a function of a text and a counter: they are the same in every namespace, on any device.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
in int32 that wraps on overflow. What is drawn with it is part of the file format: a change needs another text.
Integers, signs and uniform numbers have the same bits everywhere; normal ones agree to rounding.
"""

import hashlib
import math
import struct
from types import ModuleType

import numpy as np

from unilora_core._namespace import Array, standard

__all__ = ["keys", "normal", "normals", "permutations", "shift", "signed", "signs", "threefry", "uniform", "words"]

BLOCK = 2**15
"""The number of counters that NumPy takes at a time: the temporaries stay in the L2 cache."""


def keys(text: str) -> tuple[int, ...]:
    """Return eight int32 keys: the SHA-256 of an ASCII text, read as little-endian words."""
    return struct.unpack("<8i", hashlib.sha256(text.encode("ascii")).digest())


def threefry(key: tuple[int, ...], x0: Array, x1: Array) -> tuple[Array, Array]:
    """Return two int32 words for each counter (x0, x1) under a key of two words."""
    schedule = [*key, signed(key[0] ^ key[1] ^ 0x1BD11BDA)]
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for i in range(5):
        for r in (13, 15, 26, 6) if i % 2 == 0 else (17, 29, 16, 24):
            x0 = x0 + x1
            x1 = ((x1 << r) | shift(x1, 32 - r)) ^ x0
        x0, x1 = x0 + schedule[(i + 1) % 3], x1 + signed(schedule[(i + 2) % 3] + i + 1)
    return x0, x1


def shift(x: Array, n: int) -> Array:
    """Shift right logically: int32 ``>>`` copies the sign bit, so the result is masked."""
    y = x >> n
    y &= (1 << (32 - n)) - 1
    return y


def signed(word: int) -> int:
    """Return the int32 that has the same 32 bits."""
    return (word + 2**31) % 2**32 - 2**31


def normals(x0: Array, x1: Array, xp: ModuleType, dtype: object = None) -> tuple[Array, Array]:
    """Return two N(0, 1) numbers for each pair of words (Box and Muller 1958), in ``dtype`` (default float32).

    They use 23 bits of each word: with one half more these are exact in float32, also beside 1, where a logarithm needs
    it.
    """
    u, v = ((xp.astype(shift(x, 9), dtype or xp.float32) + 0.5) * 2.0**-23 for x in (x0, x1))
    radius, angle = xp.sqrt(-2 * xp.log(u)), 2 * np.pi * v
    return radius * xp.cos(angle), radius * xp.sin(angle)


def words(text: str, n: int) -> np.ndarray:
    """Return (n,) int32, NumPy: both words of each of the counters 0 … ⌈n/2⌉-1."""
    key, found = keys(text)[:2], np.empty((-(-n // 2), 2), np.int32)
    for start in range(0, len(found), BLOCK):
        counter = np.arange(start, min(start + BLOCK, len(found))).astype(np.int32)
        found[start : start + BLOCK] = np.stack(threefry(key, 0 * counter, counter), axis=1)
    return found.reshape(-1)[:n]


def uniform(text: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Return numbers from U(-bound, bound), float32, NumPy."""
    values = (shift(words(text, math.prod(shape)), 8) + 0.5) / 2**23 - 1
    return (values * bound).astype(np.float32).reshape(shape)


def normal(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers from N(0, 1), float32, NumPy. They are rounded from float64, so that libraries whose logarithms
    differ round alike.
    """
    n = math.prod(shape)
    pairs, xp = words(text, 2 * -(-n // 2)).reshape(-1, 2), standard(np)
    found = np.empty(pairs.shape, np.float32)
    for start in range(0, len(pairs), BLOCK):
        first, second = pairs[start : start + BLOCK].T
        found[start : start + BLOCK] = np.stack(normals(first, second, xp, np.float64), axis=1)
    return found.reshape(-1)[:n].reshape(shape)


def signs(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return -1 and 1 with equal chances, float32, NumPy."""
    return (1 - 2 * (words(text, math.prod(shape)) & 1)).astype(np.float32).reshape(shape)


def permutations(text: str, rows: int, n: int) -> np.ndarray:
    """Return a permutation of {0 … n-1} in each row: (rows, n) int64, NumPy."""
    return np.argsort(words(text, rows * n).reshape(rows, n), axis=1, kind="stable")
