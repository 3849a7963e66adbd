"""Map: all that a choice of P has to say, as data. The kinds of maps are in the modules beside this one.

Source of the form: Uni-LoRA (arXiv 2506.00799), section 3: LoRA and its variants are θ_D = P θ_d with different P.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import numpy as np

from unilora_core._namespace import Array
from unilora_core.layout import Layout

__all__ = ["FIRST_D", "Frozen", "Instance", "Map", "Option", "Options"]

Option = int | float
"""A positive number: a count is an int, a size is a float."""

Options = Mapping[str, Option]

FIRST_D = "first_d"
"""The option of a map that nests: the d with which training began, where d has changed since."""

Frozen = tuple[Array, ...]
"""The arrays that are kept beside θ_d: they follow from the instance, and are never trained or stored in a file."""


class Instance(Protocol):
    """All that a map depends on: a `ProjectionSpec`, or anything with these attributes."""

    @property
    def layout(self) -> Layout:
        """The factors that θ_D holds."""

    @property
    def D(self) -> int:
        """The size of θ_D."""

    @property
    def d(self) -> int:
        """The size of θ_d."""

    @property
    def seed(self) -> int:
        """The seed, 0 ≤ seed < 2^64."""

    @property
    def chosen(self) -> Options:
        """The value of each option."""

    def __hash__(self) -> int: ...


Project = Callable[[Instance, Array, Frozen, int, int], Array]
Transpose = Callable[[Instance, Array, Frozen, int], Array]


@dataclass(frozen=True)
class Map:
    """A map θ_d ∈ R^d → θ_D ∈ R^D. Functions take an `Instance` first.

    Attributes:
        version: the version of the algorithm, which a file states.
        width: (layout, options) → the d of ``d="auto"``.
        fixed: whether that d is the only one.
        check: a function that raises `SpecError` for an instance that cannot exist.
        frozen: (instance, xp, device) → what is kept beside θ_d.
        project: (instance, θ_d, frozen, start, stop) → these numbers of θ_D, in Array API code that is differentiable
            where the namespace is.
        transpose: (instance, y, frozen, start) → Pᵀ of a θ_D that is y from ``start`` on and 0 elsewhere; None where
            the map is not linear.
        rows: (instance, start, n, xp, device) → n rows of P, (n, d), where they are generated; a backend that compiles
            may take ``start`` from an array, and loop.
        groups: (instance, start, stop, xp, device) → the column of each row, int32, where every row has one entry.
        counts: instance → how many rows each column has, (d,) int64, NumPy; where there are groups.
        weighs: instance → what takes the place of n_j in the scale 1/√n_j; where there are groups.
        members: (instance, start, stop, xp, device) → offsets and positions of the rows of these columns; where there
            are groups.
        start: instance → θ_d⁰ (d,) float32, NumPy, where the map has its own; else U(-bound, bound).
        rate: instance → the factor on LoRA's learning rate for θ_d.
        options: name → default.
        nests: the version of the algorithm with the option `FIRST_D`: its columns are then the columns of that first d,
            split or joined, so that `unilora_core.resizing` keeps the function; None where it cannot.
        exact: whether θ_D has the same bits in each namespace; else it agrees to rounding.
        source: where it was published.
    """

    version: int
    width: Callable[[Layout, Options], int]
    check: Callable[[Instance], None]
    frozen: Callable[[Instance, ModuleType, object], Frozen]
    project: Project
    transpose: Transpose | None
    rate: Callable[[Instance], float]
    source: str
    fixed: bool = False
    rows: Callable[[Instance, Array | int, int, ModuleType, object], Array] | None = None
    groups: Callable[[Instance, int, int, ModuleType, object], Array] | None = None
    counts: Callable[[Instance], np.ndarray] | None = None
    weighs: Callable[[Instance], np.ndarray] | None = None
    members: Callable[[Instance, int, int, ModuleType, object], tuple[Array, Array]] | None = None
    start: Callable[[Instance], np.ndarray] | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    nests: int | None = None
    exact: bool = False
