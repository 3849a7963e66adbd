"""The targets in a file's header: which layer, and which of its outputs, each pair of factors belongs to."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

from unilora_core.errors import CorruptFileError
from unilora_core.serialisation import AdapterFile

__all__ = ["TargetRow", "read_targets", "write_targets"]


@dataclass(frozen=True)
class TargetRow:
    """One pair of factors, ``name.A`` (rank, in_features) and ``name.B`` (out_features, rank).

    Attributes:
        module: the layer's name.
        first_row: where the adapted outputs start in the layer's.
        transposed: the weight is stored (in, out), as in transformers' Conv1D.
        parameter: the name of the parameter inside ``module`` that B·A is added to; None for a layer.
        experts: 0, or how many matrices the factors stack along a first axis.
    """

    name: str
    module: str
    rank: int
    in_features: int
    out_features: int
    first_row: int = 0
    transposed: bool = False
    parameter: str | None = None
    experts: int = 0


Row = tuple[str, str, int, bool] | tuple[str, str, int, bool, str]


def write_targets(rows: Iterable[Row], modules_to_save: Iterable[str] = ()) -> dict[str, str]:
    """The header's entries for (name, module, first row, transposed) of each target, and the parameter if it is one."""
    return {"targets": json.dumps([list(row) for row in rows]), "modules_to_save": json.dumps(list(modules_to_save))}


def read_targets(path: str | os.PathLike, file: AdapterFile) -> tuple[tuple[TargetRow, ...], tuple[str, ...]]:
    """The targets and the modules to save that a file names; without such entries, a target per pair of factors.

    Raises:
        CorruptFileError: the entries do not fit the layout.
    """
    shapes = file.spec.layout.shapes
    names = [name.removesuffix(".A") for name in shapes if name.endswith(".A")]
    try:
        entries = json.loads(file.metadata.get("targets", "null")) or [[name, name, 0, False] for name in names]
        rows = tuple(_row(shapes[f"{name}.A"], shapes[f"{name}.B"], name, *entry) for name, *entry in entries)
        modules_to_save = json.loads(file.metadata.get("modules_to_save", "[]"))
        if not (isinstance(modules_to_save, list) and all(isinstance(name, str) for name in modules_to_save)):
            raise ValueError(f"modules_to_save: {modules_to_save!r} is no list of names")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise CorruptFileError(f"{path}: its targets do not fit its layout ({error!r}).") from error
    if len(shapes) != 2 * len(rows):
        raise CorruptFileError(f"{path}: {len(shapes)} factors, but {len(rows)} targets; expected two for each.")
    return rows, tuple(modules_to_save)


def _row(
    A: tuple[int, ...],
    B: tuple[int, ...],
    name: str,
    module: str,
    first_row: int,
    transposed: bool,
    parameter: str | None = None,
) -> TargetRow:
    """A (*experts, rank, in) and B (*experts, out, rank) with an entry of the header."""
    *experts, rank, width = A
    *_, height, _ = B
    if (*experts, height, rank) != B or len(experts) > (parameter is not None):
        raise ValueError(f"the factors of {name!r} have the shapes {A} and {B}")
    return TargetRow(
        name, module, rank, width, height, int(first_row), bool(transposed), parameter, experts[0] if experts else 0
    )
