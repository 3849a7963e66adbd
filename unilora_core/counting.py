"""Counting of the numbers that Array API code computes or moves: it is done while the code runs, so no map has to say
it.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from unilora_core._namespace import standard

__all__ = ["operations"]

FREE = {"reshape", "broadcast_to", "astype", "asarray", "matrix_transpose", "arange", "zeros", "zeros_like"}
"""The operations that count nothing: views, conversions and constants."""

ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
BITS = ("and", "or", "xor", "lshift", "rshift")


def operations(function: Callable[[Any], object], x: np.ndarray) -> int:
    """Count the numbers that ``function(x)`` computes or moves. Each number that an operation gives, or takes in where
    these are more (a sum, a lookup), counts one; a product of matrices counts its multiplications and its additions.
    """
    space = _Space()
    function(_Counted(x, space))
    return space.count


class _Space:
    """NumPy's Array API namespace for arrays that count."""

    def __init__(self) -> None:
        self.count, self._numpy = 0, standard(np)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._numpy, name)
        if isinstance(found, type) or not callable(found):
            return found
        return lambda *values, **named: self.call(found, *values, **named)

    def call(self, function: Callable, *values: Any, **named: Any) -> Any:
        """Return what the function gives for the plain arrays, and count it."""
        plain = [_plain(value) for value in values]
        given = function(*plain, **named)
        if not isinstance(given, (np.ndarray, np.generic)):
            return given
        if function is operator.matmul:
            self.count += 2 * given.size * plain[0].shape[-1]
        elif function.__name__ not in FREE:
            self.count += max(np.size(given), *(x.size for x in plain if isinstance(x, np.ndarray)), 0)
        return _Counted(np.asarray(given), self)


class _Counted:
    """An array whose every operation is counted by its namespace."""

    device = "cpu"
    __array_ufunc__ = None  # a plain array on the left leaves the operation to this class

    def __init__(self, array: np.ndarray, space: _Space):
        self.array, self.space = array, space
        self.shape, self.dtype, self.ndim, self.size = array.shape, array.dtype, array.ndim, array.size

    def __array_namespace__(self, **_: object) -> _Space:
        return self.space

    def __array__(self, *words: Any, **named: Any) -> np.ndarray:
        self.space.count += self.size  # NumPy takes over: it reads each number at least once
        return np.asarray(self.array, *words)

    def __getitem__(self, at: Any) -> "_Counted":
        return _Counted(self.array[at], self.space)


def _operator(function: Callable, swapped: bool) -> Callable:
    return lambda x, y: x.space.call(function, *((y, x) if swapped else (x, y)))


for _name in (*ARITHMETIC, *BITS):
    _function = getattr(operator, f"__{_name}__")
    setattr(_Counted, f"__{_name}__", _operator(_function, swapped=False))
    setattr(_Counted, f"__r{_name}__", _operator(_function, swapped=True))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.array if isinstance(value, _Counted) else value
