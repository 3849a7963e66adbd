"""The code blocks of ``docs/format.md`` run as they stand, each alone."""

import re
from pathlib import Path

import pytest

from unilora_core.frames import FRAMES
from unilora_core.maps import MAPS

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"block{BLOCKS.index(block)}")
def test_the_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {"__name__": "__main__"})


def test_the_page_has_its_blocks():
    assert len(BLOCKS) == 8
    assert all("assert" in block for block in BLOCKS)


def test_every_field_of_a_file_is_described():
    from unilora_core import Layout, ProjectionSpec, serialisation

    fields = {*ProjectionSpec(Layout([("m.A", (1,))]), 1).to_json(), "format", "format_version", "spec", "fingerprint"}
    text = PAGE.read_text("utf-8")
    assert [name for name in {*fields, "checksum", serialisation.THETA} if f"| `{name}` |" not in text] == []
    assert "| `frame`, `frame_version` |" in text
    assert "| `options` |" in text


def test_every_map_and_frame_is_described():
    text = PAGE.read_text("utf-8")
    assert [name for name in {*MAPS, *FRAMES} if f"`{name}`" not in text] == []
    for name, form in FRAMES.items():
        (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)
        pieces, _, zero, options = (cell.strip() for cell in row.split("|"))
        assert re.findall(r"(\w+) \(", pieces) == list(form.names)
        assert set(zero.split(", ")) == form.zero
        ranked = ["rank"] if form.ranked and name != "pair" else []
        assert options.split(", ") == (sorted([*form.options, *ranked]) or [""])
