"""How training goes: accumulation, clipping, precision, metrics, the best epoch, and going on after an interruption."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from unilora_core import read_adapter

torch = pytest.importorskip("torch")
pytest.importorskip("datasets")
pytest.importorskip("timm")


@pytest.fixture
def text(unilora, bert, tsv):
    return lambda *words: unilora("finetune", "text", "--model", bert, "--data", tsv, "--device", "cpu", *words)


@pytest.fixture
def lm(unilora, llama, dialogues):
    words = ("--model", llama, "--data", dialogues, "--length", 24, "--device", "cpu")
    return lambda *more: unilora("finetune", "lm", *words, *more)


def results(folder="run"):
    return json.loads(Path(folder, "metrics.json").read_text())


def losses(folder):
    with Path(folder, "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def theta(folder):
    return torch.from_numpy(read_adapter(Path(folder, "adapter.safetensors")).theta_d)


# ---- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_accumulated_batches_act_as_one(request, kind):
    run = request.getfixturevalue(kind)
    words = ("--model-arg", "hidden_dropout_prob=0.0", "--model-arg", "attention_probs_dropout_prob=0.0")
    words = words if kind == "text" else ("--response-only",)
    assert run("--batch-size", 8, "--epochs", 1, "--out", "one", *words).code == 0
    assert run("--batch-size", 2, "--accumulate", 4, "--epochs", 1, "--out", "four", *words).code == 0
    assert results("one")["plan"]["steps"] == results("four")["plan"]["steps"] == 5
    assert losses("four") == pytest.approx(losses("one"), rel=1e-4)
    torch.testing.assert_close(theta("four"), theta("one"), rtol=1e-3, atol=1e-5)


def test_gradients_are_scaled_down_to_a_norm(text, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, norm):
        parameters = list(parameters)
        clip(parameters, norm)
        seen.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    assert text("--max-grad-norm", 1e-3, "--max-steps", 2, "--out", "run").code == 0
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_rates_and_weight_decay_reach_the_optimiser(text, monkeypatch):
    made = []
    adamw = torch.optim.AdamW

    def spy(groups, **options):
        made.append(adamw(groups, **options))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    words = ("--theta-rate", 0.3, "--head-rate", 0.2, "--weight-decay", 0.1, "--warmup", 0, "--max-steps", 1)
    result = text(*words, "--out", "run")
    assert "0.3, as given" in result.out
    theta_group, head_group = made[0].param_groups
    assert (theta_group["initial_lr"], theta_group["weight_decay"]) == (0.3, 0.0)
    assert (head_group["initial_lr"], head_group["weight_decay"]) == (0.2, 0.1)
    assert results()["plan"]["theta_rate"] == 0.3


def test_lora_rate_and_theta_rate_exclude_each_other(text):
    result = text("--lora-rate", 1, "--theta-rate", 1)
    assert result.code == 2
    assert "not allowed with argument --lora-rate" in result.err


# ---- numbers as labels, and metrics -----------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path, sentences):
    rows = [f"{sentence}\t{(label == 'good') * 4 + i % 3 / 2}" for i, (sentence, label) in enumerate(sentences)]
    path = tmp_path / "scored.tsv"
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return path


def test_a_regression_learns_and_its_file_gives_the_same_model_again(unilora, bert, scored, parsed):
    from unilora_cli import loop, models, text

    line = ("finetune", "text", "--model", bert, "--data", scored, "--eval-data", scored, "--regression")
    line += ("--epochs", 12, "--batch-size", 8, "--head-rate", 2e-2, "--device", "cpu", "--out", "run")
    result = unilora(*line)
    assert result.code == 0, result.err
    final = results()["final"]
    assert set(final) == {"loss", "train_loss", "epoch", "step", "pearson", "spearman"}
    assert final["pearson"] > 0.7
    file = Path("run/adapter.safetensors")
    base = models.remembered(read_adapter(file).metadata, parsed("merge", file, "--out", "x"), str(file))
    model, _ = models.build(base)
    assert model.config.num_labels == 1
    models.load_adapter(base, model, file)
    task = text.task(parsed(*line))
    task.model = model
    scores = loop.evaluate(task, loop.Settings(1e-3, 1e-3, 1, 0.0, "linear", torch.device("cpu")))
    assert scores == pytest.approx({name: final[name] for name in scores}, rel=1e-4)


@pytest.mark.parametrize(("value", "shown"), [("many", "'many'"), ("nan", "'nan'"), ("inf", "'inf'"), ("", "''")])
def test_labels_that_are_no_numbers(text, tmp_path, value, shown):
    (tmp_path / "a.tsv").write_text(f"sentence\tlabel\nthe film\t1.5\nthe plot\t{value}\n")
    result = text("--data", tmp_path / "a.tsv", "--regression", "--out", "run")
    assert result.err == (f"unilora: error: {tmp_path}/a.tsv, record 2: expected a number as the label, got {shown}.\n")
    assert not Path("run").exists()


def test_metrics_are_those_of_the_textbook():
    import numpy as np

    from unilora_cli.metrics import CLASSES, NUMBERS, PERPLEXITY, Outcome

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    outcome = Outcome(None, 2.0, predicted, labels)
    tp, tn = ((predicted == labels) & (labels == 1)).sum(), ((predicted == labels) & (labels == 0)).sum()
    fp, fn = (predicted > labels).sum(), (predicted < labels).sum()
    assert CLASSES["accuracy"].of(outcome) == pytest.approx((tp + tn) / 50)
    assert CLASSES["f1"].of(outcome) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    below = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert CLASSES["mcc"].of(outcome) == pytest.approx((tp * tn - fp * fn) / below)
    assert PERPLEXITY.of(outcome) == pytest.approx(np.e**2)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert NUMBERS["pearson"].of(Outcome(None, 0, x, y)) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [values.argsort().argsort() for values in (x, y)]
    assert NUMBERS["spearman"].of(Outcome(None, 0, x, y)) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for metric in NUMBERS.values():
        assert metric.of(Outcome(None, 0, np.ones(50), y)) == 0


def test_metrics_of_another_task_are_refused_before_the_data_are_read(text):
    result = text("--data", "none.tsv", "--metric", "accuracy,pearson")
    assert result.err == "unilora: error: --metric pearson: this task has accuracy, f1, mcc.\n"


# ---- which epoch is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 3)])
def test_the_epoch_that_is_kept(text, monkeypatch, keep, epoch):
    from unilora_cli import loop

    scores, seen = iter([0.1, 0.3, 0.2]), []

    def evaluated(task, settings):
        seen.append(task.adapter.theta_d.detach().clone())
        return {"loss": 1.0, "mcc": next(scores), "accuracy": 0.5}

    monkeypatch.setattr(loop, "evaluate", evaluated)
    result = text("--epochs", 3, "--keep", keep, "--metric", "mcc, accuracy", "--out", "run")
    assert result.code == 0, result.err
    assert results()["final"]["epoch"] == epoch
    assert torch.equal(theta("run"), seen[epoch - 1])
    assert ("2, the best of 3" in result.out) == (keep == "best")


def test_the_best_perplexity_is_the_lowest(lm, monkeypatch):
    from unilora_cli import loop

    scores = iter([9.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": 1.0, "perplexity": next(scores)})
    assert lm("--epochs", 3, "--keep", "best", "--out", "run").code == 0
    assert results()["final"]["perplexity"] == 4.0


# ---- going on ---------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_a_resumed_run_is_the_uninterrupted_one(request, kind, monkeypatch):
    from unilora_cli import loop

    run = request.getfixturevalue(kind)
    words = ("--epochs", 3, "--batch-size", 8, "--keep", "best", "--out")
    assert run(*words, "whole").code == 0
    evaluate, calls = loop.evaluate, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == (4 if kind == "lm" else 3):  # in the third epoch
            raise Interrupted
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    assert run(*words, "parts").code == 130
    assert len(losses("parts")) == len(losses("whole"))
    monkeypatch.setattr(loop, "evaluate", evaluate)
    result = run(*words, "parts", "--resume")
    assert result.code == 0, result.err
    assert losses("parts") == losses("whole")
    assert torch.equal(theta("parts"), theta("whole"))
    without_time = [[{**row, "seconds": 0} for row in results(name)["epochs"]] for name in ("parts", "whole")]
    assert without_time[0] == without_time[1]
    assert not Path("parts/training.pt").exists()
    assert "there is no interrupted run to --resume in it" in run(*words, "parts", "--resume").err


def test_a_resume_that_does_not_fit_is_refused_and_changes_nothing(text, unilora, tsv, llama, monkeypatch, tmp_path):
    from unilora_cli import loop

    evaluate, calls = loop.evaluate, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    assert text("--out", "run").code == 130
    monkeypatch.setattr(loop, "evaluate", evaluate)
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    refusals = {
        ("--rank", 8): "run: the interrupted run has rank = 4, this one 8; --resume with the same arguments, or start",
        ("--lora-rate", 1): "the interrupted run has lora_rate = 0.005, this one 1.0",
        ("--seed", 3): "the interrupted run has seed = 0, this one 3",
    }
    for words, message in refusals.items():
        result = text("--out", "run", "--resume", *words)
        assert result.code == 1
        assert message in result.err
    contents = torch.load("run/training.pt", weights_only=True)
    torch.save(contents | {"spec": contents["spec"].replace('"seed": 0', '"seed": 7')}, "run/training.pt")
    assert "has a projection with seed = 7, this one 0; is --model what it was?" in text("--out", "run", "--resume").err
    Path("run/training.pt").write_bytes(before["training.pt"][:500])
    assert "cannot read run/training.pt" in text("--out", "run", "--resume").err
    Path("run/training.pt").write_bytes(before["training.pt"])
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    assert text("--resume").err == ("unilora: error: --resume wants the folder of the interrupted run: --out FOLDER.\n")


# ---- precision and memory ---------------------------------------------------------------------------------------


def test_a_base_in_bf16_keeps_what_trains_in_float32(text):
    result = text("--dtype", "bf16", "--max-steps", 2, "--out", "run")
    assert result.code == 0, result.err
    assert "bfloat16 autocast" in result.out
    file = read_adapter("run/adapter.safetensors")
    assert {str(tensor.dtype) for tensor in file.tensors.values()} == {"float32"}
    assert any((tensor.view("uint32") & 0xFFFF).any() for tensor in file.tensors.values())  # no bfloat16 in disguise


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_a_base_in_4_bit(request, kind):
    pytest.importorskip("bitsandbytes")
    run = request.getfixturevalue(kind)
    result = run("--load-in-4bit", "--max-steps", 3, "--gradient-checkpointing", "--warmup", 0, "--out", "run")
    assert result.code == 0, result.err
    assert run("--max-steps", 3, "--warmup", 0, "--out", "full").code == 0
    assert losses("run") != losses("full")
    assert losses("run") == pytest.approx(losses("full"), rel=0.2)
    start = read_adapter(Path("run/adapter.safetensors"))
    assert not torch.equal(theta("run"), torch.from_numpy(start.spec.init()))


def test_4_bit_without_bitsandbytes(text, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert text("--load-in-4bit", "--data", "none.tsv").err == (
        "unilora: error: --load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes "
        "accelerate\n"
    )


def test_gradient_checkpointing_changes_no_number(lm):
    assert lm("--max-steps", 3, "--out", "plain").code == 0
    assert lm("--max-steps", 3, "--gradient-checkpointing", "--out", "again").code == 0
    assert losses("again") == losses("plain")
    assert torch.equal(theta("again"), theta("plain"))


def test_a_part_of_a_split(unilora, bert, tmp_path, sentences, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list([{"text": sentence, "label": label} for sentence, label in sentences])
    datasets.DatasetDict(train=data, test=data, other=data.select(range(4))).save_to_disk(tmp_path / "data")
    words = ("finetune", "text", "--model", bert, "--data", tmp_path / "data", "--device", "cpu", "--max-steps", 1)
    assert unilora(*words, "--train-split", "train[:12]", "--eval-split", "other", "--out", "run").code == 0
    assert (results()["plan"]["train_examples"], results()["plan"]["held_out_examples"]) == (12, 4)
    shutil.rmtree("run")
    result = unilora(*words, "--train-split", "train[:x]", "--out", "run")
    assert "there is no split 'train[:x]'; it has 'train', 'test', 'other'" in result.err
