"""The targets in a file's header: written, read, and refused where they do not fit the layout."""

import numpy as np
import pytest

from unilora_core import CorruptFileError, Layout, ProjectionSpec, read_adapter, save_adapter
from unilora_core.lora import lora_layout
from unilora_core.header import TargetRow, read_header, write_targets

LAYERS = [("q", 5, 7), ("up", 5, 6, 3), ("shift", 4, 2, 0)]
ROWS = [("q", "attn.q", 2, True), ("up", "experts", 0, False, "up"), ("shift", "", 0, False, "shift")]


def file_with(tmp_path, layout, rows):
    spec = ProjectionSpec(layout, 4)
    path = tmp_path / "a.safetensors"
    save_adapter(path, spec, np.zeros(4, np.float32), metadata=write_targets(rows, ["head"]))
    return path, read_adapter(path)


def test_the_layout_of_stacked_matrices():
    layout = lora_layout(LAYERS, rank=2)
    assert layout.shapes == {
        "q.A": (2, 5),
        "q.B": (7, 2),
        "up.A": (3, 2, 5),
        "up.B": (3, 6, 2),
        "shift.A": (2, 4),
        "shift.B": (2, 2),
    }


def test_rows_come_back(tmp_path):
    header = read_header(*file_with(tmp_path, lora_layout(LAYERS, rank=2), ROWS))
    assert header.modules_to_save == ("head",)
    assert header.targets == (
        TargetRow("q", "attn.q", 2, 5, 7, 2, True),
        TargetRow("up", "experts", 2, 5, 6, 0, False, "up", 3),
        TargetRow("shift", "", 2, 4, 2, 0, False, "shift"),
    )


@pytest.mark.parametrize(
    ("shapes", "row"),
    [
        ([("x.A", (2, 5)), ("x.B", (7, 3))], ("x", "x", 0, False)),  # two ranks
        ([("x.A", (3, 2, 5)), ("x.B", (4, 7, 2))], ("x", "x", 0, False, "w")),  # two numbers of experts
        ([("x.A", (3, 2, 5)), ("x.B", (3, 7, 2))], ("x", "x", 0, False)),  # a stack beside a layer
        ([("x.A", (5,)), ("x.B", (7, 1))], ("x", "x", 0, False)),
        ([("x.A", (2, 5)), ("x.B", (7, 2))], ("y", "x", 0, False)),
        ([("x.A", (2, 5)), ("x.B", (7, 2))], ("x", "x", 0)),
        ([("x.A", (2, 5)), ("x.B", (7, 2))], ("x", "x", 0, False, "w", 1)),
    ],
)
def test_rows_that_do_not_fit(tmp_path, shapes, row):
    with pytest.raises(CorruptFileError, match="its targets do not fit its layout"):
        read_header(*file_with(tmp_path, Layout(shapes), [row]))
