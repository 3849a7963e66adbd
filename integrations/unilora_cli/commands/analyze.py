"""`unilora analyze`: the properties of P for methods side by side, measured. Imports the core only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unilora_cli.commands.analyze_cases import Case, made_up, of_file, of_model, planned
from unilora_cli.console import CommandError, number, path_of, say, table
from unilora_cli.options.files import Analyze
from unilora_cli.outputs import blank_figure, write_csv, write_png
from unilora_cli.tasks.models import Base
from unilora_core import analyze
from unilora_core.analysis import Analysis, Projection
from unilora_core.files import try_files

__all__ = ["draw_support", "run", "table_of", "write_figures"]

HEADER = ("method", "d", "rows of P", "global", "A and B", "rows/column", "gains", "file", "memory", "operations", "ms")

ROWS, COLUMNS = 256, 128
"""Of a picture of P: a pixel is the largest of several rows, in one of several columns."""

ENDS, WAYS = ("least", "most"), ("P", "transpose")
PAIRS = {"rows": ENDS, "gains": ENDS, "operations": WAYS, "seconds": WAYS}
"""Figures that come in twos, and the columns of the CSV that they are in."""


def run(options: Analyze) -> None:
    """Print the table, and write ``analysis.csv`` and ``support.png``.

    Raises:
        SpecError: a method that there is not, or one that these targets cannot have.
        FileNotFoundError, CorruptFileError: the file.
        CommandError: an option that no method takes.
        OSError: nothing can be written, which is tried first.
    """
    folder = path_of(options.out) if options.out else None
    if folder:
        try_files(folder / "analysis.csv", folder / "support.png")
    found = [(case, analyze(case.spec, case.targets, case.frozen)) for case in _cases(options)]
    say(table(table_of(found)))
    if folder:
        write_figures(folder / "analysis.csv", found)
        draw_support(folder / "support.png", [case for case, _ in found])
        say(f"also written: analysis.csv, support.png in {folder}")


def _cases(options: Analyze) -> list[Case]:
    """The file's own P first, where there is a file; then the methods that were asked for, for the same targets.

    Raises:
        CommandError: a model without its kind, or beside a file.
    """
    if bool(options.model) != bool(options.kind) or (options.model and options.file):
        raise CommandError("expected FILE, or --model NAME with --kind vit, text or lm, or neither.")
    own: list[Case] = []
    if options.model and options.kind:
        pretrained = not options.no_pretrained
        base = Base(options.kind, options.model, arguments=dict(options.model_arg), pretrained=pretrained)
        targets = of_model(base, options.targets)
    elif options.file:
        case, targets = of_file(options.file)
        own = [case]
    else:
        targets = made_up(options.layers, options.width)
    names = options.method or (() if own else ("all",))
    fields = {"rank": options.rank, "d": options.d, "seed": options.seed}
    return own + planned(names, targets, fields, dict(options.option))


def table_of(found: Sequence[tuple[Case, Analysis]]) -> list[tuple[str, ...]]:
    """A header, and a row of words for each."""
    return [HEADER, *(_row(case.name, analysis) for case, analysis in found)]


def _row(name: str, of: Analysis) -> tuple[str, ...]:
    return (
        name + ("" if of.linear else " (at its start)"),
        number(of.d),
        number(of.numbers),
        f"{100 * of.across_targets:.0f} %",
        "one factor" if of.across_factors is None else f"{100 * of.across_factors:.0f} %",
        "–".join(map(number, of.rows)),
        ("" if of.exact else "about ") + _gains(*of.gains),
        number(of.file_bytes),
        number(of.memory_bytes),
        " / ".join(map(_count, of.operations)),
        " / ".join("–" if s is None else f"{1000 * s:.2g}" for s in of.seconds),
    )


def _gains(least: float, most: float) -> str:
    if (apart := max(abs(1 - least), abs(1 - most))) <= 1e-6:
        return f"1 ± {apart:.0e}"
    return f"{least:.4g} ± {(most - least) / 2:.0e}" if most - least <= 1e-6 * most else f"{least:.3g}–{most:.3g}"


def _count(n: int | None) -> str:
    return "–" if n is None else number(n) if n < 10**6 else f"{n / 10**6:.3g} M"


def write_figures(path: Path, found: Sequence[tuple[Case, Analysis]]) -> None:
    """Every figure of the analyses, as CSV."""
    rows = [
        {"method": case.name, "frame": case.spec.frame, "map": case.spec.grouping, **_figures(analysis)}
        for case, analysis in found
    ]
    write_csv(path, [list(rows[0]), *(row.values() for row in rows)])


def _figures(of: Analysis) -> dict[str, Any]:
    """Name → figure; a pair is two, and what the rows of each factor read is one text."""
    figures = vars(of) | {"columns": " ".join(f"{name}:{a}-{b}" for name, (a, b) in of.columns.items())}
    for name, ends in PAIRS.items():
        first, second = figures.pop(name)
        figures |= {f"{name}_{ends[0]}": first, f"{name}_{ends[1]}": second}
    return figures


def draw_support(path: Path, chosen: Sequence[Case]) -> None:
    """|P| of each case: dark where it is large; lines between targets, thin ones between A and B."""
    across = min(6, len(chosen))
    down = -(-len(chosen) // across)
    figure = blank_figure(2.3 * across, 3.2 * down)
    for case, axes in zip(chosen, figure.subplots(down, across, squeeze=False).flat, strict=False):
        _draw(case, axes)
    for axes in figure.axes[len(chosen) :]:
        axes.set_axis_off()
    figure.supxlabel("columns of P: θ_d", fontsize=9)
    figure.supylabel("rows of P: A and B, or ΔW, of each target", fontsize=9)
    write_png(figure, path)


def _draw(case: Case, axes: Any) -> None:
    P = Projection(case.spec, case.targets, case.frozen)
    some = np.unique(np.linspace(0, case.spec.d - 1, COLUMNS).astype(int))
    ends = np.unique(np.linspace(0, P.numbers, ROWS + 1).astype(int))[:-1]
    image = np.stack([np.maximum.reduceat(np.abs(column), ends) for column in P.columns(some)], axis=1)
    axes.imshow(image, cmap="Blues", aspect="auto", interpolation="nearest", extent=(0, case.spec.d, P.numbers, 0))
    for before, part in zip(P.parts, P.parts[1:], strict=False):
        new = before.target != part.target
        axes.axhline(part.at.start, color="black" if new else "gray", linewidth=0.5 if new else 0.2)
    axes.set_title(case.name, fontsize=8)
    axes.set_xticks([0, case.spec.d])
    axes.set_yticks([0, P.numbers])
    axes.tick_params(labelsize=6)
