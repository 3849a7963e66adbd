"""How training goes: accumulation, clipping, precision, metrics, the best epoch, and going on after an interruption."""

import csv
import json
import math
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
def vit(unilora, vit_model, images):
    words = (*vit_model, "--data", images, "--augment", "none", "--batch-size", 5, "--device", "cpu")
    return lambda *more: unilora("finetune", "vit", *words, *more)


@pytest.fixture
def lm(unilora, llama, dialogues):
    words = ("--model", llama, "--data", dialogues, "--length", 24, "--device", "cpu")
    return lambda *more: unilora("finetune", "lm", *words, *more)


def results(folder="run"):
    return json.loads(Path(folder, "metrics.json").read_text())


def losses(folder):
    with Path(folder, "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def contents_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


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

    def spy(parameters, norm, **options):
        parameters = [p for p in parameters if p.grad is not None]
        before = clip(parameters, norm, **options)
        seen.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    assert text("--max-grad-norm", 1e-3, "--max-steps", 2, "--out", "run").code == 0
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_rates_and_weight_decay_reach_the_optimiser(text, monkeypatch):
    from unilora_cli.training.trainer import AdapterTrainer

    made = []
    create = AdapterTrainer.create_optimizer

    def spy(trains, *arguments):
        made.append(create(trains, *arguments))
        return made[-1]

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", spy)
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


def test_a_regression_learns_and_its_file_gives_the_same_model_again(unilora, bert, scored, parsed, base_of):
    from unilora_cli.tasks import models, text
    from unilora_cli.training import evaluating

    line = ("finetune", "text", "--model", bert, "--data", scored, "--eval-data", scored, "--regression")
    line += ("--epochs", 12, "--batch-size", 8, "--head-rate", 2e-2, "--device", "cpu", "--out", "run")
    result = unilora(*line)
    assert result.code == 0, result.err
    final = results()["final"]
    assert set(final) == {"loss", "train_loss", "epoch", "step", "pearson", "spearman"}
    assert final["pearson"] > 0.7
    file = Path("run/adapter.safetensors")
    base = base_of(file)
    model, _ = models.build(base)
    assert model.config.num_labels == 1
    models.load_adapter(base, model, file)
    task = text.task(parsed(*line))
    task.model = model
    scores = evaluating.evaluate(task)
    assert scores == pytest.approx({name: final[name] for name in scores}, rel=1e-4)


@pytest.mark.parametrize(("value", "shown"), [("many", "'many'"), ("nan", "'nan'"), ("inf", "'inf'"), ("", "''")])
def test_labels_that_are_no_numbers(text, tmp_path, value, shown):
    (tmp_path / "a.tsv").write_text(f"sentence\tlabel\nthe film\t1.5\nthe plot\t{value}\n")
    result = text("--data", tmp_path / "a.tsv", "--regression", "--out", "run")
    assert result.err == (f"unilora: error: {tmp_path}/a.tsv, record 2: expected a number as the label, got {shown}.\n")
    assert not Path("run").exists()


def test_metrics_are_those_of_the_textbook():
    import numpy as np

    from unilora_cli.training.metrics import CLASSES, NUMBERS, PERPLEXITY, Outcome

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
    from unilora_cli.training import evaluating

    scores, seen = iter([0.1, 0.3, 0.2]), []

    def evaluated(task, settings):
        seen.append(task.adapter.theta_d.detach().clone())
        return {"loss": 1.0, "mcc": next(scores), "accuracy": 0.5}

    monkeypatch.setattr(evaluating, "evaluate", evaluated)
    result = text("--epochs", 3, "--keep", keep, "--metric", "mcc, accuracy", "--out", "run")
    assert result.code == 0, result.err
    assert results()["final"]["epoch"] == epoch
    assert torch.equal(theta("run"), seen[epoch - 1])
    assert ("2, the best of 3" in result.out) == (keep == "best")


def test_the_best_perplexity_is_the_lowest(lm, monkeypatch):
    from unilora_cli.training import evaluating

    scores = iter([9.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(evaluating, "evaluate", lambda *_: {"loss": 1.0, "perplexity": next(scores)})
    assert lm("--epochs", 3, "--keep", "best", "--out", "run").code == 0
    assert results()["final"]["perplexity"] == 4.0


# ---- stopping early --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 4)])
def test_training_stops_where_the_metric_gets_no_better(text, monkeypatch, keep, kept):
    from unilora_cli.training import evaluating

    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(evaluating, "evaluate", lambda *_: {"loss": 1.0, "accuracy": next(scores)})
    result = text("--epochs", 5, "--patience", 2, "--keep", keep, "--out", "run")
    assert result.code == 0, result.err
    why = "after epoch 4: accuracy has not been better than in epoch 2"
    assert f"stopped early      {why}" in result.out
    metrics = results()
    assert (metrics["status"], metrics["stopped_early"], metrics["final"]["epoch"]) == ("finished", why, kept)
    assert len(losses("run")) == metrics["plan"]["steps"] * 4 // 5


def test_a_resumed_run_remembers_how_long_it_has_waited(text, monkeypatch):
    from unilora_cli.training import evaluating

    scores = iter([0.3, 0.2, Interrupted(), 0.1, 0.9])

    def evaluated(*_):
        score = next(scores)
        if isinstance(score, Interrupted):
            raise score
        return {"loss": 1.0, "accuracy": score}

    monkeypatch.setattr(evaluating, "evaluate", evaluated)
    words = ("--epochs", 5, "--patience", 2, "--out", "run")
    assert text(*words).code == 130
    assert text(*words, "--resume").code == 0
    assert results()["stopped_early"] == "after epoch 3: accuracy has not been better than in epoch 1"


# ---- going on ---------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_a_resumed_run_is_the_uninterrupted_one(request, kind, monkeypatch):
    from unilora_cli.training import evaluating

    run = request.getfixturevalue(kind)
    words = ("--epochs", 3, "--batch-size", 8, "--keep", "best", "--out")
    assert run(*words, "whole").code == 0
    evaluate, calls = evaluating.evaluate, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == (4 if kind == "lm" else 3):  # in the third epoch
            raise Interrupted
        return evaluate(*arguments)

    monkeypatch.setattr(evaluating, "evaluate", interrupt)
    assert run(*words, "parts").code == 130
    assert len(losses("parts")) == len(losses("whole"))
    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    result = run(*words, "parts", "--resume")
    assert result.code == 0, result.err
    assert losses("parts") == losses("whole")
    assert torch.equal(theta("parts"), theta("whole"))
    without_time = [[{**row, "seconds": 0} for row in results(name)["epochs"]] for name in ("parts", "whole")]
    assert without_time[0] == without_time[1]
    assert not Path("parts/unilora-training").exists()
    assert "there is no interrupted run to --resume in it" in run(*words, "parts", "--resume").err


def test_a_resume_that_does_not_fit_is_refused_and_changes_nothing(text, unilora, tsv, llama, monkeypatch, tmp_path):
    from unilora_cli.training import evaluating

    evaluate, calls = evaluating.evaluate, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return evaluate(*arguments)

    monkeypatch.setattr(evaluating, "evaluate", interrupt)
    assert text("--out", "run").code == 130
    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    before = contents_of("run")
    refusals = {
        ("--rank", 8): "run: the interrupted run has rank = its default, this one 8; --resume with the same arguments",
        ("--lora-rate", 1): "the interrupted run has lora_rate = 0.005, this one 1.0",
        ("--seed", 3): "the interrupted run has seed = 0, this one 3",
    }
    for words, message in refusals.items():
        result = text("--out", "run", "--resume", *words)
        assert result.code == 1
        assert message in result.err
    (place,) = [
        path.parent for path in Path("run/unilora-training").glob("checkpoint-*/run.json") if "-0/" not in str(path)
    ]
    whole = (place / "run.json").read_text()
    (place / "run.json").write_text(whole.replace('"seed": 0', '"seed": 7'))
    assert "has a projection with seed = 7, this one 0; is --model what it was?" in text("--out", "run", "--resume").err
    (place / "run.json").write_text(whole[:500])
    assert f"{place}/run.json: not JSON that can be read" in text("--out", "run", "--resume").err
    (place / "run.json").write_text(whole)
    assert contents_of("run") == before
    state = (place / "optimizer.pt").read_bytes()
    (place / "optimizer.pt").write_bytes(state[:500])
    assert f"cannot go on from {place}: " in text("--out", "run", "--resume").err
    (place / "optimizer.pt").unlink()
    assert f"{place}: optimizer.pt is gone, and the run cannot go on" in text("--out", "run", "--resume").err
    (place / "optimizer.pt").write_bytes(state)
    steps = {Path("run/metrics.csv"): b""}  # those after the checkpoint are gone, which a resume begins with
    assert contents_of("run") | steps == before | steps
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


def test_gradient_checkpointing_of_timm_changes_no_number(vit):
    assert vit("--max-steps", 3, "--out", "plain").code == 0
    assert vit("--max-steps", 3, "--gradient-checkpointing", "--out", "again").code == 0
    assert losses("again") == losses("plain")
    assert torch.equal(theta("again"), theta("plain"))


@pytest.mark.parametrize("name", ["pit_ti_224", "a model of one's own"])
def test_a_model_without_gradient_checkpointing(name):
    import timm

    from unilora_cli.console import CommandError
    from unilora_cli.tasks.adapting import checkpoint_activations

    model = timm.create_model(name) if name.startswith("pit") else torch.nn.Linear(2, 2)
    with pytest.raises(CommandError, match=f"^--gradient-checkpointing: timm has none for {name}; leave it out"):
        checkpoint_activations(model, name)


def test_float16_on_a_cpu_is_refused(vit):
    """accelerate has it on GPUs only; with `--bf16` a CPU has what it is for."""
    result = vit("--fp16", "--out", "run")
    assert result.err == "unilora: error: --fp16 is for GPUs, and this run is on cpu; say --bf16, or neither.\n"
    assert not Path("run").exists()


def test_bfloat16_trains_as_float32_does(vit):
    words = ("--epochs", 2, "--max-grad-norm", 1.0, "--lora-rate", 1e-3, "--out")
    assert vit(*words, "full").code == 0
    result = vit(*words, "half", "--bf16")
    assert result.code == 0, result.err
    assert "10 on cpu, bfloat16 autocast\n" in result.out
    assert losses("half") != losses("full")
    assert losses("half") == pytest.approx(losses("full"), rel=3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 is for GPUs")
def test_float16_trains_as_float32_does(vit):
    words = ("--device", "cuda", "--epochs", 2, "--max-grad-norm", 1.0, "--lora-rate", 1e-3, "--out")
    assert vit(*words, "full").code == 0
    result = vit(*words, "half", "--fp16")
    assert result.code == 0, result.err
    assert ", float16 autocast\n" in result.out
    assert losses("half") != losses("full")
    assert losses("half") == pytest.approx(losses("full"), rel=1e-2)


def test_gradients_that_overflow_float16_are_left_out_and_told(vit, monkeypatch):
    """Where accelerate says that it has taken no step, the warm-up does not go on."""
    import accelerate.optimizer

    left = iter([True] * 14)  # the Trainer asks once a step, and `Watch` too
    monkeypatch.setattr(
        accelerate.optimizer.AcceleratedOptimizer, "step_was_skipped", property(lambda _: next(left, False))
    )
    result = vit("--epochs", 8, "--max-grad-norm", 1.0, "--warmup", 0.5, "--out", "run")
    assert result.code == 0, result.err
    skipped = results()["skipped_steps"]
    assert skipped == 7
    assert f"skipped steps      {skipped} of 40: their gradient overflowed float16" in result.out
    with Path("run/metrics.csv").open() as file:
        rates = [float(row["rate"]) for row in csv.DictReader(file)]
    assert len(set(rates[: skipped + 1])) == 1
    assert rates[skipped + 1] > rates[0]
    assert all(map(math.isfinite, losses("run")))
    assert not torch.equal(theta("run"), torch.from_numpy(read_adapter("run/adapter.safetensors").spec.init()))


def test_one_kind_of_autocast_only(vit):
    assert vit("--fp16", "--bf16").err == (
        "unilora: error: --fp16 and --bf16 exclude each other; where a recipe sets one, take it back: --no-bf16.\n"
    )


@pytest.mark.traces
def test_a_compiled_model_trains_as_the_plain_one(vit):
    """Also with a last batch that is smaller; the adapter is that of the model itself."""
    assert vit("--epochs", 2, "--out", "plain").code == 0
    result = vit("--epochs", 2, "--compile", "aot_eager", "--out", "compiled")
    assert result.code == 0, result.err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-4)
    torch.testing.assert_close(theta("compiled"), theta("plain"), rtol=1e-3, atol=1e-5)
    names = [read_adapter(f"{run}/adapter.safetensors").tensors.keys() for run in ("plain", "compiled")]
    assert names[0] == names[1]


def test_a_backend_that_torch_does_not_have(vit):
    assert "--compile fast: torch has no such backend; it has " in vit("--compile", "fast", "--out", "run").err
    assert not Path("run").exists()


def test_a_summary_of_the_epochs_has_the_columns_of_timm(vit):
    assert vit("--epochs", 2, "--out", "run").code == 0
    with Path("run/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_accuracy", "lr"]
    for row, known in zip(rows, results()["epochs"], strict=True):
        assert [float(row[name]) for name in ("epoch", "train_loss", "eval_loss", "eval_accuracy")] == [
            known[name] for name in ("epoch", "train_loss", "loss", "accuracy")
        ]
        assert float(row["train_loss"]) == pytest.approx(
            sum(losses("run")[known["step"] - 5 : known["step"]]) / 5, rel=1e-4
        )


def test_the_plan_says_how_many_examples_make_a_step(vit):
    result = vit("--accumulate", 3, "--max-steps", 1, "--out", "run")
    assert "batch             15 examples per step = 5 × 3 batches\n" in result.out
    assert results()["plan"]["batch"] == 15


@pytest.mark.usefixtures("data_cache")
def test_a_part_of_a_split(unilora, bert, tmp_path, sentences):
    import datasets

    data = datasets.Dataset.from_list([{"text": sentence, "label": label} for sentence, label in sentences])
    datasets.DatasetDict(train=data, test=data, other=data.select(range(4))).save_to_disk(tmp_path / "data")
    words = ("finetune", "text", "--model", bert, "--data", tmp_path / "data", "--device", "cpu", "--max-steps", 1)
    assert unilora(*words, "--train-split", "train[:12]", "--eval-split", "other", "--out", "run").code == 0
    assert (results()["plan"]["train_examples"], results()["plan"]["held_out_examples"]) == (12, 4)
    shutil.rmtree("run")
    result = unilora(*words, "--train-split", "train[:x]", "--out", "run")
    assert "there is no split 'train[:x]'; it has 'train', 'test', 'other'" in result.err
