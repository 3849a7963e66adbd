"""Frames: what the numbers of one target build, ΔW = F_k ⋯ F_1.

A frame's *pieces* are cut out of θ_D. All else that its chain needs is *frozen*: it follows from the seed or from the
layer's weight. Beside a layer the chain is applied to x, factor by factor: ``for F in chain: x = linear(x, F)``. Every
array may have a leading axis that counts experts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from unilora_core import draws
from unilora_core._namespace import Array, array_namespace
from unilora_core.errors import SpecError
from unilora_core.grouping import MAX_d, Problem, groups
from unilora_core.layout import Layout, Shape, integer
from unilora_core.maps.mapping import Options
from unilora_core.schema import shown

__all__ = ["FRAMES", "Frame", "Sizes", "frame_layout", "piece_names"]

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one target: its inputs, its outputs, and how many experts it stacks (0: none)."""

    in_features: int
    out_features: int
    experts: int = 0

    @property
    def stack(self) -> Shape:
        """The shape of the leading axis of the experts, if there is one."""
        return (self.experts,) if self.experts else ()


def _nothing(*_: object) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Frame:
    """A frame as data.

    Attributes:
        version: the version that a file states.
        names: the names of the pieces.
        zero: the pieces that may start at zero: with ``start="identity"`` they are P(θ_d - θ_d⁰).
        pieces: (sizes, options) → name → shape, in the order of ``names``.
        chain: (pieces, frozen, options) → F_1 … F_k, in the order in which x meets them.
        shared: the pieces that all targets of one size share.
        frozen: (sizes, seed, options) → name → array, NumPy, for what follows from the seed.
        of_weight: (weight (…, out, in), rank) → name → array, for what is made of the layer's weight; a file keeps it.
        kept: (sizes, options) → name → shape of what ``of_weight`` gives.
        ranked: whether it has a rank, which is then one of the options.
        dense: whether the chain is ΔW itself, which no plain LoRA holds.
        rate: the factor on LoRA's learning rate, whatever the map.
        usual: the rank up to which a file is trusted, in narrow layers too.
        options: name → default.
        source: where it was published.
    """

    version: int
    names: tuple[str, ...]
    zero: frozenset[str]
    pieces: Callable[[Sizes, Options], dict[str, Shape]]
    chain: Callable[[Arrays, Arrays, Options], tuple[Array, ...]]
    source: str
    shared: frozenset[str] = frozenset()
    frozen: Callable[[Sizes, int, Options], dict[str, np.ndarray]] = _nothing
    of_weight: Callable[[Array, int], dict[str, Array]] | None = None
    kept: Callable[[Sizes, Options], dict[str, Shape]] = _nothing
    ranked: bool = True
    dense: bool = False
    rate: float = 1.0
    usual: int = 64
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


# ---- pair: LoRA's A and B --------------------------------------------------------------------------------------------


def _pair_pieces(sizes: Sizes, options: Options) -> dict[str, Shape]:
    rank = int(options["rank"])
    return {"A": (*sizes.stack, rank, sizes.in_features), "B": (*sizes.stack, sizes.out_features, rank)}


PAIR = Frame(
    version=1,
    names=("A", "B"),
    zero=frozenset({"B"}),
    pieces=_pair_pieces,
    chain=lambda pieces, _frozen, _options: (pieces["A"], pieces["B"]),
    source="LoRA (arXiv 2106.09685)",
)


# ---- rows: the same, B held by its columns, so that both are cut into sub-vectors along the layer's widths -----------


def _rows_pieces(sizes: Sizes, options: Options) -> dict[str, Shape]:
    shapes = _pair_pieces(sizes, options)
    return {"A": shapes["A"], "Bt": (*shapes["B"][:-2], shapes["B"][-1], shapes["B"][-2])}


ROWS = Frame(
    version=1,
    names=("A", "Bt"),
    zero=frozenset({"Bt"}),
    pieces=_rows_pieces,
    chain=lambda pieces, _frozen, _options: (pieces["A"], _transposed(pieces["Bt"])),
    source="VB-LoRA (arXiv 2405.15179)",
)


# ---- scaled: a frozen pair for all targets, and a trained vector beside each side ------------------------------------


def _scaled_pieces(sizes: Sizes, options: Options) -> dict[str, Shape]:
    return {"u": (*sizes.stack, int(options["rank"])), "v": (*sizes.stack, sizes.out_features)}


def _scaled_frozen(sizes: Sizes, seed: int, options: Options) -> dict[str, np.ndarray]:
    """Draw Kaiming-uniform A (r, in) and B (out, r), as VeRA draws them; targets of one width share them."""
    rank = int(options["rank"])
    text = f"unilora/scaled/1 seed={seed} rank={rank}"
    return {
        "A": draws.uniform(f"{text} in={sizes.in_features}", (rank, sizes.in_features), (6 / sizes.in_features) ** 0.5),
        "B": draws.uniform(f"{text} out={sizes.out_features}", (sizes.out_features, rank), (6 / rank) ** 0.5),
    }


def _scaled_chain(pieces: Arrays, frozen: Arrays, options: Options) -> tuple[Array, ...]:
    u = pieces["u"] + options["initial"]
    return u[..., None] * frozen["A"], pieces["v"][..., None] * frozen["B"]


SCALED = Frame(
    version=1,
    names=("u", "v"),
    zero=frozenset({"u", "v"}),
    pieces=_scaled_pieces,
    chain=_scaled_chain,
    frozen=_scaled_frozen,
    rate=10.0,  # 4e-3 where LoRA has 4e-4: table 9 of the paper
    usual=1024,
    options={"initial": 0.1},
    source="VeRA (arXiv 2310.11454)",
)


# ---- tied: the same with a trained pair ------------------------------------------------------------------------------


def _tied_pieces(sizes: Sizes, options: Options) -> dict[str, Shape]:
    alone = Sizes(sizes.in_features, sizes.out_features)
    return _pair_pieces(alone, options) | _scaled_pieces(sizes, options)


def _tied_chain(pieces: Arrays, _frozen: Arrays, _options: Options) -> tuple[Array, ...]:
    return (1 + pieces["u"])[..., None] * pieces["A"], (1 + pieces["v"])[..., None] * pieces["B"]


TIED = Frame(
    version=1,
    names=("A", "B", "u", "v"),
    zero=frozenset({"B", "u", "v"}),
    pieces=_tied_pieces,
    chain=_tied_chain,
    shared=frozenset({"A", "B"}),
    usual=1024,
    source="Tied-LoRA (arXiv 2311.09578)",
)


# ---- core: a small matrix between the singular vectors of the weight -------------------------------------------------


def _core_pieces(sizes: Sizes, options: Options) -> dict[str, Shape]:
    rank = int(options["rank"])
    if rank > (most := min(sizes.in_features, sizes.out_features)):
        raise SpecError(f"expected rank ≤ {most}, the singular vectors of a weight of that side, got {rank}.")
    return {"R": (*sizes.stack, rank, rank)}


def _core_of_weight(weight: Array, rank: int) -> dict[str, Array]:
    """Compute V (r, in) and U·Σ (out, r) of the truncated singular value decomposition, in float32 or float64."""
    xp = array_namespace(weight)
    wide = weight if weight.dtype == xp.float64 else xp.astype(weight, xp.float32)
    U, S, V = xp.linalg.svd(wide, full_matrices=False)
    return {"V": V[..., :rank, :], "U": U[..., :rank] * S[..., None, :rank]}


def _core_kept(sizes: Sizes, options: Options) -> dict[str, Shape]:
    rank = int(options["rank"])
    return {"V": (*sizes.stack, rank, sizes.in_features), "U": (*sizes.stack, sizes.out_features, rank)}


CORE = Frame(
    version=1,
    names=("R",),
    zero=frozenset({"R"}),
    pieces=_core_pieces,
    chain=lambda pieces, frozen, _options: (frozen["V"], pieces["R"], frozen["U"]),
    of_weight=_core_of_weight,
    kept=_core_kept,
    rate=10.0,  # 4e-3 on MetaMathQA, 2e-3 on Commonsense-170K, in the authors' scripts; VeRA's table has LoRA at 4e-4
    source="LoRA-XS (arXiv 2405.17604)",
)


# ---- dense, spectrum: ΔW itself --------------------------------------------------------------------------------------


DENSE = Frame(
    version=1,
    names=("W",),
    zero=frozenset({"W"}),
    pieces=lambda sizes, _options: {"W": (*sizes.stack, sizes.out_features, sizes.in_features)},
    chain=lambda pieces, _frozen, _options: (pieces["W"],),
    ranked=False,
    dense=True,
    rate=10.0,  # no rate was published; this one learns at widths of 64, 256 and 768 (D/d of 98 to 1182)
    source="GPart (arXiv 2605.14841)",
)


def _spectrum_pieces(sizes: Sizes, options: Options) -> dict[str, Shape]:
    n, entries = int(options["frequencies"]), sizes.in_features * sizes.out_features
    if entries > MAX_d:
        raise SpecError(f"expected a weight of at most 2^31 entries, got {entries}; leave this layer out.")
    if n > entries:
        raise SpecError(f"expected frequencies ≤ {entries}, the entries of a weight, got {n}.")
    return {"c": (*sizes.stack, n)}


def _spectrum_frozen(sizes: Sizes, seed: int, options: Options) -> dict[str, np.ndarray]:
    """Draw which coefficient each entry of the spectrum (out, in) holds, int32; ``frequencies`` where it holds none."""
    n, size = int(options["frequencies"]), sizes.in_features * sizes.out_features
    places = groups("balanced", Problem(size, size, seed), 0, n, np)  # d = D: a permutation
    table = np.full(size, n, np.int32)
    table[places] = np.arange(n)
    return {"places": table.reshape(sizes.out_features, sizes.in_features)}


def _spectrum_chain(pieces: Arrays, frozen: Arrays, options: Options) -> tuple[Array, ...]:
    """Compute ΔW = scaling · Re IFFT2 of the spectrum."""
    c, places = pieces["c"], frozen["places"]
    xp = array_namespace(c)
    held = xp.concat([c, xp.zeros_like(c[..., :1])], axis=-1)
    spectrum = xp.reshape(xp.take(held, xp.reshape(places, (-1,)), axis=-1), (*c.shape[:-1], *places.shape))
    wide = xp.astype(spectrum, xp.complex128 if c.dtype == xp.float64 else xp.complex64)
    return (xp.real(xp.fft.ifftn(wide, axes=(-2, -1))) * options["scaling"],)


SPECTRUM = Frame(
    version=1,
    names=("c",),
    zero=frozenset({"c"}),
    pieces=_spectrum_pieces,
    chain=_spectrum_chain,
    frozen=_spectrum_frozen,
    ranked=False,
    dense=True,
    rate=10.0,  # 3e-2 where LoRA has 3e-3: table 11 of the paper
    options={"frequencies": 1000, "scaling": 150.0},
    source="FourierFT (arXiv 2405.03003)",
)

FRAMES: dict[str, Frame] = {
    "pair": PAIR,
    "rows": ROWS,
    "scaled": SCALED,
    "tied": TIED,
    "core": CORE,
    "dense": DENSE,
    "spectrum": SPECTRUM,
}


# ---- from targets to a layout ----------------------------------------------------------------------------------------


def piece_names(frame: Frame, target: str, sizes: Sizes) -> dict[str, str]:
    """Return each piece's name in the layout: ``target.piece``, or one name for all targets of the same size."""
    common = f"shared.{sizes.in_features}x{sizes.out_features}"
    return {piece: f"{common if piece in frame.shared else target}.{piece}" for piece in frame.names}


def frame_layout(frame: Frame, targets: Iterable[tuple[str, Sizes]], options: Options) -> Layout:
    """Make the layout of all targets, in order; a shared factor stands where the first target needs it.

    Raises:
        SpecError: the rank is below 1, or a target's size does not allow an option; the error names the target.
    """
    if frame.ranked and not _at_least(1, options["rank"]):
        raise SpecError(f"expected rank ≥ 1, got {shown(options['rank'])}; LoRA ranks are usually 4 to 64.")
    factors: list[tuple[str, Shape]] = []
    done: set[str] = set()
    for target, sizes in targets:
        names = piece_names(frame, target, sizes)
        if not (_at_least(1, sizes.in_features, sizes.out_features) and _at_least(0, sizes.experts)):
            raise SpecError(f"{target}: expected whole numbers of inputs and outputs ≥ 1, got {shown(sizes)}.")
        try:
            shapes = frame.pieces(sizes, options)
        except SpecError as error:
            raise SpecError(f"{target}: {error}") from error
        mine = [(names[piece], shape) for piece, shape in shapes.items()]
        factors += [(name, shape) for name, shape in mine if name not in done]
        done |= {names[piece] for piece in frame.shared}
    return Layout(factors)


def _at_least(least: int, *numbers: object) -> bool:
    try:
        return all(integer(number) >= least for number in numbers)
    except TypeError:
        return False


def _transposed(x: Array) -> Array:
    return array_namespace(x).matrix_transpose(x)
