"""The permutation of ``balanced`` in Triton: the same integers as `unilora_core.grouping.Permutation`."""

import triton
import triton.language as tl

__all__ = ["backwards", "forwards"]


@triton.jit
def _word(x, key):
    """Compute the low 30 bits of lowbias32(x ⊕ key)."""
    w = (x ^ key).to(tl.uint32)
    w ^= w >> 16
    w *= 0x7FEB352D
    w ^= w >> 15
    w *= 0x846CA68B
    w ^= w >> 16
    return (w & 0x3FFFFFFF).to(tl.int32)


@triton.jit
def _inside(y, ends, size, WALKS: tl.constexpr):
    """Say where the walk ends that has come to y; ``ends`` are those of the few points outside."""
    if WALKS:
        over = y >= size
        y = tl.where(over, tl.load(ends + (y - size), mask=over, other=0), y)
    return y


@triton.jit
def forwards(p, keys, outside, a, b, size, WALKS: tl.constexpr):
    """Compute π(p): int32 in {0 … size-1}; keys: eight int32."""
    left = p // b
    right = p - left * b
    for i in tl.static_range(4):
        left, right = right, (_word(right, tl.load(keys + 2 * i)) + left) % a
        left, right = right, (_word(right, tl.load(keys + 2 * i + 1)) + left) % b
    return _inside(left * b + right, outside, size, WALKS)


@triton.jit
def backwards(q, keys, before, a, b, size, WALKS: tl.constexpr):
    """Compute π⁻¹(q)."""
    left = q // b
    right = q - left * b
    for i in tl.static_range(4):
        left, right = (right - _word(left, tl.load(keys + 7 - 2 * i)) % b + b) % b, left
        left, right = (right - _word(left, tl.load(keys + 6 - 2 * i)) % a + a) % a, left
    return _inside(left * b + right, before, size, WALKS)
