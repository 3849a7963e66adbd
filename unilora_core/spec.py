"""ProjectionSpec: everything that fixes P and the point where training starts; P itself is never stored.

P ∈ R^{D×d}: row i is one-hot at column g(i), column j is scaled by 1/√n_j, so PᵀP = I_d.
Source: Uni-LoRA (arXiv 2506.00799), section 3 and theorem 1.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from unilora_core import grouping as _grouping
from unilora_core._namespace import Array, standard
from unilora_core.errors import CorruptFileError, SpecError, UnknownVersionError
from unilora_core.layout import Layout, integer
from unilora_core.schema import shown, typed

__all__ = ["PAPER_BOUND", "ProjectionSpec"]

PAPER_BOUND = 0.02
"""θ_d starts as U(-0.02, 0.02) in the paper, its official code and PEFT."""

STARTS = ("paper", "identity")
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ProjectionSpec:
    """A projection θ_D = P θ_d, fixed by its fields.

    Args:
        layout: the factors that θ_D holds.
        d: trainable numbers, 1 ≤ d ≤ min(D, 2^31).
        seed: 0 ≤ seed < 2^64.
        grouping: ``"balanced"`` (a keyed permutation: group sizes differ by at most one), ``"iid"`` (the paper's text:
            each position draws its group) or ``"numpy-shuffle"`` (what PEFT ≥ 0.20 generates).
        start: ``"paper"``: the factors are θ_D = P θ_d, and B·A is not zero at the start. ``"identity"``: the factors
            ``*.B`` are P (θ_d - θ_d⁰), where θ_d⁰ = `init`, so that B = 0 and the adapted model starts as the base.
        bound: θ_d starts as U(-bound, bound).

    Raises:
        SpecError: a field out of its range, with the range.
    """

    layout: Layout
    d: int
    seed: int = 0
    grouping: str = "balanced"
    start: str = "paper"
    bound: float = PAPER_BOUND

    def __post_init__(self):
        for field in ("d", "seed"):
            try:
                object.__setattr__(self, field, integer(getattr(self, field)))
            except TypeError:
                raise SpecError(f"ProjectionSpec: {field} must be an integer, got {getattr(self, field)!r}.") from None
        if not isinstance(self.layout, Layout):
            raise SpecError(f"ProjectionSpec: layout must be a Layout, got {type(self.layout).__name__}.")
        if self.D > _grouping.MAX_D:
            raise SpecError(f"ProjectionSpec: D = {self.D} is more than 2^48.")
        if not 1 <= self.d <= min(self.D, _grouping.MAX_d):
            raise SpecError(
                f"ProjectionSpec: expected 1 ≤ d ≤ min(D, 2^31), got d = {self.d} with D = {self.D}; "
                "d is the number of trained values, usually D/16."
            )
        if not 0 <= self.seed < 2**64:
            raise SpecError(f"ProjectionSpec: expected 0 ≤ seed < 2^64, got {self.seed}.")
        if not isinstance(self.grouping, str) or self.grouping not in _grouping.ALGORITHMS:
            raise SpecError(f"ProjectionSpec: unknown grouping {self.grouping!r}; known: {_known_groupings()}.")
        if self.grouping == "numpy-shuffle" and self.D > 2**31:
            raise SpecError(f"ProjectionSpec: numpy-shuffle shuffles all D positions; D = {self.D} is more than 2^31.")
        if self.start not in STARTS:
            raise SpecError(f"ProjectionSpec: unknown start {self.start!r}; known: {', '.join(STARTS)}.")
        if self.start == "identity":
            stray = next((name for name in self.layout.shapes if not name.endswith((".A", ".B"))), None)
            if stray is not None:
                raise SpecError(
                    f"ProjectionSpec: start='identity' must tell A from B; {shown(stray)} ends in neither .A nor .B."
                )
        number = isinstance(self.bound, (int, float)) and not isinstance(self.bound, bool)
        if not (number and SMALLEST <= self.bound <= LARGEST):
            raise SpecError(f"ProjectionSpec: bound must be a positive float32 number, got {shown(self.bound)}.")

    @property
    def D(self) -> int:
        """The number of LoRA parameters."""
        return self.layout.size

    def groups(self, start: int = 0, stop: int | None = None, *, xp: ModuleType = np, device: object = None) -> Array:
        """g(start) … g(stop-1), in time and memory of the slice (numpy-shuffle: of D).

        Args:
            start, stop: 0 ≤ start ≤ stop ≤ D; ``stop=None`` means D.
            xp: the namespace to compute in: ``numpy``, ``torch``, ``jax.numpy``, any Array API namespace.

        Returns:
            (stop-start,) int32, each in {0 … d-1}.

        Raises:
            SpecError: the slice lies outside {0 … D}.
        """
        stop = self.D if stop is None else stop
        if not 0 <= start <= stop <= self.D:
            raise SpecError(f"groups: expected 0 ≤ start ≤ stop ≤ D = {self.D}, got start = {start}, stop = {stop}.")
        return _grouping.groups(self.grouping, self._problem, start, stop, xp, device)

    def counts(self) -> np.ndarray:
        """n_j, the size of each group: (d,) int64 in NumPy. Closed form for ``balanced``, else a pass over D."""
        return _grouping.counts(self.grouping, self._problem)

    def scale(self, *, xp: ModuleType = np, device: object = None, dtype: object = None) -> Array:
        """1/√n_j: (d,), computed in float64 and rounded once to ``dtype`` (default float32); 1 for an empty group."""
        xp = standard(xp)
        scale = 1 / np.sqrt(np.maximum(self.counts(), 1))
        narrow = scale if dtype == xp.float64 else scale.astype(np.float32)
        return xp.asarray(narrow, dtype=dtype or xp.float32, device=device)

    def init(self, *, xp: ModuleType = np, device: object = None) -> Array:
        """θ_d⁰ ~ U(-bound, bound): (d,) float32, the same bits in every namespace (drawn in NumPy, then moved)."""
        return standard(xp).asarray(_grouping.uniform(self._problem, self.bound), device=device)

    def to_json(self) -> dict:
        """Every field, and the version of the grouping, ready for `json.dumps`."""
        return {
            "layout": self.layout.to_json(),
            "d": self.d,
            "seed": self.seed,
            "grouping": self.grouping,
            "grouping_version": _grouping.ALGORITHMS[self.grouping].version,
            "start": self.start,
            "bound": self.bound,
        }

    @classmethod
    def from_json(cls, data: object) -> "ProjectionSpec":
        """The inverse of `to_json`.

        Raises:
            SpecError: a field is missing, unknown or out of range.
            UnknownVersionError: the grouping, its version or the start is not known to this version of unilora,
                whatever other fields there are.
        """
        said = data if isinstance(data, dict) else {}
        if {"grouping", "grouping_version", "start"} <= said.keys():
            name, version, start = said["grouping"], said["grouping_version"], said["start"]
            algorithm = _grouping.ALGORITHMS.get(name) if isinstance(name, str) else None
            same = algorithm is not None and type(version) is int and version == algorithm.version
            if not same or start not in STARTS:
                raise UnknownVersionError(
                    f"ProjectionSpec: grouping {shown(name)} version {shown(version)} with start {shown(start)} is not "
                    f"known here (known: {_known_groupings()}; starts: {', '.join(STARTS)}); a newer unilora may read "
                    "it."
                )
        try:
            fields = vars(typed(_Fields, data, "ProjectionSpec"))
        except CorruptFileError as error:
            raise SpecError(str(error)) from None
        del fields["grouping_version"]
        return cls(**fields | {"layout": Layout(fields["layout"])})

    @property
    def _problem(self) -> _grouping.Problem:
        return _grouping.Problem(self.D, self.d, self.seed)


@dataclass
class _Fields:
    """What `ProjectionSpec.to_json` writes."""

    layout: tuple[tuple[str, tuple[int, ...]], ...]
    d: int
    seed: int
    grouping: str
    grouping_version: int
    start: str
    bound: float


def _known_groupings() -> str:
    return ", ".join(f"{name} version {a.version}" for name, a in _grouping.ALGORITHMS.items())
