"""ProjectionSpec: all that fixes P, what its numbers build, and where training starts; P itself is not stored.

θ_D = P θ_d: for Uni-LoRA P ∈ R^{D×d} is one-hot by row at column g(i), column j is scaled by 1/√n_j, so PᵀP = I_d.
Source: Uni-LoRA (arXiv 2506.00799), section 3 and theorem 1. Other maps are in `unilora_core.maps`.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TypeVar

import numpy as np

from unilora_core import grouping as _grouping
from unilora_core._namespace import Array, has_int64, standard
from unilora_core.errors import CorruptFileError, SpecError, UnknownVersionError
from unilora_core.frames import FRAMES, Frame
from unilora_core.layout import Layout, integer, number
from unilora_core.maps import FIRST_D, MAPS, Map, Options
from unilora_core.maps.gather import carried, scale
from unilora_core.maps.mapping import Option
from unilora_core.schema import shown, typed

__all__ = ["PAPER_BOUND", "STARTS", "ProjectionSpec", "known", "option"]

PAPER_BOUND = 0.02
"""θ_d starts as U(-0.02, 0.02) in the paper, its official code and PEFT."""

Function = TypeVar("Function", bound=Callable)

STARTS = ("paper", "identity", "zero")
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LARGEST_SUMMED = 2.0**60
"""The largest number that may be summed: sums and differences of 2^31 such numbers, two times over, are float32
numbers."""


@dataclass(frozen=True)
class ProjectionSpec:
    """A projection θ_D = P θ_d, fixed by its fields.

    Args:
        layout: the factors that θ_D holds.
        d: the number of trainable values, 1 ≤ d ≤ min(D, 2^31); for some maps there is one d only.
        seed: 0 ≤ seed < 2^64.
        grouping: the name of the map P. ``"balanced"`` (a keyed permutation: group sizes differ by at most one),
            ``"iid"`` (the paper's text: each position draws its group), ``"numpy-shuffle"`` (what PEFT ≥ 0.20
            generates), or another of `unilora_core.maps.MAPS`.
        start: ``"paper"``: the factors are θ_D = P θ_d, and B·A is not zero at the start. ``"identity"``: the factors
            that the frame lets start at zero (``*.B``) are P (θ_d - θ_d⁰), where θ_d⁰ = `init`, so that the adapted
            model starts as the base. ``"zero"``: the same with θ_d⁰ = 0, for a frame whose factors may all be zero.
        bound: θ_d starts as U(-bound, bound).
        frame: what the factors of a target build: ``"pair"`` (A and B), or another of `unilora_core.frames.FRAMES`.
        options: name → value of the map's and the frame's options; the rank, for every frame but a pair; ``first_d``
            where `unilora_core.resizing` has changed d.

    Raises:
        SpecError: a field is out of its range; the error says the range.
    """

    layout: Layout
    d: int
    seed: int = 0
    grouping: str = "balanced"
    start: str = "paper"
    bound: float = PAPER_BOUND
    frame: str = "pair"
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self):
        for name in ("d", "seed"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, integer(value))
            except TypeError:
                raise SpecError(f"ProjectionSpec: {name} must be an integer, got {shown(value)}.") from None
        if not isinstance(self.layout, Layout):
            raise SpecError(f"ProjectionSpec: layout must be a Layout, got {type(self.layout).__name__}.")
        known("grouping", self.grouping, MAPS)
        known("frame", self.frame, FRAMES)
        object.__setattr__(self, "options", _checked_options(self))
        if self.D > _grouping.MAX_D:
            raise SpecError(f"ProjectionSpec: D = {self.D} is more than 2^48.")
        self.map.check(self)
        if not 0 <= self.seed < 2**64:
            raise SpecError(f"ProjectionSpec: expected 0 ≤ seed < 2^64, got {shown(self.seed)}.")
        _check_start(self)
        object.__setattr__(self, "bound", _checked_bound(self))

    @property
    def map(self) -> Map:
        """The map that ``grouping`` names."""
        return MAPS[self.grouping]

    @property
    def form(self) -> Frame:
        """The frame that ``frame`` names."""
        return FRAMES[self.frame]

    @property
    def chosen(self) -> Options:
        """The options as a mapping, name → value."""
        return dict(self.options)

    @property
    def first(self) -> "ProjectionSpec":
        """The spec with which training began: this one, unless its d has changed since."""
        if FIRST_D not in self.chosen:
            return self
        return replace(
            self, d=int(self.chosen[FIRST_D]), options=tuple(each for each in self.options if each[0] != FIRST_D)
        )

    @property
    def map_version(self) -> int:
        """The version of the map, as files state it."""
        return self.map.version if self.map.nests is None or FIRST_D not in self.chosen else self.map.nests

    def shifted(self, factor: str) -> bool:
        """Say whether the numbers of this factor are P (θ_d - θ_d⁰), not P θ_d: the rule of the identity start."""
        return self.start != "paper" and _piece(factor) in self.form.zero

    @property
    def D(self) -> int:
        """D, the number of LoRA parameters."""
        return self.layout.size

    def groups(self, start: int = 0, stop: int | None = None, *, xp: ModuleType = np, device: object = None) -> Array:
        """Return g(start) … g(stop-1), in time and memory of the slice (numpy-shuffle: of D).

        Args:
            start, stop: 0 ≤ start ≤ stop ≤ D; ``stop=None`` means D.
            xp: the namespace to compute in: ``numpy``, ``torch``, ``jax.numpy``, any Array API namespace.

        Returns:
            (stop-start,) int32, each in {0 … d-1}.

        Raises:
            SpecError: the slice lies outside {0 … D}.
        """
        stop = self.D if stop is None else stop
        _check_slice("groups", start, stop, "D", self.D)
        return _of_groups(self, self.map.groups)(self, start, stop, xp, device)

    def counts(self) -> np.ndarray:
        """Return n_j, the size of each group: (d,) int64, NumPy. ``balanced`` has a closed form; other maps take a pass
        over D.

        Raises:
            SpecError: the map has no groups.
        """
        return _of_groups(self, self.map.counts)(self)

    def members(
        self, start: int = 0, stop: int | None = None, *, xp: ModuleType = np, device: object = None
    ) -> tuple[Array, Array]:
        """Compute the inverse of `groups`: the positions that belong to each of the groups start … stop-1.

        For ``balanced`` they are computed in time and memory of the slice, in the order of the permutation; for other
        maps they come from one stable sort of all D groups, in increasing order. A sum over members in their order has
        the same bits in every namespace and on every device, unlike a scatter-add.

        Args:
            start, stop: 0 ≤ start ≤ stop ≤ d; ``stop=None`` means d.
            xp: the namespace to compute in.

        Returns:
            offsets (stop-start+1,), where the members of each group begin and end, and positions (offsets[-1],), in
            {0 … D-1}; both int32, or int64 where D ≥ 2^31.

        Raises:
            SpecError: the slice lies outside {0 … d}, the map has no groups, or D ≥ 2^31 in a namespace without int64.
        """
        stop = self.d if stop is None else stop
        _check_slice("members", start, stop, "d", self.d)
        if self.D >= _grouping.WORD and not has_int64(xp):
            raise SpecError(
                f"members: D = {self.D} has positions past 2^31, and {xp.__name__} has no int64 here; compute them in "
                "NumPy (xp=numpy), or in JAX with jax_enable_x64."
            )
        return _of_groups(self, self.map.members)(self, start, stop, xp, device)

    def scale(self, *, xp: ModuleType = np, device: object = None, dtype: object = None) -> Array:
        """Return 1/√n_j: (d,), computed in float64 and rounded once to ``dtype`` (default float32); 1 for an empty
        group.

        Raises:
            SpecError: the map has no groups.
        """
        return scale(_of_groups(self, self.map.weighs)(self), xp, device, dtype)

    def init(self, *, xp: ModuleType = np, device: object = None) -> Array:
        """Draw θ_d⁰ ~ U(-bound, bound): (d,) float32, the same bits in every namespace (drawn in NumPy, then moved).

        It is 0 with ``start="zero"``; a map that has a start of its own gives that. Where d has changed, it is the θ_d⁰
        of `first`, changed as θ_d was.
        """
        if self.start == "zero":
            values = np.zeros(self.d, np.float32)
        elif self.map.start is not None:
            values = self.map.start(self)
        else:
            first = self.first
            values = _grouping.uniform(_grouping.Problem(self.D, first.d, self.seed), self.bound)
            if first is not self:
                values = carried(values.astype(np.float64), first.counts(), self.counts()).astype(np.float32)
        return standard(xp).asarray(values, device=device)

    def to_json(self) -> dict:
        """Return every field, with the versions of map and frame, ready for `json.dumps`; a pair and empty options are
        left out.
        """
        written = {
            "layout": self.layout.to_json(),
            "d": self.d,
            "seed": self.seed,
            "grouping": self.grouping,
            "grouping_version": self.map_version,
            "start": self.start,
            "bound": self.bound,
        }
        if self.frame != "pair":
            written |= {"frame": self.frame, "frame_version": self.form.version}
        return written | ({"options": self.chosen} if self.options else {})

    @classmethod
    def from_json(cls, data: object) -> "ProjectionSpec":
        """Make the spec that `to_json` wrote.

        Raises:
            SpecError: a field is missing, unknown or out of range.
            UnknownVersionError: this version of unilora does not know the grouping, the frame, the version of one, or
                the start, whatever other fields there are.
        """
        return _read(data)


def _read(data: object) -> ProjectionSpec:
    """Make the spec that a file states; see `ProjectionSpec.from_json`."""
    said = data if isinstance(data, dict) else {}
    _check_known("grouping", said, MAPS)
    _check_known("frame", said, FRAMES)
    if said.get("start", "paper") not in STARTS:
        raise UnknownVersionError(
            f"ProjectionSpec: start {shown(said['start'])} is not known here (known: {', '.join(STARTS)}); a newer "
            "unilora may read it."
        )
    try:
        fields = vars(typed(_Fields, data, "ProjectionSpec"))
    except CorruptFileError as error:
        raise SpecError(str(error)) from None
    if ("frame" in said) != ("frame_version" in said):
        raise SpecError("ProjectionSpec: a frame and its frame_version belong together; give both, or neither.")
    version, _ = (fields.pop(name) for name in ("grouping_version", "frame_version"))
    spec = ProjectionSpec(**fields | {"layout": Layout(fields["layout"]), "options": tuple(fields["options"].items())})
    if version != spec.map_version:
        raise SpecError(
            f"ProjectionSpec: the grouping {spec.grouping!r} has version {spec.map_version} with these options, "
            f"got {version}; the option {FIRST_D} belongs to version {spec.map.nests}, and to no other."
        )
    return spec


def _check_slice(what: str, start: int, stop: int, letter: str, size: int) -> None:
    if not 0 <= start <= stop <= size:
        raise SpecError(f"{what}: expected 0 ≤ start ≤ stop ≤ {letter} = {size}, got start = {start}, stop = {stop}.")


def _of_groups(spec: ProjectionSpec, function: Function | None) -> Function:
    """Return a function of a map, which must have groups."""
    if function is None:
        there = ", ".join(name for name, each in MAPS.items() if each.groups is not None)
        raise SpecError(
            f"the grouping {spec.grouping!r} has no groups: a row of its P has other entries; {there} have."
        )
    return function


def _checked_bound(spec: ProjectionSpec) -> float:
    try:
        bound = number(spec.bound)
    except TypeError:
        bound = 0.0
    if not SMALLEST <= bound <= LARGEST:
        raise SpecError(f"ProjectionSpec: bound must be a positive float32 number, got {shown(spec.bound)}.")
    if bound > LARGEST_SUMMED and not spec.map.exact:
        raise SpecError(
            f"ProjectionSpec: bound must be at most 2^60 with the grouping {spec.grouping!r}, which adds up numbers of "
            f"θ_d, got {shown(spec.bound)}."
        )
    return bound


def _checked_options(spec: ProjectionSpec) -> tuple[tuple[str, Option], ...]:
    """Return the options in order of name, each of the type of its default."""
    wanted = dict(spec.form.options) | dict(spec.map.options)
    if spec.form.ranked and spec.frame != "pair":
        wanted["rank"] = 1
    try:
        given = dict(spec.options)
    except (TypeError, ValueError):
        raise SpecError(
            f"ProjectionSpec: options must be pairs of name and value, got {shown(spec.options)}."
        ) from None
    if spec.map.nests is not None and FIRST_D in given:
        wanted[FIRST_D] = 1
    if given.keys() != wanted.keys():
        raise SpecError(
            f"ProjectionSpec: the frame {spec.frame!r} with the grouping {spec.grouping!r} has the options "
            f"{sorted(wanted)}, got {shown(sorted(map(str, given)))}."
        )
    return tuple((name, option(name, given[name], wanted[name])) for name in sorted(given))


def _check_start(spec: ProjectionSpec) -> None:
    if spec.start not in STARTS:
        raise SpecError(f"ProjectionSpec: unknown start {shown(spec.start)}; known: {', '.join(STARTS)}.")
    if spec.start == "paper":
        return
    if spec.map.transpose is None:
        raise SpecError(f"ProjectionSpec: {spec.grouping!r} is not linear, so it has start='paper' only.")
    stray = next((name for name in spec.layout.shapes if _piece(name) not in spec.form.names), None)
    if stray is not None:
        pieces = ", ".join(f".{name}" for name in spec.form.names)
        raise SpecError(
            f"ProjectionSpec: start={spec.start!r} knows by their names which factors begin at zero; {shown(stray)} "
            f"ends in none of {pieces}."
        )
    if spec.start == "zero" and not all(map(spec.shifted, spec.layout.shapes)):
        raise SpecError(
            f"ProjectionSpec: start='zero' with the frame {spec.frame!r} would leave every factor at zero, and no "
            "gradient; take start='identity'."
        )


def known(what: str, name: object, there: Iterable[str]) -> None:
    """Refuse a name that is none of these; the error lists the nearest.

    Raises:
        SpecError: the name is unknown.
    """
    there = list(there)
    if not isinstance(name, str) or name not in there:
        near = difflib.get_close_matches(name[:200], there, 3) if isinstance(name, str) else []
        raise SpecError(
            f"ProjectionSpec: unknown {what} {shown(name)}; "
            + (f"the nearest are {', '.join(near)}; " if near else "")
            + f"known: {', '.join(there)}."
        )


def _check_known(what: str, said: dict, there: Mapping[str, Map] | Mapping[str, Frame]) -> None:
    """Refuse a map or frame of another version of unilora, before the set of fields is looked at."""
    name, version = said.get(what), said.get(f"{what}_version")
    if what not in said or f"{what}_version" not in said:
        return
    each = there.get(name) if isinstance(name, str) else None
    if each is None or type(version) is not int or version not in _versions(each):
        every = ", ".join(f"{name} version {' or '.join(map(str, _versions(each)))}" for name, each in there.items())
        raise UnknownVersionError(
            f"ProjectionSpec: {what} {shown(name)} version {shown(version)} is not known here (known: {every}); a "
            "newer unilora may read it."
        )


def _versions(each: Map | Frame) -> tuple[int, ...]:
    nests = each.nests if isinstance(each, Map) else None
    return (each.version,) if nests is None else (each.version, nests)


def option(name: str, value: object, default: Option) -> Option:
    """Return the value as a positive number of the default's type.

    Raises:
        SpecError: the value is no such number.
    """
    try:
        found = integer(value) if isinstance(default, int) else number(value)
    except TypeError:
        found = 0
    if not 0 < found < 2**63:
        kind = "integer" if isinstance(default, int) else "number"
        raise SpecError(f"ProjectionSpec: {name} must be a positive {kind}, got {shown(value)}.")
    return found


def _piece(factor: str) -> str:
    """Return what follows the last dot of a name; nothing where there is no dot."""
    _, dot, piece = factor.rpartition(".")
    return piece if dot else ""


@dataclass
class _Fields:
    """The fields that `ProjectionSpec.to_json` writes."""

    layout: tuple[tuple[str, tuple[int, ...]], ...]
    d: int
    seed: int
    grouping: str
    grouping_version: int
    start: str
    bound: float
    frame: str = "pair"
    frame_version: int = 1
    options: dict[str, int | float] = field(default_factory=dict)
