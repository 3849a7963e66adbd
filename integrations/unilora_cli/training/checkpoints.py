"""The state of an interrupted run, which `--resume` goes on from: the Trainer's checkpoints, and what they belong to.

They lie in ``unilora-training/`` in the output folder, one for each of the last two epochs, and go when the run ends.
``run.json`` is written last: a checkpoint without it is half of one, left by a run that was killed, and is passed over.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError
from unilora_cli.options.fields import options_of
from unilora_cli.options.finetune import Finetune
from unilora_cli.tasks.task import Task
from unilora_cli.training import distributed
from unilora_core import CorruptFileError
from unilora_core.files import write_file
from unilora_core.schema import parse_json, read_json, shown, typed

__all__ = ["FOLDER", "Run", "check_settings", "check_task", "forget", "made_for", "read", "write"]

FOLDER, FILE = "unilora-training", "run.json"


@dataclass(frozen=True)
class Run:
    """What a run knows beside the Trainer.

    Attributes:
        settings: see `made_for`.
        spec: of the projection that it began with.
        step: the steps that are done; 0: nothing is but what the options say.
        epochs, losses, skipped, seconds: what `Recorder` knows.
        growth: of `--grow-to`; empty without.
        files: the names of those that the Trainer wrote.
    """

    settings: dict[str, str]
    spec: dict[str, Any]
    step: int
    epochs: tuple[dict[str, Any], ...]
    losses: tuple[tuple[int, float, float], ...]
    skipped: int
    seconds: float
    growth: dict[str, Any]
    files: tuple[str, ...]


def write(folder: Path, run: Mapping[str, Any]) -> None:
    """Make the checkpoint of a step whole, of which the Trainer has written its part."""
    place = _place(folder, run["step"])
    place.mkdir(parents=True, exist_ok=True)
    files = sorted(path.name for path in place.iterdir())
    write_file(place / FILE, json.dumps({**run, "files": files}).encode())


def read(folder: Path) -> tuple[Path, Run]:
    """The last whole checkpoint of a run.

    Raises:
        CommandError: there is none, or a file of it is gone.
        CorruptFileError: a value in it is of another type.
    """
    found = [path.parent for path in (folder / FOLDER).glob(f"checkpoint-*/{FILE}")]
    steps = [int(path.name[11:]) for path in found if path.name[11:].isdecimal()]
    if not steps:
        raise CommandError(f"{folder}: there is no interrupted run to --resume in it (no {FOLDER}/checkpoint-…).")
    place = _place(folder, max(steps))
    run = typed(Run, read_json(place / FILE), str(place / FILE))
    if run.step != max(steps):
        raise CorruptFileError(f"{place / FILE}: step: expected {max(steps)}, got {run.step}.")
    if gone := [name for name in run.files if not (place / name).is_file()]:
        raise CommandError(f"{place}: {gone[0]} is gone, and the run cannot go on; start anew (--overwrite).")
    return place, run


def forget(folder: Path) -> None:
    """Take away the checkpoints of a run, if there are any."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def made_for(options: Finetune) -> dict[str, str]:
    """What a run and its continuation must agree on: the options that say what to compute, not how."""
    said = {"processes": str(distributed.processes())}
    for option in options_of(type(options)).values():
        if option.scope == "experiment":
            value = getattr(options, option.name)
            said[option.name] = str(list(value) if option.repeated else value)
    return said


def check_settings(run: Run, options: Finetune, folder: Path) -> None:
    """Refuse to go on with other options than the run began with.

    Raises:
        CommandError: it names the first argument that differs, and both values.
    """
    settings = made_for(options)
    for name, was in run.settings.items():
        if was != (now := settings.get(name, "None")):
            was, now = ("its default" if value == "None" else value for value in (was, now))
            raise CommandError(
                f"{folder}: the interrupted run has {name} = {was}, this one {now}; --resume with the same arguments, "
                "or start anew with another --out."
            )


def check_task(run: Run, task: Task, folder: Path) -> None:
    """Refuse to go on with another projection, which another model or another version of it gives, or other scores.

    Raises:
        CommandError: it names the first field of the projection that differs, and both values.
        CorruptFileError: the file is none of such a run.
    """
    now = parse_json(json.dumps(task.adapter.spec.to_json()), "spec")
    for name in now:
        if run.spec.get(name) != now[name]:
            raise CommandError(
                f"{folder}: the interrupted run has a projection with {name} = {run.spec.get(name)!s:.80}, this one "
                f"{now[name]!s:.80}; is --model what it was? Start anew with another --out."
            )
    names = {"epoch", "step", "loss", "seconds", *(metric.name for metric in task.metrics)}
    for row in run.epochs:
        if not names <= row.keys() or not all(isinstance(value, (int, float)) for value in row.values()):
            raise CorruptFileError(
                f"{_place(folder, run.step) / FILE}: epochs: expected numbers for {sorted(names)}, got {shown(row)}."
            )


def _place(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"checkpoint-{step}"
