"""`unilora finetune` on tiny models and made data: what it writes, and that the file gives the same model again."""

import csv
import json
import re
import shlex
import shutil
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
    assert all(float(row["loss"]) > 0 for row in rows)
    assert all(float(row["rate"]) > 0 for row in rows[1:])  # a warm-up of transformers begins at 0
    assert {"loss", "train_loss", "epoch", "step", measure} == set(metrics["final"])
    assert metrics["bytes"]["adapter"] == (folder / "adapter.safetensors").stat().st_size
    assert metrics["settings"]["epochs"] == 2
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_gives_the_same_model_again(trained, parsed, base_of, kind):
    import importlib

    from unilora_cli.tasks import models
    from unilora_cli.training import evaluating

    folder, line = trained(kind)
    task = importlib.import_module(f"unilora_cli.tasks.{kind}").task(parsed(*line))
    file = folder / "adapter.safetensors"
    base = base_of(file)
    assert base == task.base
    model, _ = models.build(base)
    models.load_adapter(base, model, file)
    task.model = model
    final = json.loads((folder / "metrics.json").read_text())["final"]
    for name, value in evaluating.evaluate(task).items():
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
    assert json.loads(metadata["modules_to_save"]) == ["classifier", "bert.pooler"]


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
    assert "unilora merge run/adapter.safetensors --out merged/" in training


def test_the_line_that_merges_says_of_the_base_what_no_file_may_say(unilora, bert, tsv):
    more = ("--model-arg", "attn_implementation=eager", "--model-arg", "hidden_dropout_prob=0.2")
    words = ("--max-steps", 1, "--out", "my run", "--device", "cpu", *more)
    training = unilora("finetune", "text", "--model", bert, "--data", tsv, *words).out
    (line,) = (line.split("merge it")[1] for line in training.splitlines() if "merge it" in line)
    said = shlex.split(line)
    given = ["unilora", "merge", "my run/adapter.safetensors", "--model-arg=attn_implementation=eager"]
    assert said == [*given, "--out", "merged/"]
    assert unilora(*said[1:3], "--out", "other").code == 1
    result = unilora(*said[1:])
    assert result.code == 0, result.err


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

    from unilora_cli.tasks import text

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
    from unilora_cli.tasks import text

    def interrupt(model, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "score", interrupt)
    result = unilora("finetune", "text", "--model", bert, "--data", tsv, "--out", "run", "--device", "cpu")
    assert (result.code, result.err) == (130, "unilora: interrupted\n")
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "stopped: interrupted"


def test_frozen_batch_normalisation_stays(unilora, images, monkeypatch):
    """Its statistics are those of the base after training, as no adapter file holds them."""
    from unilora_cli.training import trainer

    models, fit = [], trainer.fit

    def spy(trains, *arguments):
        models.append({name: tensor.clone() for name, tensor in trains.model.state_dict().items()})
        fit(trains, *arguments)
        models.append(trains.model.state_dict())

    monkeypatch.setattr(trainer, "fit", spy)
    words = ("--model", "test_resnet", "--no-pretrained", "--model-arg", "zero_init_last=false", "--data", images)
    result = unilora("finetune", "vit", *words, "--device", "cpu", "--max-steps", 2, "--out", "run")
    assert result.code == 0, result.err
    before, after = models
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(before[name].equal(after[name]) for name in statistics)


def test_normalisation_that_trains_moves():
    from torch import nn

    from unilora_cli.training.trainer import still_norms

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[0].requires_grad_(False)
    assert still_norms(model) == [model[0]]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_rises_then_falls_to_zero(unilora, bert, tsv, schedule):
    words = ("--model", bert, "--data", tsv, "--device", "cpu", "--epochs", 6, "--batch-size", 6, "--warmup", 0.2)
    assert unilora("finetune", "text", *words, "--schedule", schedule, "--out", "run").code == 0
    with Path("run/metrics.csv").open() as file:
        rates = [float(row["rate"]) for row in csv.DictReader(file)]
    plan = json.loads(Path("run/metrics.json").read_text())["plan"]
    rise = round(0.2 * plan["steps"])
    assert rates[0] == 0
    assert rates[rise] == max(rates) == pytest.approx(plan["theta_rate"], rel=1e-5)
    assert rates[: rise + 1] == sorted(rates[: rise + 1])
    assert rates[rise:] == sorted(rates[rise:], reverse=True)
    assert rates[-1] < 0.05 * max(rates)


# ---- what goes wrong beside the adapter, or after it is trained ------------------------------------------------------


@pytest.fixture
def short(unilora, bert, tsv):
    """A run of two epochs of five steps in the folder run."""
    words = ("finetune", "text", "--model", bert, "--data", tsv, "--epochs", 2, "--batch-size", 8, "--device", "cpu")
    return lambda *more: unilora(*words, "--out", "run", *more)


def at_epoch(monkeypatch, number, action):
    """Do this after the evaluation of an epoch, before anything is written."""
    from unilora_cli.training import recorder as report

    begin = report.Recorder.epoch

    def epoch(recorder, *arguments):
        if arguments[0] == number:
            action(recorder)
        begin(recorder, *arguments)

    monkeypatch.setattr(report.Recorder, "epoch", epoch)


def test_an_evaluation_that_fails_does_not_lose_the_epoch(short, monkeypatch):
    import torch

    from unilora_cli.training import evaluating

    seen = []

    def fails(task, settings):
        seen.append(task.adapter.theta_d.detach().clone())
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(evaluating, "evaluate", fails)
    result = short()
    assert result.code == 1
    assert "evaluation failed; the adapter is in run/adapter.safetensors\n" in result.out
    assert result.err.startswith("unilora: error: out of memory (no memory)")
    assert torch.equal(torch.from_numpy(read_adapter("run/adapter.safetensors").theta_d), seen[0])


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'matplotlib'"), OSError(28, "No space left")])
def test_a_picture_that_cannot_be_drawn_costs_nothing_else(short, monkeypatch, error):
    from unilora_cli.training import recorder as report

    def fails(*_):
        raise error

    monkeypatch.setattr(report, "_draw", fails)
    result = short()
    assert result.code == 1
    assert "held-out accuracy" in result.out.split("result")[1]
    assert result.err.startswith("unilora: error: the adapter is in run/adapter.safetensors, but this could not be wri")
    assert "loss.png (" in result.err
    assert result.err.count("\n") == 1
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "finished"
    assert read_adapter("run/adapter.safetensors").spec.d


def test_a_folder_that_is_deleted_meanwhile_is_made_again(short, monkeypatch):
    at_epoch(monkeypatch, 2, lambda recorder: shutil.rmtree(recorder.folder))
    result = short()
    assert result.code == 0, result.err
    assert {path.name for path in Path("run").iterdir()} == {
        *("adapter.safetensors", "loss.png", "metrics.csv", "metrics.json", "summary.csv")
    }
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 11


def test_an_adapter_that_finds_no_place_is_kept_elsewhere(short, monkeypatch):
    import torch

    seen = []

    def replaced(recorder):
        seen.append(recorder.task.adapter.theta_d.detach().clone())
        shutil.rmtree(recorder.folder)
        recorder.folder.write_text("a file")

    at_epoch(monkeypatch, 2, replaced)
    result = short()
    assert result.code == 1
    says = r"unilora: error: run/adapter\.safetensors: .*; the adapter of this epoch is in (.*)\.\n"
    found = re.fullmatch(says, result.err)
    assert found, result.err
    kept = Path(found[1])
    assert torch.equal(torch.from_numpy(read_adapter(kept).theta_d), seen[0])
    kept.unlink()


def test_what_cannot_be_written_beside_the_adapter_ends_no_training(short, monkeypatch):
    """A disk that has room for the adapter only, and none for the state of the run."""
    from unilora_cli import outputs
    from unilora_cli.training import checkpoints
    from unilora_cli.training import recorder as report

    def full(*_):
        raise OSError(28, "No space left on device")

    begin = report.Recorder._open

    def then_full(recorder, fresh):
        begin(recorder, fresh)
        for module in (checkpoints, outputs, report):
            monkeypatch.setattr(module, "write_file", full)
        monkeypatch.setattr(report, "csv_text", full)

    monkeypatch.setattr(report.Recorder, "_open", then_full)
    result = short()
    assert result.code == 1
    assert result.out.count("metrics.csv cannot be written (No space left on device); going on") == 1
    for name in ("metrics.csv", "metrics.json", "summary.csv", "loss.png"):
        assert f"{name} (No space left on device)" in result.err
    assert "unilora-training (" not in result.err
    assert "epoch 2" in result.out
    assert read_adapter("run/adapter.safetensors").spec.d


def test_nobody_has_to_read_what_is_printed(short, monkeypatch):
    from unilora_cli.training import recorder as report

    def closed(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(report, "say", closed)
    assert short().err == "unilora: error: Broken pipe\n"
    assert json.loads(Path("run/metrics.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("out", "message"),
    [("file", "this is a file; --out wants a folder"), ("file/run", "file"), ("a" * 256, "File name too long")],
)
def test_the_place_is_tried_before_the_model_is_loaded(short, out, message, tmp_path):
    Path(tmp_path, "file").touch()
    result = short("--model", "there-is-none", "--out", out)
    assert result.code == 1
    assert message in result.err
    assert "there-is-none" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_long_name_of_model_and_data_makes_a_folder(unilora, bert, tsv, tmp_path):
    data = tmp_path / f"{'ä' * 120}.tsv"
    data.write_bytes(tsv.read_bytes())
    assert unilora("finetune", "text", "--model", bert, "--data", data, "--max-steps", 1, "--device", "cpu").code == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("bert-ää")


# ---- what is said before training ------------------------------------------------------------------------------------


POSITIONS = {
    "Roberta": {},
    "MPNet": {},
    "Longformer": {"attention_window": 16},
    "Data2VecText": {},
    "Esm": {"position_embedding_type": "absolute", "mask_token_id": 3},
    "IBert": {},
    "Luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "Bert": {},
    "DebertaV2": {},
    "GPT2": {},
    "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_length_is_the_longest_that_runs(name):
    import torch
    import transformers

    from unilora_cli.tasks.adapting import fit_length, length_note

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 66, "pad_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**sizes, **POSITIONS[name])
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    length = fit_length(config, 100)
    assert length == (66 if name in ("Bert", "DebertaV2", "GPT2", "OPT") else 64)
    with torch.no_grad():
        model(torch.full((1, length), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, length + 1), 7))
    assert fit_length(config, 20) == 20
    assert length_note(length, 100) == (
        "tokens per example",
        f"at most {length}, as the model has positions for no more (--length 100)",
    )


def test_a_model_without_positions_takes_what_is_wanted():
    import transformers

    from unilora_cli.tasks.adapting import fit_length

    for config in (transformers.XLNetConfig(d_model=32, n_head=4, n_layer=1), transformers.MambaConfig()):
        assert fit_length(config, 5000) == 5000


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_a_token_without_an_embedding_is_refused_by_name(unilora, kind, request, tmp_path):
    """As after tokenizer.add_special_tokens on a base that was not made larger."""
    import transformers

    base = request.getfixturevalue({"text": "bert", "lm": "llama"}[kind])
    data = request.getfixturevalue({"text": "tsv", "lm": "dialogues"}[kind])
    shutil.copytree(base, tmp_path / "base")
    tokens = transformers.AutoTokenizer.from_pretrained(base)
    rows = len(tokens)
    tokens.add_special_tokens({"pad_token": "<new pad>"})
    tokens.save_pretrained(tmp_path / "base")
    words = ("--model", tmp_path / "base", "--data", data, "--device", "cpu", "--out", "run")
    result = unilora("finetune", kind, *words)
    assert result.code == 1
    assert (
        f"the tokenizer gives '<new pad>' the number {rows}, and the model has embeddings for 0 to {rows - 1}. Take"
        in result.err
    )
    assert f"resize_token_embeddings({rows + 1})" in result.err
    assert not Path("run").exists()


WRONG = {
    ("--method-arg", "vectors=3"): "the method 'uni-lora' has no option 'vectors'",
    ("--method", "fourierft", "--rank", "4"): "the method 'fourierft' has no rank",
    ("--method", "vb-lora", "--method-arg", "vectors=many"): "vectors must be a positive integer, got 'many'",
    ("--method-arg", "seed=3"): "--method-arg seed: no option of a method; say --seed",
    ("--start", "zero"): "would leave every factor at zero",
    ("--bound", "1e39"): "bound must be a positive float32 number",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_option_of_the_method_is_said_before_anything_is_read(unilora, kind):
    for words, message in WRONG.items():
        result = unilora("finetune", kind, "--model", "there-is-none", "--data", "none.tsv", "--device", "cpu", *words)
        assert result.code == 1, words
        assert message in result.err, words
        assert "none.tsv" not in result.err, words


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "vb-lora", "--method-arg", "length=3", "--method-arg", "vectors=7"),
        ("--method", "lora-xs", "--rank", 9),
        ("--rank", 5000),
        ("--rank", 2**21),
        ("--method", "fourierft", "--method-arg", "frequencies=77"),
    ],
)
def test_options_that_some_model_may_have_are_not_refused_beforehand(parsed, words):
    from unilora_cli.tasks.adapting import check_method

    check_method(parsed("finetune", "text", "--model", "x", "--data", "y", *words))


LABELS = ["²", "٣", "1_000", "+1", "1e3", "True", "nan", "9" * 400, "-0", "½", "Ⅳ", "0x10", "1,5"]


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_any_word_is_a_class(parsed, tmp_path, ending):
    from unilora_cli.data.texts import load_texts

    write_labels(tmp_path / f"a.{ending}", LABELS * 2)
    texts = load_texts(parsed("finetune", "text", "--model", "x", "--data", tmp_path / f"a.{ending}"))
    assert sorted(texts.classes) == sorted(label for label in map(nfc, LABELS))


def nfc(text):
    import unicodedata

    return unicodedata.normalize("NFC", text)


def write_labels(path, labels):
    rows = [(f"the film {i}", label) for i, label in enumerate(labels)]
    if path.suffix == ".tsv":
        path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    else:
        path.write_text("".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows))


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
@pytest.mark.parametrize("label", [*(label for label in LABELS if label not in ("+1", "1e3", "-0")), "", "inf"])
def test_what_is_no_number_is_no_label_of_a_regression(parsed, tmp_path, ending, label):
    from unilora_cli.console import CommandError
    from unilora_cli.data.texts import load_texts

    write_labels(tmp_path / f"a.{ending}", ["1", " 2.5 ", "1e3", "-0", ".5", label])
    with pytest.raises(CommandError, match="record 6: expected a number as the label, got"):
        load_texts(parsed("finetune", "text", "--model", "x", "--data", tmp_path / f"a.{ending}", "--regression"))


def test_true_is_no_number(parsed, tmp_path):
    from unilora_cli.console import CommandError
    from unilora_cli.data.texts import load_texts

    write_labels(tmp_path / "a.jsonl", [1, 2, True])
    with pytest.raises(CommandError, match="record 3: expected a number as the label, got True"):
        load_texts(parsed("finetune", "text", "--model", "x", "--data", tmp_path / "a.jsonl", "--regression"))


@pytest.mark.parametrize("part", ["train[:²]", "train[:]", "train[:-1]", "train[:1", "train[:x]"])
def test_a_part_of_a_split_is_counted_in_digits(unilora, bert, tmp_path, part):
    import datasets

    rows = datasets.Dataset.from_dict({"sentence": ["the film", "the plot"], "label": ["good", "bad"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    words = ("--model", bert, "--data", tmp_path / "data", "--device", "cpu", "--train-split", part)
    assert f"there is no split '{part}'" in unilora("finetune", "text", *words).err


def words_of_help(kind):
    from unilora_cli.options.finetune import WORDS

    return [word.split(" of ")[0] for word in WORDS[kind].split(", ")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_that_the_help_recommends_for_targets_work(
    unilora, kind, vit_model, images, bert, tsv, llama, dialogues
):
    sources = {
        "vit": (*vit_model, "--data", images),
        "text": ("--model", bert, "--data", tsv),
        "lm": ("--model", llama, "--data", dialogues, "--length", 24),
    }
    assert len(words_of_help(kind)) > 1
    for word in words_of_help(kind):
        words = (*sources[kind], "--device", "cpu", "--max-steps", 1, "--targets", word, "--out", f"run-{word}")
        result = unilora("finetune", kind, *words)
        assert result.code == 0, (word, result.err)


ODD = {
    "vit": {
        ("--crop-pct", "100"): "cannot make an input of the first image",
        ("--crop-pct", "1e-9"): "cannot make an input of the first image",
        ("--model-arg", "num_classes=4"): "--model-arg num_classes=4: by the data it is 3; leave it out",
        ("--device", "meta"): "--device meta: nothing is computed there",
    },
    "text": {
        ("--model-arg", "num_labels=5"): "--model-arg num_labels=5: by the data it is 2; leave it out",
        ("--model-arg", "hidden_dropout_prob=many"): "cannot build the model",
        ("--device", "meta"): "--device meta: nothing is computed there",
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_options_are_said_in_a_line(unilora, kind, vit_model, images, bert, tsv):
    source = (*vit_model, "--data", images) if kind == "vit" else ("--model", bert, "--data", tsv)
    for words, message in ODD[kind].items():
        result = unilora("finetune", kind, *source, "--device", "cpu", "--max-steps", 1, "--out", "run", *words)
        assert result.code == 1, words
        assert message in result.err, words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--head-rate", "1e300"), "expected a number above 0, and at most 1e30"),
        (("--theta-rate", "1e38"), "expected a number above 0, and at most 1e30"),
        (("--batch-size", 2**63), "expected a number below 2^63"),
        (("--model-arg", "x={(1, 2): 3}"), "x: expected a text, a finite number"),
        (("--model-arg", "x=1e999"), "x: expected a text, a finite number"),
        (("--model-arg", "x={1, 2}"), "x: expected a text, a finite number"),
    ],
)
def test_values_that_nothing_could_hold(unilora, words, message):
    result = unilora("finetune", "text", "--model", "x", "--data", "y", *words)
    assert result.code == 2
    assert message in result.err


def test_a_base_that_no_file_can_state_is_refused_before_training(short, monkeypatch):
    """The adapter is saved and read once before the work that it is saved after."""
    from unilora_cli.training import trainer

    monkeypatch.setattr(trainer, "fit", lambda *_: pytest.fail("it trained"))
    result = short("--model-arg", "pad_token_id=-7")
    assert result.code == 1
    assert "base_arguments.pad_token_id: expected 0" in result.err
    assert not Path("run/adapter.safetensors").exists()


def test_a_checkpoint_in_float16_trains_on_a_cpu(short):
    result = short("--model-arg", "dtype=float16")
    assert result.code == 0, result.err
