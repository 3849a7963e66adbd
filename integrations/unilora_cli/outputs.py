"""Tables as CSV and pictures as PNG: files that appear whole or not at all."""

import csv
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unilora_core.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["blank_figure", "csv_text", "write_csv", "write_png"]


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """The rows as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write the rows."""
    write_file(path, csv_text(rows).encode("utf-8", "surrogateescape"))  # names of files may be no UTF-8


def blank_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """A figure of so many inches, which leaves the state of pyplot alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: "Figure", path: Path) -> None:
    """Write the picture."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())
