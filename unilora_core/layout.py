"""Layout: which numbers of θ_D belong to which LoRA factor.

θ_D = Concat(vec(F_1), vec(F_2), …), each factor flattened row by row (C order), in the order given.
Source: Uni-LoRA (arXiv 2506.00799), section 3; the order of the factors is ours, and is stored with every adapter.
"""

import hashlib
import json
import math
import numbers
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from unilora_core._namespace import Array, array_namespace
from unilora_core.errors import SpecError, ValuesError
from unilora_core.schema import shown

__all__ = ["Layout", "integer", "number"]

Shape = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Layout:
    """An ordered list of named factor shapes.

    Like a dictionary it has a length; it iterates over the names, and ``in`` looks for a name.
    ``one + other`` has the factors of both; where D changes, so do all groups of a `ProjectionSpec`.

    Args:
        factors: pairs of a name and a shape, or a mapping of them, in the order in which they fill θ_D. By convention
            the factors of a linear layer ``m`` are ``("m.A", (r, in_features))`` and ``("m.B", (out_features, r))``.

    Raises:
        SpecError: there is no factor, a name is repeated or empty, or a shape is empty or has a size below 1.
    """

    factors: tuple[tuple[str, Shape], ...]

    def __init__(self, factors: Iterable[tuple[str, Iterable[int]]] | Mapping[str, Iterable[int]]):
        if not isinstance(factors, Iterable):
            raise SpecError(
                f"Layout: expected pairs of a name and a shape, or a mapping of them, got {shown(factors)}."
            )
        pairs = factors.items() if isinstance(factors, Mapping) else factors
        object.__setattr__(self, "factors", tuple(_checked(pair) for pair in pairs))
        if not self.factors:
            raise SpecError("Layout: expected at least one factor, got none.")
        if len(self.shapes) < len(self.factors):
            (twice, _), *_ = Counter(name for name, _ in self.factors).most_common(1)
            raise SpecError(f"Layout: the name {shown(twice)} occurs twice; every factor needs a name of its own.")

    def __repr__(self) -> str:
        (name, shape), *others = self.factors
        first = f"{shown(name)} {shown(shape)}" + (f" and {len(others)} more" if others else "")
        return f"Layout({first}, D = {self.size}, fingerprint {self.fingerprint[:12]})"

    def __reduce__(self) -> tuple:  # without the cached properties: views of mappings cannot be pickled
        return Layout, (self.factors,)

    def __len__(self) -> int:
        return len(self.factors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __add__(self, other: "Layout") -> "Layout":
        return Layout(self.factors + other.factors) if isinstance(other, Layout) else NotImplemented

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shapes of the factors, name → shape, in order; read-only."""
        return MappingProxyType(dict(self.factors))

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """The slices of the factors in θ_D, name → slice, in order; read-only."""
        slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.factors:
            stop = start + math.prod(shape)
            slices[name] = slice(start, stop)
            start = stop
        return MappingProxyType(slices)

    @cached_property
    def size(self) -> int:
        """D, the number of LoRA parameters."""
        return sum(math.prod(shape) for _, shape in self.factors)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of names, shapes and their order: the identity of a layout across files and frameworks."""
        return hashlib.sha256(json.dumps(self.to_json(), separators=(",", ":")).encode()).hexdigest()

    def split(self, theta_D: Array) -> dict[str, Array]:
        """Cut θ_D into its factors.

        Args:
            theta_D: (D,), any namespace.

        Returns:
            Name → array in the factor's shape, in layout order (views where the namespace gives views).

        Raises:
            ValuesError: ``theta_D`` has another shape.
        """
        if tuple(theta_D.shape) != (self.size,):
            raise ValuesError(f"Layout.split: expected theta_D of shape ({self.size},), got {tuple(theta_D.shape)}.")
        xp = array_namespace(theta_D)
        return {name: xp.reshape(theta_D[self.slices[name]], shape) for name, shape in self.factors}

    def join(self, factors: Mapping[str, Array]) -> Array:
        """Join the factors, flattened in layout order, to one (D,) array: the inverse of `split`.

        Raises:
            ValuesError: a factor is missing, unknown, or has another shape.
        """
        for name, shape in self.factors:
            if name not in factors:
                raise ValuesError(f"Layout.join: the factor {name!r} {shape} is missing.")
            if tuple(factors[name].shape) != shape:
                raise ValuesError(f"Layout.join: expected {name!r} of shape {shape}, got {tuple(factors[name].shape)}.")
        if unknown := sorted(set(factors) - set(self.shapes)):
            raise ValuesError(f"Layout.join: {unknown[0]!r} is no factor of this layout.")
        arrays = [factors[name] for name, _ in self.factors]
        xp = array_namespace(*arrays)
        return xp.concat([xp.reshape(array, (-1,)) for array in arrays])

    def to_json(self) -> list[list]:
        """Return ``[[name, [sizes…]], …]``, ready for `json.dumps`."""
        return [[name, list(shape)] for name, shape in self.factors]

    @classmethod
    def from_json(cls, data: object) -> "Layout":
        """Make the layout that `to_json` wrote.

        Raises:
            SpecError: ``data`` has another structure.
        """
        if not isinstance(data, list) or not all(isinstance(row, list) and len(row) == 2 for row in data):
            raise SpecError("Layout: expected a list of [name, shape] pairs.")
        return cls((name, shape) for name, shape in data)


def integer(value: object) -> int:
    """Return a Python integer from an integer of any library.

    Raises:
        TypeError: the value is no integer; True and False are truth values, and 1.0 is a measurement.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value!r} is a truth value")
    return operator.index(value)  # type: ignore[arg-type]


def number(value: object) -> float:
    """Return a Python float from a real number of Python or NumPy; infinity where it is too large for a float.

    Raises:
        TypeError: the value is no real number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{shown(value)} is no real number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _checked(factor: tuple[str, Iterable[int]]) -> tuple[str, Shape]:
    try:
        name, shape = factor
    except (TypeError, ValueError):
        raise SpecError(f"Layout: expected pairs of a name and a shape, got {shown(factor)}.") from None
    if not isinstance(name, str) or not name:
        raise SpecError(f"Layout: a factor's name must be a non-empty string, got {shown(name)}.")
    try:
        sizes = tuple(integer(size) for size in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise SpecError(
            f"Layout: the shape of {shown(name)} must be a sequence of positive integers, got {shown(shape)}."
        )
    total = 1
    for size in sizes:
        total *= size
        if total >= 2**63:  # no array has so many; seen before the product becomes slow to compute
            raise SpecError(f"Layout: {shown(name)} has more than 2^63 numbers.")
    return name, sizes
