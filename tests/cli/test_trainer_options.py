"""`--trainer-arg` and `--report-to`: what transformers' Trainer has beside the command's own options, and errors."""

import csv
import json
from pathlib import Path

import pytest

from unilora_core import read_adapter

pytest.importorskip("transformers")


@pytest.fixture
def text(unilora, bert, tsv):
    words = ("finetune", "text", "--model", bert, "--data", tsv, "--device", "cpu", "--batch-size", 8, "--out", "run")
    return lambda *more: unilora(*words, *more)


def arguments(**options):
    return [word for name, value in options.items() for word in ("--trainer-arg", f"{name}={value}")]


def test_a_schedule_of_transformers(text):
    more = arguments(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0, "lr_end": 0.0})
    result = text("--warmup", 0, "--epochs", 2, *more)
    assert result.code == 0, result.err
    assert (result.err, "{" in result.out) == ("", False)  # nothing of the Trainer's own
    with Path("run/metrics.csv").open() as file:
        rates = [float(row["rate"]) for row in csv.DictReader(file)]
    first = json.loads(Path("run/metrics.json").read_text())["plan"]["theta_rate"]
    assert rates == pytest.approx([first * (1 - step / len(rates)) ** 2 for step in range(len(rates))], rel=1e-4)


def test_an_optimiser_of_transformers(text, monkeypatch):
    import torch

    from unilora_cli.training.trainer import AdapterTrainer

    made, create = [], AdapterTrainer.create_optimizer
    monkeypatch.setattr(AdapterTrainer, "create_optimizer", lambda *given: made.append(create(*given)) or made[0])
    more = arguments(optim="sgd", optim_args="momentum=0.5")
    assert text("--head-rate", 0.2, "--weight-decay", 0.1, *more).code == 0
    assert isinstance(made[0], torch.optim.SGD)
    theta, head = made[0].param_groups
    assert theta["momentum"] == 0.5
    assert (theta["weight_decay"], head["weight_decay"], head["initial_lr"]) == (0.0, 0.1, 0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_schedule_type": "x"},
            "--trainer-arg lr_schedule_type: the Trainer has no such option; the nearest are l",
        ),
        ({"num_train_epochs": 3}, "--trainer-arg num_train_epochs: unilora sets this itself; --help lists its own opt"),
        ({"dataloader_drop_last": True}, "--trainer-arg dataloader_drop_last: unilora sets this itself"),
        ({"fsdp": True}, "--trainer-arg fsdp: only in Python so far; docs/training.md says how."),
        ({"learning_rate": 1}, "--trainer-arg learning_rate: unilora sets this itself"),
    ],
)
def test_an_option_that_cannot_be_given_is_said_before_anything_is_read(text, options, message):
    result = text("--data", "none.tsv", *arguments(**options))
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert message in result.err


@pytest.mark.parametrize(
    "options",
    [{"optim": "none"}, {"lr_scheduler_type": "none"}, {"adam_beta1": 2.0}, {"lr_scheduler_kwargs": {"power": 2}}],
)
def test_a_value_that_the_trainer_does_not_take_is_one_line(text, options):
    result = text(*arguments(**options))
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert result.err.startswith("unilora: error: ")


def test_what_a_library_raises_is_one_line(text, monkeypatch):
    from unilora_cli.training.trainer import AdapterTrainer

    def fails(*_, **__):
        raise ValueError("as deep in a library")

    monkeypatch.setattr(AdapterTrainer, "compute_loss", fails)
    result = text()
    assert result.err == ("unilora: error: ValueError: as deep in a library (not foreseen; --debug shows where)\n")
    assert "Traceback (most recent call last)" in text("--overwrite", "--debug").err


def test_every_option_that_can_be_given_is_one_of_the_trainer_or_refused():
    """A new version's options are given to the Trainer; those that are named here still exist, or did."""
    from transformers import TrainingArguments

    from unilora_cli.training.settings import OURS

    assert OURS.fullmatch("per_device_train_batch_size")
    assert OURS.fullmatch("eval_strategy")
    free = {name for name in TrainingArguments.__dataclass_fields__ if not OURS.fullmatch(name)}
    assert free >= {"lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "adam_beta1", "run_name"}


def test_a_tracker_that_is_not_there(text):
    result = text("--report-to", "nonsense")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "nonsense is not supported, only " in result.err


def test_tensorboard(text):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert text("--report-to", "tensorboard").code == 0
    (folder,) = Path("run/runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    with Path("run/metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-4)
    epochs = json.loads(Path("run/metrics.json").read_text())["epochs"]
    assert [event.value for event in events.Scalars("eval/accuracy")] == pytest.approx([e["accuracy"] for e in epochs])


def test_d_grows_in_several_processes(launch, bert, tsv, tmp_path):
    """No wrapper keeps the size that θ_d had; both processes come to the same."""
    words = ("finetune", "text", "--model", bert, "--data", tsv, "--device", "cpu", "--batch-size", 8, "--out", "run")
    words += ("--d", 20, "--grow-to", 100, "--epochs", 8, "--lora-rate", 1e-9, "--head-rate", 1e-9)
    results = launch(*words, processes=2)
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    assert read_adapter(tmp_path / "run/adapter.safetensors").spec.d == 40
