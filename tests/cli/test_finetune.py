"""`unilora finetune` on tiny models and made data: what it writes, and that the file gives the same model again."""

import csv
import json
from pathlib import Path

import pytest

from unilora_core import read_adapter

pytest.importorskip("timm")
pytest.importorskip("datasets")

KINDS = ("vit", "text", "lm")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_exist_and_parse(trained, kind):
    folder, _ = trained(kind)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((folder / "metrics.json").read_text())
    measure = "perplexity" if kind == "lm" else "accuracy"
    assert metrics["status"] == "finished"
    assert [int(row["step"]) for row in rows] == list(range(1, metrics["plan"]["steps"] + 1))
    assert all(float(row["loss"]) > 0 and float(row["rate"]) > 0 for row in rows)
    assert {"loss", "train_loss", "epoch", "step", measure} == set(metrics["final"])
    assert metrics["bytes"]["adapter"] == (folder / "adapter.safetensors").stat().st_size
    assert metrics["settings"]["epochs"] == 2
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_gives_the_same_model_again(trained, parsed, base_of, kind):
    import importlib

    from unilora_cli import loop, models

    folder, line = trained(kind)
    task = importlib.import_module(f"unilora_cli.{kind}").task(parsed(*line))
    file = folder / "adapter.safetensors"
    base = base_of(file)
    assert base == task.base
    model, _ = models.build(base)
    models.load_adapter(base, model, file)
    task.model = model
    import torch

    settings = loop.Settings(1e-3, 1e-3, 1, 0.0, "linear", torch.device("cpu"))
    final = json.loads((folder / "metrics.json").read_text())["final"]
    for name, value in loop.evaluate(task, settings).items():
        assert value == pytest.approx(final[name], rel=1e-5)


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_from_pretrained_knows_the_base_of_the_command(trained, kind):
    import torch

    import unilora_transformers

    folder, _ = trained(kind)
    model = unilora_transformers.from_pretrained(folder)
    metadata = read_adapter(folder / "adapter.safetensors").metadata
    assert type(model).__name__.endswith({"text": "ForSequenceClassification", "lm": "ForCausalLM"}[kind])
    assert torch.equal(model.unilora.theta_d, torch.from_numpy(read_adapter(folder / "adapter.safetensors").theta_d))
    assert [*model.config.id2label.values()] == json.loads(metadata["labels"]) or kind == "lm"


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_it_learns(trained, kind, tsv):
    words = ("--eval-data", tsv, "--head-rate", 1e-2) if kind == "text" else ()
    folder, _ = trained(kind, "--epochs", 8, *words)
    assert json.loads((folder / "metrics.json").read_text())["final"]["accuracy"] >= 0.9


def test_a_language_model_improves_on_its_base(trained):
    folder, _ = trained("lm", "--epochs", 4, "--lora-rate", 3e-2, "--targets", "all-linear", "--response-only")
    epochs = json.loads((folder / "metrics.json").read_text())["epochs"]
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 3, 4]
    assert epochs[-1]["perplexity"] < 0.9 * epochs[0]["perplexity"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_says_what_it_belongs_to(trained, kind, bert, llama):
    metadata = read_adapter(trained(kind)[0] / "adapter.safetensors").metadata
    assert metadata["task"] == kind
    assert metadata["base_model"] == {"vit": "vit_tiny_patch16_224", "text": str(bert), "lm": str(llama)}[kind]
    labels = {"vit": ["blue", "green", "red"], "text": ["bad", "good"], "lm": []}[kind]
    assert json.loads(metadata["labels"]) == labels


def test_modules_without_weights_in_the_checkpoint_are_saved(trained):
    metadata = read_adapter(trained("text")[0] / "adapter.safetensors").metadata
    assert json.loads(metadata["modules_to_save"]) == ["classifier", "bert.pooler.dense"]


def test_the_plan_is_printed_before_and_the_result_after(unilora, bert, tsv):
    result = unilora(
        *("finetune", "text", "--model", bert, "--data", tsv, "--max-steps", 2, "--d", 48, "--seed", 3, "--limit", 20),
        *("--schedule", "cosine", "--bf16", "--out", "run", "--device", "cpu", "--targets", "query, value, key"),
    )
    assert result.code == 0, result.err
    plan, training = result.out.split("\ntraining\n")
    for text in (
        "θ_d: 48 numbers",
        "D/d",
        "uni-lora (grouping balanced, frame pair), seed 3, start identity",
        "2 on cpu, bfloat16",
        "20 examples to train on",
    ):
        assert text in plan
    metrics = json.loads(Path("run/metrics.json").read_text())
    rate, lora_rate = metrics["plan"]["theta_rate"], metrics["settings"]["lora_rate"]
    assert f"{rate:.4g} = {rate / lora_rate:.4g} × {lora_rate:g}, the rate that trains as LoRA" in plan
    assert metrics["plan"]["targets"] == 6
    assert "held-out accuracy" in training.split("result")[1]
    assert "as LoRA:" in training


def test_the_seed_fixes_a_run(unilora, bert, tsv):
    for out in ("one", "two"):
        words = ("--max-steps", 3, "--out", out, "--device", "cpu")
        assert unilora("finetune", "text", "--model", bert, "--data", tsv, *words).code == 0
    assert Path("one/metrics.csv").read_text() == Path("two/metrics.csv").read_text()


def test_the_default_output_folder_is_a_new_one(unilora, bert, tsv, tmp_path):
    for _ in range(2):
        words = ("--max-steps", 1, "--device", "cpu")
        assert unilora("finetune", "text", "--model", bert, "--data", tsv, *words).code == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"bert-train", "bert-train-2"}


def test_an_adapter_is_not_overwritten_unasked(unilora, bert, tsv):
    words = ("finetune", "text", "--model", bert, "--data", tsv, "--max-steps", 1, "--device", "cpu", "--out", "run")
    assert unilora(*words).code == 0
    result = unilora(*words)
    assert result.code == 1
    assert result.err == (
        "unilora: error: run: there is an adapter in it already; add --overwrite, or choose another --out.\n"
    )
    assert unilora(*words, "--overwrite").code == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapter(unilora, bert, tsv, monkeypatch):
    import torch

    from unilora_cli import text

    scored, calls = text.score, []

    def breaks(model, batch):
        scores = scored(model, batch)
        calls.append(model.unilora.theta_d.detach().clone())
        return scores if len(calls) < 4 else text.Scores(scores.loss * float("nan"), scores.count)

    monkeypatch.setattr(text, "score", breaks)
    words = ("--batch-size", 4, "--out", "run", "--device", "cpu")
    result = unilora("finetune", "text", "--model", bert, "--data", tsv, *words)
    assert result.code == 1
    assert result.err == (
        "unilora: error: the loss became nan at step 4; the adapter of the step before is kept in run. "
        "Lower --lora-rate (or --theta-rate) or --head-rate, or lengthen --warmup.\n"
    )
    assert torch.equal(torch.from_numpy(read_adapter("run/adapter.safetensors").theta_d), calls[2])
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "stopped: the loss became nan at step 4"
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 4


def test_ctrl_c_exits_with_130(unilora, bert, tsv, monkeypatch):
    from unilora_cli import text

    def interrupt(model, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "score", interrupt)
    result = unilora("finetune", "text", "--model", bert, "--data", tsv, "--out", "run", "--device", "cpu")
    assert (result.code, result.err) == (130, "unilora: interrupted\n")
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "stopped: interrupted"


def test_frozen_batch_normalisation_stays(images, parsed):
    from torch import nn

    from unilora_cli import loop

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[0].requires_grad_(False)
    loop._train_mode(model)
    assert [module.training for module in model] == [False, True, True, True]


def test_the_schedule_rises_then_falls_to_zero():
    import torch

    from unilora_cli import loop

    for schedule in ("linear", "cosine"):
        part = loop._curve(100, loop.Settings(1, 1, 1, 0.1, schedule, torch.device("cpu")))
        values = [part(step) for step in range(101)]
        assert values[0] == pytest.approx(1 / 11)
        assert values[10] == max(values) == 1
        assert values[:11] == sorted(values[:11])
        assert values[10:] == sorted(values[10:], reverse=True)
        assert values[100] == pytest.approx(0)
