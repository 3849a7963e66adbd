"""Measured properties of P: which targets and factors a column reaches, how evenly, what it does to lengths, what it
costs.

As in the paper (Uni-LoRA, arXiv 2506.00799, section 3), P goes from θ_d to the numbers of A and B of every target,
which a frame with frozen factors makes of θ_D. It goes to ΔW itself where the frame is dense. Where that is not linear,
P is its derivative at the start.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from unilora_core._namespace import Array
from unilora_core.counting import operations
from unilora_core.errors import SpecError
from unilora_core.frames import Sizes, piece_names
from unilora_core.maps import Frozen
from unilora_core.spec import ProjectionSpec

__all__ = ["Analysis", "Part", "Projection", "analyze"]

EXACT = 2**24
"""The largest number of entries for which P is measured whole; beyond it `COLUMNS` columns and `PROBES` vectors are."""

COLUMNS, PROBES, TIMES = 128, 32, 5

STEP = 1e-6
"""The step of the central differences, in float64: exact to 1e-9 for what is linear or a product of two pieces."""

ZERO = 1e-8
"""The part of its column's largest entry below which an entry is rounding."""

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Analysis:
    """The properties of one P.

    Attributes:
        d, D: the number of trained values, and of values that the frame takes.
        numbers: the number of rows of P: the numbers of A and B, or of ΔW.
        across_targets: the share of columns that reach more than one target (the paper's "global").
        across_factors: the share of columns that reach both A and B; None where ΔW is one factor.
        rows: the least and the largest number of rows that a column reaches (the paper's "uniform": they are equal).
            For a large P, of the columns that were measured, among them one that each kind of piece reads.
        columns: factor → the least and the largest number of columns that one of its rows reads; empty unless
            ``exact``.
        gains: the least and the largest ‖P x‖²/‖x‖²: of all x, the eigenvalues of PᵀP, where ``exact``, else of random
            ones (the paper's "isometric": both are 1).
        exact: whether all of P was measured.
        linear: whether P is the same everywhere.
        operations, seconds: the cost of θ_D = P θ_d, then of Pᵀ; None where there is no Pᵀ. Seconds are medians, in
            NumPy.
        file_bytes: the bytes of θ_d, and of what a file keeps beside it; without the header.
        memory_bytes: the bytes of θ_d and of all that is frozen, as this package keeps it.
    """

    d: int
    D: int
    numbers: int
    across_targets: float
    across_factors: float | None
    rows: tuple[int, int]
    columns: Mapping[str, tuple[int, int]]
    gains: tuple[float, float]
    exact: bool
    linear: bool
    operations: tuple[int, int | None]
    seconds: tuple[float, float | None]
    file_bytes: int
    memory_bytes: int


def analyze(
    spec: ProjectionSpec,
    targets: Iterable[tuple[str, Sizes]] | None = None,
    frozen: Mapping[str, Arrays] | None = None,
) -> Analysis:
    """Measure the properties of a spec's P.

    Args:
        targets: the name and the sizes of each, as in `plan_spec`. Without them P ends at θ_D, and each factor of the
            layout counts as itself; for A and B that are trained whole this is no difference.
        frozen: target → what the frame makes of its weight (``Frame.of_weight``); LoRA-XS needs them.

    Raises:
        SpecError: a target's frozen arrays are missing, or have other shapes.
    """
    P = Projection(spec, None if targets is None else tuple(targets), frozen or {})
    exact = P.numbers * spec.d <= EXACT
    some = range(spec.d) if exact else np.random.default_rng(0).choice(spec.d, min(COLUMNS, spec.d), replace=False)
    seen = _Seen.of(P, [*some, *([] if exact else _one_of_each(P))], exact)
    reached, factors = seen.reached[:, : len(some)], _by(P.parts, lambda part: part.factor)
    return Analysis(
        d=spec.d,
        D=spec.D,
        numbers=P.numbers,
        across_targets=_share(reached, _by(P.parts, lambda part: part.target)),
        across_factors=_share(reached, factors) if len(factors) > 1 else None,
        rows=_range(seen.rows),
        columns={name: seen.columns([P.parts[i].at for i in mine]) for name, mine in factors.items()} if exact else {},
        gains=_eigenvalues(seen.matrix, reached) if exact else _probed(P),
        exact=exact,
        linear=P.linear,
        **_costs(P),
    )


# ---- P ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The rows of P that are one factor of one target."""

    target: str
    factor: str
    at: slice


@dataclass(frozen=True)
class Projection:
    """P as numbers: its columns, and its products with vectors, in float64.

    Args:
        targets, frozen: see `analyze`.
    """

    spec: ProjectionSpec
    targets: tuple[tuple[str, Sizes], ...] | None
    of_weights: Mapping[str, Arrays]

    @cached_property
    def kept(self) -> Frozen:
        """The arrays that the map keeps beside θ_d."""
        return self.spec.map.frozen(self.spec, np, None)

    @cached_property
    def frozen(self) -> Mapping[str, Arrays]:
        """The arrays that the frame keeps for each target; the same ones for targets of one size."""
        form, options, targets = self.spec.form, self.spec.chosen, self.targets or ()
        for name, sizes in targets:
            shapes = {piece: tuple(array.shape) for piece, array in self.of_weights.get(name, {}).items()}
            if shapes != form.kept(sizes, options):
                raise SpecError(
                    f"analyze: expected {form.kept(sizes, options)} for {name!r}, which the frame {self.spec.frame!r} "
                    f"makes of the layer's weight (Frame.of_weight), got {shapes or 'none'}: frozen={{target: arrays}}."
                )
        of_size = {sizes: form.frozen(sizes, self.spec.seed, options) for sizes in {sizes for _, sizes in targets}}
        return {name: of_size[sizes] | dict(self.of_weights.get(name, {})) for name, sizes in targets}

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The factors in the order of the rows."""
        found, start = [], 0
        for target, factor, array in self._built(self._start):
            found.append(Part(target, factor, slice(start, start + array.size)))
            start += array.size
        return tuple(found)

    @property
    def numbers(self) -> int:
        """The number of rows of P."""
        return self.parts[-1].at.stop

    @cached_property
    def linear(self) -> bool:
        """Whether P is the same at another θ_d."""
        here, direction = self._start, np.random.default_rng(1).normal(size=self.spec.d)
        there = here + np.random.default_rng(2).normal(size=self.spec.d)
        return bool(np.allclose(self.times(direction, here), self.times(direction, there), rtol=1e-4, atol=1e-6))

    def times(self, x: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """Compute P x: (numbers,); ``at`` is the θ_d at which P is the derivative, by default the start."""
        at = self._start if at is None else at
        step = STEP / max(float(np.linalg.norm(x)), 1e-300)
        ends = [np.concatenate([a.reshape(-1) for *_, a in self._built(at + side * x)]) for side in (step, -step)]
        return (ends[0] - ends[1]) / (2 * step)

    def columns(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield these columns of P, one at a time: (numbers,) each."""
        for j in indices:
            yield self.times(np.eye(1, self.spec.d, int(j))[0])

    @cached_property
    def _start(self) -> np.ndarray:
        return self.spec.init().astype(np.float64)

    @cached_property
    def _shift(self) -> np.ndarray:
        """P θ_d⁰ in the factors that start at zero, and 0 elsewhere."""
        spec = self.spec
        shifted = [np.full(at.stop - at.start, spec.shifted(name)) for name, at in spec.layout.slices.items()]
        at_start = spec.map.project(spec, self._start, self.kept, 0, spec.D)
        return np.where(np.concatenate(shifted), at_start, 0)

    def _built(self, theta: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
        """Return (target, factor, its numbers) for θ_d: A and B, or ΔW."""
        spec = self.spec
        pieces = spec.layout.split(spec.map.project(spec, theta, self.kept, 0, spec.D) - self._shift)
        if self.targets is None:
            return [(*_parted(name), array) for name, array in pieces.items()]
        found = []
        for target, sizes in self.targets:
            mine = {piece: pieces[name] for piece, name in piece_names(spec.form, target, sizes).items()}
            first, *others = spec.form.chain(mine, self.frozen[target], spec.chosen)
            if others:
                found += [(target, "A", first), (target, "B", reduce(lambda product, F: F @ product, others))]
            else:
                found += [(target, "W", first)]
        return found


def _parted(name: str) -> tuple[str, str]:
    target, _, factor = name.rpartition(".")
    return target, factor


# ---- its properties --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """Some columns of P.

    Attributes:
        reached: (parts, columns), whether a column has an entry in a part.
        rows: (columns,), how many entries it has.
        matrix: (numbers, columns), empty unless it is to be kept.
    """

    reached: np.ndarray
    rows: np.ndarray
    matrix: np.ndarray

    @classmethod
    def of(cls, P: Projection, indices: Iterable[int], keep: bool) -> "_Seen":
        starts, reached, rows, kept = [part.at.start for part in P.parts], [], [], []
        for column in P.columns(indices):
            support = _support(column)
            reached.append(np.logical_or.reduceat(support, starts))
            rows.append(np.count_nonzero(support))
            kept += [column] if keep else []
        return cls(np.stack(reached, axis=1), np.array(rows), np.stack(kept, axis=1) if kept else np.empty((0, 0)))

    def columns(self, slices: Iterable[slice]) -> tuple[int, int]:
        """Return the least and the largest number of columns that these rows read."""
        counts = np.count_nonzero(_support(self.matrix), axis=1)
        return _range(np.concatenate([counts[at] for at in slices]))


def _support(columns: np.ndarray) -> np.ndarray:
    """Say where columns have an entry that is more than rounding."""
    sizes = np.abs(columns)
    return sizes > ZERO * sizes.max(axis=0)


def _by(parts: Iterable[Part], key: Callable[[Part], str]) -> dict[str, list[int]]:
    """Return the indices of the parts of each key."""
    found: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        found.setdefault(key(part), []).append(i)
    return found


def _share(reached: np.ndarray, kinds: Mapping[str, list[int]]) -> float:
    """Return the share of columns that reach parts of more than one kind; ``reached``: (parts, columns)."""
    times = sum(reached[mine].any(axis=0).astype(int) for mine in kinds.values())
    return float(np.mean(times > 1))


def _one_of_each(P: Projection) -> list[int]:
    """Return a column for each kind of piece (its name and shape) that the piece reads: a few small ones would hardly
    be drawn.
    """
    spec, transpose, one = P.spec, P.spec.map.transpose, np.ones(1, np.float32)
    if transpose is None:
        return []
    kinds = {(name.rpartition(".")[2], shape): spec.layout.slices[name].start for name, shape in spec.layout.factors}
    return [int(np.abs(transpose(spec, one, P.kept, at)).argmax()) for at in kinds.values()]


def _range(counts: np.ndarray) -> tuple[int, int]:
    return int(counts.min()), int(counts.max())


def _eigenvalues(matrix: np.ndarray, reached: np.ndarray) -> tuple[float, float]:
    """Return the least and the largest eigenvalue of PᵀP, for each set of columns that share no row with the others."""
    linked = reached.astype(float) @ reached.T > 0
    while (wider := linked.astype(float) @ linked > 0).sum() > linked.sum():
        linked = wider
    block = linked.argmax(axis=1)[reached.argmax(axis=0)]
    found = [np.linalg.eigvalsh(mine.T @ mine) for k in np.unique(block) for mine in [matrix[:, block == k]]]
    return max(0.0, float(min(values[0] for values in found))), float(max(values[-1] for values in found))


def _probed(P: Projection) -> tuple[float, float]:
    """Return the least and the largest ‖P x‖²/‖x‖² of random x."""
    xs = np.random.default_rng(3).normal(size=(PROBES, P.spec.d))
    gains = [float(np.sum(P.times(x) ** 2) / np.sum(x**2)) for x in xs]
    return min(gains), max(gains)


# ---- what it costs ---------------------------------------------------------------------------------------------------


def _costs(P: Projection) -> dict:
    spec, kept = P.spec, P.kept
    ways = [(lambda theta: spec.map.project(spec, theta, kept, 0, spec.D), np.ones(spec.d, np.float32))]
    if (transpose := spec.map.transpose) is not None:
        ways.append((lambda y: transpose(spec, y, kept, 0), np.ones(spec.D, np.float32)))
    counts = [operations(way, x) for way, x in ways]
    seconds = [_median_seconds(way, x) for way, x in ways]
    none = [None] * (2 - len(ways))
    of_weights = sum(array.nbytes for arrays in P.of_weights.values() for array in arrays.values())
    theta, arrays = 4 * spec.d, {id(array): array for arrays in P.frozen.values() for array in arrays.values()}
    frozen = sum(np.asarray(array).nbytes for array in (*kept, *arrays.values()))
    return {
        "operations": tuple(counts + none),
        "seconds": tuple(seconds + none),
        "file_bytes": theta + of_weights,
        "memory_bytes": theta + frozen,
    }


def _median_seconds(function: Callable[[np.ndarray], object], x: np.ndarray) -> float:
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        function(x)
        times.append(time.perf_counter() - start)
    return sorted(times)[TIMES // 2]
