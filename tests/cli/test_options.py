"""Options are fields of dataclasses: one line makes the argument, its help, what a recipe may have, and what --resume
compares."""

import dataclasses
from pathlib import Path

import pytest

from unilora_cli.options import files, finetune
from unilora_cli.options.fields import option, options_of
from unilora_cli.options.values import Part

COMMANDS = [*finetune.TASKS.values(), *files.COMMANDS]
NEEDED = ("--model", "m", "--data", "d")


@pytest.fixture
def blurred(monkeypatch):
    """`unilora finetune text` with one option more."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Blurred(finetune.Text):
        blur: Part = option("how much", 0.25)  # noqa: RUF009

    monkeypatch.setitem(finetune.TASKS, "text", Blurred)
    return Blurred


def test_one_line_makes_an_option(blurred, parsed, unilora, tmp_path):
    assert "  --blur P              how much (default: 0.25)\n" in unilora("finetune", "text", "--help").out
    assert parsed("finetune", "text", *NEEDED).blur == 0.25
    assert parsed("finetune", "text", *NEEDED, "--blur", "1").blur == 1.0
    assert "argument --blur: expected a number from 0 to 1, got '2'" in unilora("finetune", "text", "--blur", "2").err
    Path("my.toml").write_text('task = "text"\nblur = 0.5\n')
    assert parsed("finetune", "text", *NEEDED, "--recipe", "my.toml").blur == 0.5
    Path("my.toml").write_text('task = "text"\nblur = 2\n')
    assert (
        "my.toml: blur: expected a number from 0 to 1, got '2'."
        in unilora("finetune", "text", *NEEDED, "--recipe", "my.toml").err
    )


def test_one_line_makes_resume_compare_it(blurred, parsed):
    pytest.importorskip("accelerate")
    from unilora_cli.training.checkpoints import made_for

    assert made_for(parsed("finetune", "text", *NEEDED, "--blur", "1"))["blur"] == "1.0"


def test_what_may_change_when_a_run_goes_on():
    free = {
        each.name
        for task in finetune.TASKS.values()
        for each in options_of(task).values()
        if each.scope != "experiment"
    }
    computing = {"device", "workers", "compile", "gradient_checkpointing", "shard"}
    assert free == computing | {"recipe", "out", "overwrite", "resume", "push_to_hub", "private", "report_to"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.word)
def test_a_default_is_what_its_words_would_give(command):
    for each in options_of(command).values():
        if each.default not in (None, False, (), dataclasses.MISSING):
            assert each.argument.get("type", str)(str(each.default)) == each.default, each.name
            assert each.default in each.argument.get("choices", [each.default]), each.name


def test_options_cannot_be_changed(parsed):
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed("finetune", "text", *NEEDED).epochs = 7


def test_a_task_has_defaults_of_its_own(parsed):
    rates = {kind: parsed("finetune", kind, *NEEDED) for kind in finetune.TASKS}
    assert {kind: (options.lora_rate, options.batch_size) for kind, options in rates.items()} == {
        "vit": (5e-3, 32),
        "text": (5e-3, 32),
        "lm": (2e-4, 8),
    }


def test_of_two_that_exclude_each_other_the_command_line_decides(parsed, unilora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("finetune", "vit", *NEEDED, "--recipe", "my.toml")
    Path("my.toml").write_text('task = "vit"\ncheckpoint = "a.pth"\n')
    assert parsed(*words).checkpoint == "a.pth"
    options = parsed(*words, "--no-pretrained")
    assert (options.checkpoint, options.no_pretrained) == (None, True)
    Path("my.toml").write_text('task = "vit"\nno-pretrained = true\n')
    options = parsed(*words, "--checkpoint", "b.pth")
    assert (options.checkpoint, options.no_pretrained) == ("b.pth", False)
    Path("my.toml").write_text('task = "vit"\nno-pretrained = true\ncheckpoint = "a.pth"\n')
    assert "checkpoint takes the place of no-pretrained; leave one of them out." in unilora(*words).err
