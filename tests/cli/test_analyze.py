"""`unilora analyze`."""

import csv
from pathlib import Path

import numpy as np
import pytest

from unilora_core import analyze, save_adapter
from unilora_core.frames import FRAMES, Sizes
from unilora_core.header import write_targets
from unilora_core.methods import METHODS, plan_spec

SMALL = ("--layers", 2, "--width", 16, "--rank", 2)


def rows(text):
    """method → the words of its row, by the header's."""
    head, *lines = [line.split("  ") for line in text.splitlines() if line.startswith("  ")]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in (head, *lines)]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}


def test_every_method_is_measured(unilora):
    result = unilora("analyze", *SMALL)
    assert (result.code, result.err) == (0, "")
    found = rows(result.out)
    assert {name.removesuffix(" (at its start)") for name in found} >= {*METHODS, "uni-lora/local", "uni-lora/iid"}
    ours, local, vera = found["uni-lora"], found["uni-lora/local"], found["vera"]
    assert (ours["d"], ours["rows of P"], ours["global"], ours["A and B"]) == ("32", "256", "100 %", "100 %")
    assert (ours["rows/column"], ours["file"]) == ("8–8", "128")
    assert ours["gains"].startswith("1 ± ")
    assert (local["global"], vera["global"], vera["rows/column"]) == ("0 %", "0 %", "2–16")
    assert found["uni-lora/unnormalised"]["gains"].startswith("8 ± ")
    assert found["vb-lora (at its start)"]["operations"].endswith(" / –")
    assert found["gpart"]["A and B"] == "one factor"


def test_the_files_hold_every_figure(unilora, tmp_path):
    words = ("--method", "uni-lora,vera,vb-lora,gpart", "--seed", 3, "--d", 20, "--out", "out")
    result = unilora("analyze", *SMALL, *words)
    assert result.out.endswith("also written: analysis.csv, support.png in out\n")
    with (tmp_path / "out" / "analysis.csv").open(newline="") as file:
        found = {row["method"]: row for row in csv.DictReader(file)}
    assert list(found) == ["uni-lora", "vera", "vb-lora", "gpart"]
    targets = [(f"layers.{i}.{name}", Sizes(16, 16)) for i in range(2) for name in "qv"]
    analysis = analyze(plan_spec(targets, rank=2, d=20, seed=3))
    row = found["uni-lora"]
    assert (row["frame"], row["map"], row["d"], row["D"]) == ("pair", "balanced", "20", "256")
    assert (int(row["rows_least"]), int(row["rows_most"])) == analysis.rows == (12, 13)
    assert (float(row["gains_least"]), float(row["gains_most"])) == analysis.gains
    assert row["columns"] == "A:1-1 B:1-1"
    assert found["vb-lora"]["seconds_transpose"] == ""
    assert (tmp_path / "out" / "support.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def adapter(tmp_path):
    """An adapter file of a method, for two targets."""

    def write(method, rank=2, sizes=(8, 12), frozen=(8, 12), **fields):
        targets = [("a", Sizes(*sizes)), ("b", Sizes(*sizes))]
        spec = plan_spec(targets, method=method, rank=rank, **fields)
        tensors, weight = {}, np.random.default_rng(0).normal(size=frozen[::-1]).astype(np.float32)
        if spec.form.of_weight:
            made = FRAMES["core"].of_weight(weight, 2)
            tensors = {f"frozen.{name}.{piece}": array for name, _ in targets for piece, array in made.items()}
        entries = [(name, name, 0, False, None, *sizes, 0) for name, _ in targets]
        metadata = write_targets(entries) if spec.frame != "pair" else {}
        save_adapter(tmp_path / "a.safetensors", spec, spec.init(), tensors=tensors, metadata=metadata)
        return tmp_path / "a.safetensors"

    return write


@pytest.mark.parametrize("method", ["uni-lora", "lora-xs", "vera"])
def test_the_p_of_a_file(unilora, adapter, method):
    file = adapter(method)
    result = unilora("analyze", file)
    assert (result.code, result.err) == (0, "")
    ((name, row),) = rows(result.out).items()
    assert name == f"a.safetensors ({method})"
    assert row["rows of P"] == "80"


def test_other_methods_for_the_targets_of_a_file(unilora, adapter):
    found = rows(unilora("analyze", adapter("vera"), "--method", "lora,lora-xs", "--rank", 2).out)
    assert list(found) == ["a.safetensors (vera)", "lora", "lora-xs"]
    assert found["lora"]["rows of P"] == found["lora-xs"]["rows of P"] == "80"


def test_the_p_of_a_file_with_another_grouping(unilora, adapter):
    assert "a.safetensors (uni-lora/local)" in unilora("analyze", adapter("uni-lora", grouping="local")).out
    assert "a.safetensors (scaled × balanced)" in unilora("analyze", adapter("vera", grouping="balanced", d=9)).out


def test_the_targets_of_a_model(unilora, vit_model):
    found = rows(unilora("analyze", *vit_model, "--kind", "vit", "--method", "lora,lora-xs,vera").out)
    assert {row["rows of P"] for row in found.values()} == {"6,144"}  # q and v of 2 blocks: 4 · 4 · (192 + 192)


def test_the_weights_of_a_model(unilora, vit_model, tmp_path):
    """LoRA-XS's gains are the squares of the singular values, which random weights of another spread have not."""
    import timm
    import torch

    words = (*vit_model, "--kind", "vit", "--method", "lora-xs", "--rank", 2)
    unilora("analyze", *words, "--targets", "attn.proj", "--out", "out")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    squares = [torch.linalg.svdvals(block.attn.proj.weight.detach())[:2].square() for block in model.blocks]
    with (tmp_path / "out" / "analysis.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["gains_least"]) == pytest.approx(min(map(float, torch.stack(squares).flatten())), rel=1e-4)
    assert float(row["gains_most"]) == pytest.approx(max(map(float, torch.stack(squares).flatten())), rel=1e-4)


def test_an_option_is_for_the_methods_that_take_it(unilora):
    found = rows(unilora("analyze", *SMALL, "--method", "fourierft,lora", "--option", "frequencies=5").out)
    assert (found["fourierft"]["d"], found["lora"]["d"]) == ("20", "256")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "veera"), "unknown method 'veera'; the nearest are vera"),
        (("--method", "uni-lora/locl"), "unknown grouping 'locl'; the nearest are local"),
        (("--method", "lora", "--option", "frequencies=5"), "--option frequencies: none of these methods takes it."),
        (("--method", "fourierft", "--option", "frequencies=500"), "layers.0.q: expected frequencies ≤ 256"),
        (("--method", "uni-lora", "--d", "100000"), "expected 1 ≤ d ≤ min(D, 2^31), got d = 100000"),
        (("--method", "vb-lora", "--option", "length=5"), "length = 5 does not divide the 16 columns"),
        (("--model", "m"), "expected FILE, or --model NAME with --kind vit, text or lm, or neither."),
        (("--model", "m", "--kind", "lm", "file"), "expected FILE, or --model NAME"),
        (("none.safetensors",), "none.safetensors: no such adapter file."),
    ],
)
def test_an_error_is_one_line(unilora, words, message):
    result = unilora("analyze", *SMALL, *words)
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lora-xs", "frozen": (8, 9)}, "for 'a', which the frame 'core' makes"),
        (
            {"method": "lora-xs", "sizes": (2**20, 2**20)},
            "too many to look at; at most 134,217,728 are.",
        ),
        ({"method": "uni-lora", "sizes": (2**40, 2**10), "d": 2}, "too many to look at"),
        ({"method": "gpart", "rank": None, "sizes": (2**20, 2**20), "d": 2}, "too many to look at"),
    ],
)
def test_a_file_that_states_what_cannot_be_is_refused_in_one_line(unilora, adapter, fields, message):
    result = unilora("analyze", adapter(**fields))
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_all_says_which_methods_it_leaves_out(unilora, monkeypatch):
    from unilora_cli.commands import analyze_cases

    monkeypatch.setattr(analyze_cases, "PATIENCE", 0)
    result = unilora("analyze", *SMALL, "--option", "length=5")
    assert result.code == 0
    assert "left out: vb-lora: ProjectionSpec: the codebook's length = 5 does not divide the 16 columns" in result.out
    assert "left out: gaussian: one product with P takes about 0 s here; name the method to wait for it." in result.out
    assert "gaussian" not in rows(result.out)


def test_the_page_shows_what_is_measured():
    """What is not noisy, for the methods that are quick to look at."""
    from unilora_cli.commands.analyze import table_of
    from unilora_cli.commands.analyze_cases import ALL, made_up, planned

    page = Path(__file__).parents[2].joinpath("docs", "properties.md").read_text("utf-8")
    lines = page.partition("<!-- small")[2].partition("<!-- end -->")[0].splitlines()
    shown = {line.split(" ")[1]: line.strip("| ").split(" | ")[:6] for line in lines if line.startswith("| ")}
    quick = ["uni-lora", "vera", "lora-xs", "tinylora", "fastfood", "uni-lora/iid", "uni-lora/by-factor"]
    cases = planned(quick, made_up(4, 64), {"rank": 4, "d": "auto", "seed": 0}, {})
    rows = table_of([(case, analyze(case.spec, case.targets, case.frozen)) for case in cases])
    assert set(shown) == {"method", "---", *ALL}
    assert [shown[row[0].split(" ")[0]] for row in rows] == [list(row[:6]) for row in rows]
