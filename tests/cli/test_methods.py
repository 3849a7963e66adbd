"""`unilora finetune --method`: trained, written, inspected, converted, merged, and gone on with."""

import json
from pathlib import Path

import numpy as np
import pytest

from unilora_core import read_adapter, save_adapter
from unilora_core.frames import Sizes
from unilora_core.header import write_targets
from unilora_core.methods import METHODS, plan_spec

torch = pytest.importorskip("torch")
pytest.importorskip("datasets")
pytest.importorskip("timm")

FRAMES = {  # a method of each frame, with what suits layers of 32 × 32
    "lora": (),
    "tied-lora": ("--rank", 2),
    "vera": ("--rank", 8, "--method-arg", "initial=0.5"),
    "lora-xs": ("--rank", 4),
    "vb-lora": ("--method-arg", "vectors=16", "--method-arg", "length=16"),
    "fourierft": ("--method-arg", "frequencies=30", "--method-arg", "scaling=20"),
    "gpart": ("--d", 50),
}
DENSE = ("fourierft", "gpart")
NAMES = {"lora": "pair", "tied-lora": "tied", "vera": "scaled", "lora-xs": "core", "vb-lora": "rows"}
NAMES |= {"fourierft": "spectrum", "gpart": "dense"}


@pytest.fixture
def text(unilora, bert, tsv):
    return lambda *words: unilora("finetune", "text", "--model", bert, "--data", tsv, "--device", "cpu", *words)


def metrics(folder="run"):
    return json.loads(Path(folder, "metrics.json").read_text())


def theta(folder):
    return torch.from_numpy(read_adapter(Path(folder, "adapter.safetensors")).theta_d)


# ---- a run and its file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "vit"])
@pytest.mark.parametrize("method", FRAMES)
def test_a_run_and_what_becomes_of_its_file(trained, unilora, base_of, tmp_path, kind, method):
    from unilora_cli.tasks import models

    folder, _ = trained(kind, "--method", method, *FRAMES[method], "--epochs", 6)
    plan, file = metrics(folder)["plan"], folder / "adapter.safetensors"
    assert (plan["method"], read_adapter(file).spec.frame) == (method, NAMES[method])
    losses = [row["train_loss"] for row in metrics(folder)["epochs"] if "train_loss" in row]
    assert losses[-1] < losses[0]
    assert ("adapter_as_lora" in metrics(folder)["bytes"]) == (method == "lora")

    shown = unilora("inspect", file)
    assert (shown.code, shown.err) == (0, "")
    assert f"{method}: frame {NAMES[method]}" in shown.out
    assert f"targets: {plan['targets']}\n" in shown.out

    merged = unilora("merge", file, "--out", "merged")
    assert merged.code == 0, merged.err
    base = base_of(file)
    adapted, _ = models.build(base)
    models.load_adapter(base, adapted, file)
    adapted.unilora.detach(merge=True)
    found = {}
    for path in Path("merged").glob("*.safetensors"):
        from safetensors.torch import load_file

        found |= load_file(path)
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)

    converted = unilora("convert", file, "--to", "lora", "lora")
    if method in DENSE:
        assert converted.err == (
            f"unilora: error: export_lora: the frame {NAMES[method]!r} makes whole weights, which no plain LoRA holds; "
            "merge the adapter into the base model instead.\n"
        )
    assert (converted.code, Path("lora").exists()) == ((1, False) if method in DENSE else (0, True))
    if kind == "text":
        refused = unilora("convert", file, "--to", "peft-unilora", "peft")
        assert "error: save_peft: PEFT knows " in refused.err
        assert refused.err.count("\n") == 1


def test_the_plan_says_what_the_method_is(text):
    result = text("--method", "vera", "--rank", 8, "--max-steps", 1, "--out", "run")
    assert result.code == 0, result.err
    plan = metrics()["plan"]
    assert plan["theta_rate"] == pytest.approx(10 * metrics()["settings"]["lora_rate"])
    assert "vera (grouping identity, frame scaled, initial 0.1, rank 8), seed 0, start zero" in result.out
    assert "1 of the grouping identity × 10 of the frame scaled" in result.out
    assert "as LoRA" not in result.out.partition("\nresult\n")[2]


def test_a_rank_for_each_target(text, tmp_path):
    """On the command line, in a recipe, and when a run is gone on with."""
    words = ("--max-steps", 1, "--out", "run")
    result = text("--rank", "query=8, value=2", *words)
    assert result.code == 0, result.err
    shapes = read_adapter("run/adapter.safetensors").spec.layout.shapes
    assert {shape[0] for name, shape in shapes.items() if name.endswith("query.A")} == {8}
    assert {shape[0] for name, shape in shapes.items() if name.endswith("value.A")} == {2}
    assert metrics()["settings"]["rank"] == {"query": 8, "value": 2}
    recipe = tmp_path / "ranks.toml"
    recipe.write_text('task = "text"\nrank = "query=8,value=2"\n')
    again = text("--recipe", recipe, "--overwrite", *words)
    assert again.code == 0, again.err
    assert read_adapter("run/adapter.safetensors").spec.layout.shapes == shapes


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("query=8,query=2", "expected a rank, or NAME=RANK of each target once, got 'query=8,query=2'"),
        ("query=8,2", "expected a rank, or NAME=RANK of each target once, got 'query=8,2'"),
        ("=8", "expected a rank, or NAME=RANK of each target once, got '=8'"),
        ("query=0", "expected a whole number above 0, got '0'"),
        ("query=8", "there is none for 'bert.encoder.layer.0.attention.self.value' in {'query': 8}; add its name"),
    ],
)
def test_ranks_that_fit_no_targets(text, said, error):
    result = text("--rank", said, "--out", "run")
    assert result.code != 0
    assert error in result.err
    assert not Path("run").exists()


def test_another_grouping_in_the_place_of_the_methods_own(text):
    words = ("--method", "vera", "--rank", 8, "--grouping", "balanced", "--d", 20, "--max-steps", 1, "--out", "run")
    result = text(*words)
    assert result.code == 0, result.err
    assert "no published method (grouping balanced, frame scaled" in result.out
    assert (metrics()["plan"]["method"], metrics()["plan"]["d"]) == (None, 20)


def test_a_pair_under_another_grouping_is_uni_lora(text):
    assert "uni-lora (grouping iid, frame pair)" in text("--grouping", "iid", "--max-steps", 1, "--out", "run").out


# ---- inspect ---------------------------------------------------------------------------------------------------------

LAYERS = {f"layers.{i}.{name}": Sizes(16, 12 if name == "v" else 16) for i in range(2) for name in ("q", "v")}


@pytest.fixture
def written(tmp_path):
    """written(method): a file made with the core alone."""

    def make(method, **changes):
        small = {"vb-lora": {"vectors": 8, "length": 4}, "fourierft": {"frequencies": 10}}.get(method, {})
        rank = {"rank": 4} if METHODS[method].rank else {}
        spec = plan_spec(LAYERS.items(), method=method, options=small, **rank | changes)
        kept = {
            f"frozen.{name}.{key}": np.ones(shape, np.float32)
            for name, sizes in LAYERS.items()
            for key, shape in spec.form.kept(sizes, spec.chosen).items()
        }
        rows = [(n, n, 0, False, None, s.in_features, s.out_features, 0) for n, s in LAYERS.items()]
        rows = [row[:4] for row in rows] if spec.frame == "pair" else rows
        path = tmp_path / "a.safetensors"
        save_adapter(path, spec, spec.init(), tensors=kept, metadata=write_targets(rows))
        return path, spec

    return make


@pytest.mark.parametrize("method", METHODS)
def test_inspect_of_every_method(unilora, written, method):
    path, spec = written(method)
    facts = json.loads(unilora("inspect", path, "--json").out)
    assert (facts["method"], facts["frame"], facts["options"]) == (method, spec.frame, spec.chosen)
    assert list(facts["targets"]) == list(LAYERS)
    shapes = {name: pieces for place in ("targets", "shared") for name, pieces in facts[place].items()}
    assert {f"{n}.{p}": tuple(s) for n, pieces in shapes.items() for p, s in pieces.items()} == spec.layout.shapes
    assert (facts["bytes_as_lora"] is None) == (spec.frame != "pair")
    assert len(facts["frozen"]) == (8 if spec.frame == "core" else 0)
    shown = unilora("inspect", path).out
    assert f"method       {method}: frame {spec.frame}" in shown
    assert ("LoRA parameters" in shown) == (spec.frame == "pair")
    assert "targets: 4\n" in shown


def test_inspect_tells_what_is_shared_and_what_is_frozen(unilora, written):
    shown = unilora("inspect", written("tied-lora")[0]).out
    assert "targets: 4\n  2 ×  layers.*.q  u 4, v 16\n  2 ×  layers.*.v  u 4, v 12\n" in shown
    assert "shared by all targets of a size\n  1 ×  shared.16x16  A 4 × 16, B 16 × 4\n" in shown
    shown = unilora("inspect", written("lora-xs")[0]).out
    assert "frozen, made of the base's weights: 8 tensors, 1,920 bytes" in shown
    assert "saved in full" not in shown


@pytest.mark.parametrize(
    ("method", "start"), [("lora", "identity, U(-"), ("vera", "zero\n"), ("vb-lora", "paper\n"), ("gpart", "zero\n")]
)
def test_inspect_says_where_training_started(unilora, written, method, start):
    assert f"\nstart        {start}" in unilora("inspect", written(method)[0]).out


# ---- wrong usage -----------------------------------------------------------------------------------------------------

WRONG = {
    "a rank where there is none": (
        ("--method", "gpart", "--rank", 4),
        "the method 'gpart' has no rank, got rank = 4; le",
    ),
    "d where it follows": (
        ("--method", "lora", "--d", 7),
        "the method 'lora' trains d = 1024 numbers here, got d = 7; ",
    ),
    "an option of another": (
        ("--method-arg", "vectors=8"),
        "the method 'uni-lora' has no option 'vectors'; it has none.",
    ),
    "no number": (("--method", "vera", "--method-arg", "initial=a"), "initial must be a positive number, got 'a'."),
    "a length": (
        ("--method", "vb-lora", "--method-arg", "length=24"),
        "length = 24 does not divide the 32 columns of ",
    ),
    "d as an option": (("--method-arg", "d=8"), "--method-arg d: no option of a method; say --d."),
    "modules": (
        ("--method-arg", "modules_to_save=x"),
        "--method-arg modules_to_save: no option of a method; say --mod",
    ),
    "a model": (("--method-arg", "model=x"), "--method-arg model: no option of a method; say --model."),
    "a name": (("--method-arg", "name=x"), "--method-arg name: no option of a method.\n"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_a_method_does_not_take(text, words, message):
    result = text(*words, "--out", "run")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert message in result.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--method", "verra"), "unknown method 'verra'; the nearest are vera; known: uni-lora, lora, "),
        (("--grouping", "idd"), "unknown grouping 'idd'; the nearest are iid; known: balanced, iid, "),
        (("--start", "nought"), "unknown start 'nought'; known: paper, identity, zero"),
        (("--method-arg", "vectors"), "expected KEY=VALUE, got 'vectors'"),
    ],
)
def test_a_word_that_is_none_is_refused_before_anything_is_read(text, option, message):
    result = text("--data", "none.tsv", *option)
    assert result.code == 2
    assert f"error: argument {option[0]}: {message}" in result.err


def test_singular_vectors_of_a_base_in_4_bit(text):
    pytest.importorskip("bitsandbytes")
    result = text("--method", "lora-xs", "--rank", 4, "--load-in-4bit", "--out", "run")
    assert result.code == 1
    assert "made of the singular vectors of the weight" in result.err
    assert "attach to the base in float32 or bfloat16, whole, save the adapter, and load that file" in result.err
    assert not Path("run").exists()


# ---- recipes, and going on -------------------------------------------------------------------------------------------


def test_a_recipe_may_say_a_method(text, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('task = "text"\nmethod = "lora-xs"\nrank = 4\nmax-steps = 1\n')
    assert text("--recipe", recipe, "--out", "run").code == 0
    assert metrics()["plan"]["method"] == "lora-xs"
    assert text("--recipe", recipe, "--method", "tied-lora", "--out", "other").code == 0
    assert metrics("other")["plan"]["method"] == "tied-lora"
    recipe.write_text('task = "text"\nmethod = "verra"\n')
    assert text("--recipe", recipe).err == (
        f"unilora: error: {recipe}: method: unknown method 'verra'; the nearest are vera; known: "
        f"{', '.join(METHODS)}.\n"
    )


class Interrupted(KeyboardInterrupt):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(run): what the run gives that is interrupted in its second epoch."""
    from unilora_cli.training import evaluating

    def during(run):
        evaluate, calls = evaluating.evaluate, []

        def once(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise Interrupted
            return evaluate(*arguments)

        monkeypatch.setattr(evaluating, "evaluate", once)
        result = run()
        monkeypatch.setattr(evaluating, "evaluate", evaluate)
        return result

    return during


@pytest.mark.parametrize("method", ["lora-xs", "tied-lora", "vb-lora", "gpart"])
def test_a_resumed_run_is_the_uninterrupted_one(text, interrupted, monkeypatch, method):
    """Also where the singular vectors would be others now: the run's own are gone on with."""
    words = ("--method", method, *FRAMES[method], "--epochs", 2, "--out")
    assert text(*words, "whole").code == 0
    assert interrupted(lambda: text(*words, "parts")).code == 130
    if method == "lora-xs":
        import unilora_torch.vector

        frozen_of = unilora_torch.vector.frozen_of

        def turned(*arguments):
            signs = torch.tensor([-1.0, 1.0, 1.0, 1.0])
            found = frozen_of(*arguments).items()
            return {name: {"V": each["V"] * signs[:, None], "U": each["U"] * signs} for name, each in found}

        monkeypatch.setattr(unilora_torch.vector, "frozen_of", turned)
        assert text(*words, "turned").code == 0
        files = [Path(folder, "adapter.safetensors") for folder in ("whole", "turned")]
        whole, other = (read_adapter(file).tensors for file in files)
        assert any(not np.array_equal(whole[name], other[name]) for name in whole)
    result = text(*words, "parts", "--resume")
    assert result.code == 0, result.err
    assert Path("parts/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert torch.equal(theta("parts"), theta("whole"))
    files = [read_adapter(Path(folder, "adapter.safetensors")) for folder in ("parts", "whole")]
    assert all(np.array_equal(array, files[1].tensors[name]) for name, array in files[0].tensors.items())


def test_a_resume_with_another_method_is_refused(text, interrupted):
    words = ("--method", "vera", "--rank", 4, "--out", "run")
    assert interrupted(lambda: text(*words)).code == 130
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for more, message in {
        ("--method", "tied-lora"): "run: the interrupted run has method = vera, this one tied-lora; --resume with the",
        ("--method-arg", "initial=0.5"): "has method_arg = [], this one [('initial', 0.5)]; --resume with the same arg",
        ("--grouping", "balanced"): "has grouping = its default, this one balanced; --resume with the same arguments",
    }.items():
        result = text(*words, "--resume", *more)
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert message in result.err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
