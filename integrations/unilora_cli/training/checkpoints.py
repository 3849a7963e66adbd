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
from unilora_cli.tasks.task import Task
from unilora_core import CorruptFileError, ProjectionSpec
from unilora_core.files import write_file
from unilora_core.schema import parse_json, read_json, shown, typed

__all__ = ["FOLDER", "Run", "check_settings", "check_task", "forget", "made_for", "read", "write"]

FOLDER, FILE = "unilora-training", "run.json"

FREE = {"out", "overwrite", "resume", "recipe", "device", "workers", "compile", "gradient_checkpointing", "report_to"}
FREE |= {"shard"}
"""Arguments that may change between a run and its continuation: they say how to compute, not what."""


@dataclass(frozen=True)
class Run:
    """What a run knows beside the Trainer.

    Attributes:
        settings, spec: see `made_for`.
        step: the steps that are done; 0: nothing is but what the arguments say.
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


def made_for(settings: Mapping[str, Any], spec: ProjectionSpec) -> dict[str, Any]:
    """What a run must agree on with its continuation: the arguments, and the projection that it began with."""
    kept = {name: str(value) for name, value in settings.items() if name not in FREE}
    return {"settings": kept, "spec": spec.first.to_json()}


def check_settings(run: Run, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other arguments than the run began with.

    Raises:
        CommandError: it names the first argument that differs, and both values.
    """
    for name, was in run.settings.items():
        if was != (now := str(settings.get(name))):
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
