"""A run that is killed, wherever it is, and resumed gives what it would have given without that, byte for byte."""

import json
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("datasets")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")

FILES = ("metrics.csv", "adapter.safetensors", "predictions.csv")
STEPS = 6  # of an epoch: 24 images in batches of 4
RANDOM = ("--mixup", 0.8, "--cutmix", 1.0, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, "--drop", 0.1)
RANDOM += ("--drop-path", 0.1, "--smoothing", 0.1, "--scale", "0.3,1")


@pytest.fixture
def words(images, vit_model):
    fixed = ("--data", images, "--device", "cpu", "--batch-size", 4, "--lora-rate", 0.05, "--epochs", 5, "--out", "run")
    return ("finetune", "vit", *vit_model, *fixed, *RANDOM)


def outcome(folder):
    """All that a run leaves and that is not about time."""
    metrics = json.loads((folder / "metrics.json").read_text())
    shown = {name: metrics.get(name) for name in ("status", "final", "stopped_early", "plan")}
    epochs = [{**row, "seconds": 0} for row in metrics["epochs"]]
    summary = (folder / "summary.csv").read_text()
    return shown, epochs, summary, {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize(
    ("epochs", "more"),
    [((0, 1, 2), ("--keep", "best", "--patience", 3)), ((1,), ("--workers", 1, "--epochs", 3))],
    ids=["best", "workers"],
)
def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(launch, words, tmp_path, epochs, more):
    (whole,) = launch(*words, *more)
    assert whole.code == 0, whole.err
    (tmp_path / "run").rename(tmp_path / "whole")
    rng, resume = random.Random(len(more)), ()
    for epoch in epochs:
        step = STEPS * epoch + rng.randint(1, STEPS - 1)
        (killed,) = launch(*words, *more, *resume, kill_at=step)
        assert killed.code == -9, killed.err
        assert list((tmp_path / "run" / "unilora-training").glob("checkpoint-*/run.json"))
        for number, name in enumerate(("run.json", "metrics.json", "metrics.csv", "adapter.safetensors")):
            left = tmp_path / "run" / f".unilora-{number:016x}"  # as a process leaves it that is killed in a write
            left.mkdir()
            (left / name).write_bytes(b"a part of a fi")
        resume = ("--resume",)
    (last,) = launch(*words, *more, "--resume")
    assert last.code == 0, last.err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert not (tmp_path / "run" / "unilora-training").exists()
    assert not list((tmp_path / "run").glob(".unilora-*"))


def test_the_test_above_can_fail(launch, words, tmp_path):
    """With another state of NumPy's generator, mixup draws other numbers."""
    torch = pytest.importorskip("torch")
    words = [*words, "--epochs", 2]
    assert launch(*words)[0].code == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    assert launch(*words, kill_at=STEPS + 2)[0].code == -9
    file = tmp_path / "run" / "unilora-training" / f"checkpoint-{STEPS}" / "rng_state.pth"
    state = torch.load(file, weights_only=False)
    kind, keys, *place = state["numpy"]
    torch.save(state | {"numpy": (kind, keys[::-1].copy(), *place)}, file)
    assert launch(*words, "--resume")[0].code == 0
    whole, parts = (outcome(tmp_path / name)[-1]["metrics.csv"].split() for name in ("whole", "run"))
    assert whole[: STEPS + 1] == parts[: STEPS + 1]
    assert whole[STEPS + 1] != parts[STEPS + 1]


def test_a_run_that_is_killed_after_its_last_step_only_writes_what_is_missing(unilora, words, monkeypatch):
    from unilora_cli.training import trainer

    assert unilora(*words, "--max-steps", 8).code == 0
    Path("run").rename("whole")
    conclude = trainer.conclude

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "conclude", interrupt)
    assert unilora(*words, "--max-steps", 8).code == 130
    monkeypatch.setattr(trainer, "conclude", conclude)
    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", interrupt)
    result = unilora(*words, "--max-steps", 8, "--resume")
    assert result.code == 0, result.err
    assert outcome(Path("run")) == outcome(Path("whole"))
