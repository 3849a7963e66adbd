"""Methods by name: the paper's table, executable. Each method is a frame and a map with its defaults:
docs/framework.md.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from unilora_core.errors import SpecError
from unilora_core.frames import FRAMES, Frame, Sizes, frame_layout
from unilora_core.layout import Layout
from unilora_core.lora import largest_rank
from unilora_core.maps import MAPS
from unilora_core.maps.mapping import Option, Options
from unilora_core.rates import LORA_RANK, default_bound
from unilora_core.schema import shown
from unilora_core.spec import ProjectionSpec, known, option

__all__ = ["METHODS", "Method", "MethodOptions", "check_options", "method_of", "plan_spec"]


@dataclass(frozen=True)
class Method:
    """A frame and a map, with defaults.

    Attributes:
        frame: a name of `unilora_core.frames.FRAMES`.
        grouping: a name of `unilora_core.maps.MAPS`.
        start: see `ProjectionSpec`.
        rank: the usual rank; None where the frame has none.
        source: where it was published.
        d: the usual d; None where it follows from the layout.
    """

    frame: str
    grouping: str
    start: str
    rank: int | None
    source: str
    d: int | None = None


class MethodOptions(TypedDict, total=False):
    """The options that only some methods take, for editors and type checkers: docs/framework.md says which, and their
    defaults.
    """

    initial: float
    """The initial value of VeRA's and Tied-LoRA's vectors u."""
    frequencies: int
    """The number of FourierFT's frequencies for each target."""
    scaling: float
    """The scaling of FourierFT's ΔW."""
    vectors: int
    """The number of vectors in VB-LoRA's codebook."""
    length: int
    """The length of each vector in VB-LoRA's codebook."""
    topk: int
    """The number of vectors that VB-LoRA mixes."""


ARGUMENTS = (
    "method",
    "rank",
    "d",
    "seed",
    "grouping",
    "start",
    "bound",
    "targets",
    "exclude",
    "modules_to_save",
    "name",
    "groups",
)
"""The arguments that stand beside the options where a method is chosen: a mistyped option may mean one of them."""

METHODS: dict[str, Method] = {
    "uni-lora": Method("pair", "balanced", "identity", 16, "Uni-LoRA, arXiv 2506.00799"),
    "lora": Method("pair", "identity", "identity", 4, "LoRA, arXiv 2106.09685"),
    "tied-lora": Method("tied", "identity", "identity", 4, "Tied-LoRA, arXiv 2311.09578"),
    "vera": Method("scaled", "identity", "zero", 256, "VeRA, arXiv 2310.11454"),
    "lora-xs": Method("core", "identity", "zero", 16, "LoRA-XS, arXiv 2405.17604"),
    "tinylora": Method("core", "gaussian", "zero", 2, "TinyLoRA with all targets tied, arXiv 2602.04118", d=64),
    "vb-lora": Method("rows", "codebook", "paper", 4, "VB-LoRA, arXiv 2405.15179"),
    "fourierft": Method("spectrum", "identity", "zero", None, "FourierFT, arXiv 2405.03003"),
    "fastfood": Method("pair", "fastfood", "identity", 16, "Le, Sarlós and Smola 2013; arXiv 2506.00799"),
    "gaussian": Method("pair", "gaussian", "identity", 4, "arXiv 2506.00799"),
    "gpart": Method("dense", "balanced", "zero", None, "GPart, arXiv 2605.14841"),
    "intrinsic-dimension": Method("dense", "fastfood", "zero", None, "arXiv 1804.08838 and 2012.13255"),
}


def plan_spec(
    targets: Iterable[tuple[str, Sizes]],
    *,
    method: str = "uni-lora",
    rank: int | Mapping[str, int] | None = None,
    d: int | Literal["auto"] = "auto",
    seed: int = 0,
    grouping: str | None = None,
    start: str | None = None,
    bound: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> ProjectionSpec:
    """Make the spec of a method for these targets; an argument that is None takes the method's own value.

    Args:
        targets: the name and the sizes of each.
        rank: r; for a pair also a mapping from names of targets, or their endings (``"q_proj"``), to ranks. The longest
            name or ending that fits counts.
        d: the number of trained values; ``"auto"``: the method's, which for Uni-LoRA is a sixteenth of the numbers that
            LoRA has at rank 4, whatever the rank, and where ΔW itself is made of them.
        grouping: another map for the method's frame, such as ``"iid"``, or ``"balanced"`` for VeRA's vectors.
        bound: the bound of θ_d⁰; by default `default_bound` for the identity start, else 0.02.
        options: name → value of the options of the frame and the map; others keep their defaults.

    Raises:
        SpecError: the method is unknown (the error names the nearest), does not take an option, has no rank, or fixes d
            itself; the rank is larger than every target gives reason for (`unilora_core.lora.largest_rank`); or a field
            is out of its range.
    """
    defaults, chosen = _defaults(method, grouping), METHODS[method]
    grouping = chosen.grouping if grouping is None else grouping
    form, each = FRAMES[chosen.frame], MAPS[grouping]
    if rank is not None and not form.ranked:
        raise SpecError(f"the method {method!r} has no rank, got rank = {shown(rank)}; leave it out.")
    if isinstance(rank, Mapping) and chosen.frame != "pair":
        raise SpecError(f"the method {method!r} has one rank for all targets, got {shown(rank)}; say a number.")
    rank = chosen.rank if rank is None else rank
    values = _values(method, defaults, options or {})
    targets = list(targets)
    layout = _laid_out(form, targets, values, rank)
    as_lora = not each.fixed and (form.dense or chosen.frame == "pair")
    counted = frame_layout(FRAMES["pair"], targets, {"rank": LORA_RANK}) if as_lora else layout
    width = each.width(counted, values)
    usual = width if each.fixed else min(width if chosen.d is None else chosen.d, layout.size)
    if each.fixed and d not in ("auto", width):
        raise SpecError(
            f"the method {method!r} trains d = {width} numbers here, got d = {shown(d)}; leave d out, or take a "
            "grouping that has a d, such as 'balanced'."
        )
    held: dict[str, Any] = values if chosen.frame == "pair" or rank is None else values | {"rank": rank}
    usual_start = "paper" if each.transpose is None else chosen.start
    spec = ProjectionSpec(
        layout,
        usual if d == "auto" else d,
        seed,
        grouping,
        usual_start if start is None else start,
        frame=chosen.frame,
        options=tuple(held.items()),
    )
    if bound is None and spec.start != "identity":
        return spec
    return dataclasses.replace(spec, bound=default_bound(spec) if bound is None else bound)


def check_options(method: str, options: Iterable[str], grouping: str | None = None) -> None:
    """Refuse options that a method does not take, before its layers are known.

    Raises:
        SpecError: a method, a grouping or an option is unknown; the error lists the nearest names.
    """
    _named(method, _defaults(method, grouping), options)


def _defaults(method: str, grouping: str | None) -> dict[str, Option]:
    known("method", method, METHODS)
    chosen = METHODS[method]
    grouping = chosen.grouping if grouping is None else grouping
    known("grouping", grouping, MAPS)
    return dict(FRAMES[chosen.frame].options) | dict(MAPS[grouping].options)


def _laid_out(
    form: Frame, targets: list[tuple[str, Sizes]], values: Options, rank: int | Mapping[str, int] | None
) -> Layout:
    """Make the layout of all targets, with one rank for all, one for each, or none."""
    if isinstance(rank, Mapping):
        ranks = _ranks([name for name, _ in targets], rank)
        parts = [_laid_out(form, [each], values, r) for each, r in zip(targets, ranks, strict=True)]
        return Layout(factor for part in parts for factor in part.factors)
    if rank is None:
        return frame_layout(form, targets, values)
    layout = frame_layout(form, targets, {**values, "rank": rank})
    _check_rank(form, targets, rank, layout.size)
    return layout


def _ranks(names: list[str], said: Mapping[str, int]) -> list[int]:
    """Return the rank of each target: the one given for its name, or for the longest of its endings that is given."""
    keys = [key for key in said if isinstance(key, str)]
    fitting = {name: [key for key in keys if name == key or name.endswith(f".{key}")] for name in names}
    if bare := [name for name, fits in fitting.items() if not fits]:
        raise SpecError(
            f"rank: expected a rank for each target, there is none for {shown(bare[0])} in {shown(said)}; add its name "
            "or its ending."
        )
    if strange := said.keys() - {key for fits in fitting.values() for key in fits}:
        endings = shown(sorted({name.rpartition(".")[2] for name in names}))
        raise SpecError(f"rank: no target is called {shown(min(strange, key=str))}; their names end in {endings}.")
    return [said[max(fitting[name], key=len)] for name in names]


def _check_rank(form: Frame, targets: list[tuple[str, Sizes]], rank: int, D: int) -> None:
    """Refuse a rank above the bound that files have for the widest target, so that what is planned for layers of one
    width can be loaded for them.
    """
    name, widest = max(targets, key=lambda each: min(each[1].in_features, each[1].out_features))
    most = largest_rank(widest.in_features, widest.out_features, form.usual)
    if rank > most:
        raise SpecError(
            f"expected a rank of at most {most}, as of {shown(name)} ({widest.in_features} inputs, "
            f"{widest.out_features} outputs) in a file, got rank = {rank}: D would be {D:,}, {4 * D:,} bytes of "
            "float32; take a lower rank."
        )


def _values(method: str, defaults: Options, given: Mapping[str, Any]) -> dict[str, Option]:
    """Return the value of each option."""
    _named(method, defaults, given)
    return {name: option(name, given.get(name, default), default) for name, default in defaults.items()}


def _named(method: str, defaults: Options, names: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in defaults]:
        there = f"known: {', '.join(defaults)}." if defaults else "it has none."
        near = difflib.get_close_matches(str(unknown[0])[:200], [*defaults, *ARGUMENTS], 1)
        meant = f" Is {near[0]} meant?" if near else ""
        raise SpecError(f"the method {method!r} has no option {shown(unknown[0])}; {there}{meant}")


def method_of(spec: ProjectionSpec) -> str | None:
    """Return the name of the method that a spec's frame and map make; None where they make no known method.

    A pair under any map with groups is Uni-LoRA: the paper's own text uses ``"iid"``.
    """
    if spec.frame == "pair" and spec.map.groups is not None:
        return "uni-lora"
    made = (spec.frame, spec.grouping)
    return next((name for name, method in METHODS.items() if (method.frame, method.grouping) == made), None)
