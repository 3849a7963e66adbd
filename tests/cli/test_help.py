"""Help texts, exit codes of wrong usage, and that nothing heavy is imported before it is needed."""

import subprocess
import sys

import pytest

COMMANDS = [
    ("finetune", "vit"),
    ("finetune", "text"),
    ("finetune", "lm"),
    ("recipes",),
    ("inspect",),
    ("analyze",),
    ("convert",),
    ("merge",),
]
HEAVY = {"torch", "timm", "transformers", "datasets", "matplotlib", "PIL", "tqdm", "jax"}


def test_help_names_every_command(unilora):
    result = unilora("--help")
    assert result.code == 0
    for words in COMMANDS:
        assert f"\n    {words[0]} " in result.out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_a_command_has_examples(unilora, words):
    result = unilora(*words, "--help")
    assert result.code == 0
    assert f"examples:\n  unilora {' '.join(words)} " in result.out
    assert max(map(len, result.out.splitlines())) <= 120


@pytest.mark.parametrize("kind", ["vit", "text", "lm"])
def test_help_shows_the_defaults(unilora, kind):
    from unilora_cli.options.finetune import TASKS

    text = " ".join(unilora("finetune", kind, "--help").out.split())
    assert f"(default: {TASKS[kind].lora_rate})" in text
    assert f"(default: {TASKS[kind].batch_size})" in text


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("finetune",),
        ("finetune", "vit"),
        ("finetune", "vit", "--model", "m", "--data", "d", "--epochs", "0"),
        ("finetune", "vit", "--model", "m", "--data", "d", "--lora-rate", "-1"),
        ("finetune", "vit", "--model", "m", "--data", "d", "--no-pretrained", "--checkpoint", "c"),
        ("finetune", "vit", "--model", "m", "--data", "d", "--scale", "1,0.5"),
        ("finetune", "text", "--model", "m"),
        ("finetune", "lm", "--model", "m", "--data", "d", "--weight-decay", "-0.1"),
        ("finetune", "vit", "--model", "m", "--data", "d", "--model-arg", "img_size"),
        ("convert", "a", "b", "--to", "onnx"),
    ],
)
def test_wrong_usage_exits_with_2(unilora, words):
    result = unilora(*words)
    assert result.code == 2
    assert "usage: unilora" in result.err


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("all-linear", "all-linear"),
        ("qkv", ("qkv",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (r".*layers\.[0-3]\..*_proj", r".*layers\.[0-3]\..*_proj"),
    ],
)
def test_targets_are_words_or_a_pattern(parsed, text, selection):
    assert parsed("finetune", "lm", "--model", "m", "--data", "d", "--targets", text).targets == selection


def test_model_arguments_are_values(parsed):
    words = ("img_size=32", "name=abc", "flag=True", "other=false", "sizes=(1, 2)")
    line = [word for value in words for word in ("--model-arg", value)]
    values = dict(parsed("finetune", "lm", "--model", "m", "--data", "d", *line).model_arg)
    assert values == {"img_size": 32, "name": "abc", "flag": True, "other": False, "sizes": (1, 2)}


def imported_by(code):
    """The heavy packages that a fresh interpreter has imported after ``code``."""
    code += f"\nimport sys; print('imported', *sorted({HEAVY!r} & {{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


RUN = """
from unilora_cli.main import main
try:
    main({words!r})
except SystemExit:
    pass
"""


def test_help_and_inspect_import_nothing_heavy(tmp_path):
    import numpy as np

    from unilora_core import Layout, ProjectionSpec, save_adapter

    spec = ProjectionSpec(Layout([("a.A", (2, 3)), ("a.B", (3, 2))]), d=3)
    save_adapter(tmp_path / "a.safetensors", spec, np.zeros(3, np.float32))
    for words in (["--help"], ["finetune", "vit", "--help"], ["inspect", str(tmp_path / "a.safetensors")]):
        assert imported_by(RUN.format(words=words)) == []


def test_the_laziness_test_can_fail():
    pytest.importorskip("tqdm")
    assert imported_by("import tqdm") == ["tqdm"]


def test_a_missing_package_is_named(unilora, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = unilora("finetune", "vit", "--model", "m", "--data", "d")
    assert result.code == 1
    assert result.err == "unilora: error: this needs torch, which is not installed: pip install 'unilora[cli]'\n"
