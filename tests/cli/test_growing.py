"""`unilora finetune --grow-to`: d doubles where the held-out loss has come to rest, also in a run that is resumed."""

import json
from pathlib import Path

import pytest

from unilora_core import read_adapter

pytest.importorskip("transformers")

LOSSES = (1.0, 1.0, 0.5, 0.5, 0.5)  # d: 20, then 40, 40, 80, and there it stays
WORDS = ("--d", 20, "--grow-to", 100, "--epochs", 5)


class Interrupted(KeyboardInterrupt):
    """As Ctrl-C."""


@pytest.fixture
def text(unilora, bert, tsv):
    return lambda *words: unilora("finetune", "text", "--model", bert, "--data", tsv, "--device", "cpu", *words)


@pytest.fixture
def held_out(monkeypatch):
    """held_out(losses, at): these losses, whatever there is; where one is None, the run is interrupted."""
    from unilora_cli.training import evaluating

    def told(losses):
        there = iter(losses)

        def evaluate(*_):
            if (loss := next(there)) is None:
                raise Interrupted
            return {"loss": loss, "accuracy": 1 - loss}

        monkeypatch.setattr(evaluating, "evaluate", evaluate)

    return told


def results(folder="run"):
    return json.loads(Path(folder, "metrics.json").read_text())


def words_of(result):
    return " ".join(result.out.split())


def spec(folder="run"):
    return read_adapter(Path(folder, "adapter.safetensors")).spec


def test_d_doubles_where_the_loss_rests(text, held_out):
    held_out(LOSSES)
    result = text(*WORDS, "--out", "run")
    assert result.code == 0, result.err
    assert "growth d doubles up to 100, where the held-out loss has come to rest" in words_of(result)
    assert "  the held-out loss has come to rest: d grows from 20 to 40\n" in result.out
    assert result.out.count("d grows from") == 2
    assert [row["d"] for row in results()["epochs"]] == [20, 20, 40, 40, 80]
    assert (spec().d, spec().first.d) == (80, 20)
    assert results()["plan"]["d"] == 20
    trained = results()["plan"]["trained"] + 60
    assert f"trained numbers {trained:,} adapter" in words_of(result)
    sizes = results()["bytes"]
    assert sizes["adapter_as_lora"] - sizes["adapter"] == 4 * (spec().D - 80)


def test_the_rate_follows(text, held_out):
    """Of every step after a growth: what it would have been, times 2^-¾."""
    rates = {}
    for name, losses in (("still", (1.0, 0.5, 0.2, 0.1, 0.01)), ("grown", (1.0, 1.0, 0.5, 0.2, 0.1))):
        held_out(losses)
        assert text(*WORDS, "--out", name).code == 0
        rows = Path(name, "metrics.csv").read_text().splitlines()[1:]
        rates[name] = [float(row.split(",")[2]) for row in rows]
    part = len(rates["still"]) * 2 // 5
    assert rates["grown"][:part] == rates["still"][:part]
    expected = [rate * 2**-0.75 for rate in rates["still"][part:]]
    assert rates["grown"][part:] == pytest.approx(expected, rel=1e-4)


def test_the_best_may_be_of_a_smaller_d(unilora, vit_model, images, held_out):
    """The adapter of the file is put back for what is drawn at the end, whatever d has become."""
    held_out((0.5, 0.6, 0.7, 0.8, 0.9))
    words = (*vit_model, "--data", images, "--augment", "none", "--batch-size", 5, "--device", "cpu")
    result = unilora("finetune", "vit", *words, *WORDS, "--keep", "best", "--out", "run")
    assert result.code == 0, result.err
    assert (spec().d, results()["epochs"][-1]["d"]) == (20, 40)
    assert f"trained numbers {results()['plan']['trained']:,} adapter" in words_of(result)
    assert Path("run", "predictions.csv").exists()


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(text, held_out, done):
    held_out(LOSSES)
    assert text(*WORDS, "--out", "whole").code == 0
    held_out((*LOSSES[:done], None))
    assert text(*WORDS, "--out", "run").code == 130
    held_out(LOSSES[done:])
    result = text(*WORDS, "--out", "run", "--resume")
    assert result.code == 0, result.err
    for name in ("metrics.csv", "adapter.safetensors"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    kept = ("d", "loss", "step")
    mine, theirs = ([[row[key] for key in kept] for row in results(name)["epochs"]] for name in ("run", "whole"))
    assert mine == theirs


def test_a_file_that_grew_is_shown(text, held_out, unilora):
    held_out(LOSSES)
    assert text(*WORDS, "--out", "run").code == 0
    said = unilora("inspect", "run/adapter.safetensors").out
    assert "uni-lora: frame pair, first_d 20" in said
    assert "balanced version 2, seed 0" in said
    assert "d = 80 trained" in said
    assert " of 20 numbers\n" in said
    facts = json.loads(unilora("inspect", "--json", "run/adapter.safetensors").out)
    assert (facts["d"], facts["options"]) == (80, {"first_d": 20})


REFUSED = {
    ("--d", 20, "--grow-to", 39): r"--grow-to 39: Growth: expected 2·d = 40 ≤ until ≤ D = ",
    ("--d", 20, "--grow-to", 10**6): "got until = 1000000",
    ("--method", "lora", "--grow-to", 100): "--grow-to 100: grow: the grouping 'identity' has one d only",
    ("--method", "fastfood", "--grow-to", 100): "--grow-to 100: grow: the grouping 'fastfood' has another P",
    ("--grow-to", 0): "expected a whole number above 0, got '0'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_growth_that_cannot_be(text, words):
    result = text(*words, "--out", "run")
    assert result.code == (2 if words == ("--grow-to", 0) else 1)
    assert REFUSED[words] in result.err
    assert not Path("run", "metrics.json").exists()


def test_a_resume_must_grow_alike(text, held_out):
    held_out((*LOSSES[:2], None))
    assert text(*WORDS, "--out", "run").code == 130
    result = text("--d", 20, "--grow-to", 60, "--epochs", 5, "--out", "run", "--resume")
    assert "the interrupted run has grow_to = 100, this one 60" in result.err
