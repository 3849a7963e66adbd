"""The state of an interrupted run: what `--resume` needs to go on as if nothing had happened."""

import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unilora_cli import distributed
from unilora_cli.console import CommandError
from unilora_cli.models import readable_errors
from unilora_cli.task import Task
from unilora_core import CorruptFileError, ProjectionSpec
from unilora_core.files import write_file
from unilora_core.schema import parse_json, shown, typed
from unilora_torch.frozen import tensors_of

__all__ = ["FILE", "Contents", "check_settings", "check_task", "made_for", "read", "restore", "state", "write"]

FILE = "training.pt"

FREE = {"out", "overwrite", "resume", "recipe", "device", "workers", "compile", "gradient_checkpointing"}
"""Arguments that may change between a run and its continuation: they say how to compute, not what."""


@dataclass(frozen=True)
class Contents:
    """What the file holds, as far as it is plain values; `restore` holds the rest against the run.

    Attributes:
        settings, spec: see `made_for`.
        epochs, losses, skipped, seconds: what `Recorder` knows.
        growth: of `--grow-to`; empty without.
    """

    settings: dict[str, str]
    spec: str
    epoch: int
    step: int
    epochs: tuple[dict[str, Any], ...]
    losses: tuple[tuple[int, float, float], ...]
    skipped: int
    seconds: float
    trained: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    generators: tuple[dict[str, Any], ...]
    growth: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write the file, so that an interruption leaves the old one or the new one."""
    buffer = io.BytesIO()
    torch.save(dict(contents), buffer)
    write_file(folder / FILE, buffer.getvalue())


def read(folder: Path) -> dict[str, Any]:
    """What `write` left; tensors and plain values only, no code.

    Raises:
        CommandError: there is none, or it is damaged.
        CorruptFileError: a value in it is of another type.
    """
    path = folder / FILE
    if not path.is_file():
        raise CommandError(f"{folder}: there is no interrupted run to --resume in it (no {FILE}).")
    with readable_errors(f"cannot read {path}"):
        contents = torch.load(path, map_location="cpu", weights_only=True)
    found = typed(Contents, contents, str(path))
    return {field.name: getattr(found, field.name) for field in fields(found)}


def made_for(settings: Mapping[str, Any], spec: ProjectionSpec) -> dict[str, Any]:
    """What a run must agree on with its continuation: the arguments, and the projection that it began with."""
    kept = {name: str(value) for name, value in settings.items() if name not in FREE}
    return {"settings": kept, "spec": json.dumps(spec.first.to_json(), sort_keys=True)}


def check_settings(contents: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other arguments than the run began with.

    Raises:
        CommandError: it names the first argument that differs, and both values.
    """
    for name, was in contents["settings"].items():
        if was != (now := str(settings.get(name))):
            was, now = ("its default" if value == "None" else value for value in (was, now))
            raise CommandError(
                f"{folder}: the interrupted run has {name} = {was}, this one {now}; --resume with the same arguments, "
                "or start anew with another --out."
            )


def check_task(contents: Mapping[str, Any], task: Task, folder: Path) -> None:
    """Refuse to go on with another projection, which another model or another version of it gives, or other scores.

    Raises:
        CommandError: it names the first field of the projection that differs, and both values.
        CorruptFileError: the file is none of such a run.
    """
    where = f"{folder / FILE}: spec"
    was = typed(dict[str, Any], parse_json(contents["spec"], where), where)
    now = json.loads(json.dumps(task.adapter.spec.to_json()))
    for name in now:
        if was.get(name) != now[name]:
            raise CommandError(
                f"{folder}: the interrupted run has a projection with {name} = {was.get(name)!s:.80}, this one "
                f"{now[name]!s:.80}; is --model what it was? Start anew with another --out."
            )
    names = {"epoch", "step", "loss", "seconds", *(metric.name for metric in task.metrics)}
    for row in contents["epochs"]:
        if not names <= row.keys() or not all(isinstance(value, (int, float)) for value in row.values()):
            raise CorruptFileError(f"{folder / FILE}: epochs: expected numbers for {sorted(names)}, got {shown(row)}.")


def state(epoch: int, step: int, task: Task, parts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """All that the rest of a run depends on: θ_d and the modules to save (their buffers too), the singular vectors that
    θ_d stands between in some methods, what `parts` hold (the optimiser, the schedule, the scale of float16's
    gradients), and of each process the generators of random numbers: torch's, NumPy's and Python's, and that of the
    order of the data, from which the workers' seeds follow.
    """
    return {
        "epoch": epoch,
        "step": step,
        "trained": _trained(task),
        **{name: part.state_dict() for name, part in parts.items()},
        "generators": distributed.gathered(_generators(task, device)),
    }


def restore(state: dict[str, Any], task: Task, parts: Mapping[str, Any], device: torch.device) -> tuple[int, int]:
    """Go back to a `state`; the steps and the epochs that are done.

    Raises:
        CommandError: it is no state of this run.
    """
    with readable_errors(f"cannot go on from {FILE}"):
        if "growth" in parts:
            parts["growth"].load_state_dict(state["growth"])  # θ_d gets its size
        for name, value in _trained(task).items():
            saved = state["trained"][name]
            if saved.shape != value.shape or not saved.isfinite().all():
                raise CommandError(f"{FILE}: {name}: expected finite numbers {tuple(value.shape)}, got others.")
            with torch.no_grad():
                value.copy_(saved)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generators = state["generators"][distributed.rank()]
        torch.set_rng_state(generators["torch"])
        if device.type == "cuda" and generators["cuda"] is not None:
            torch.cuda.set_rng_state(generators["cuda"], device)
        np.random.set_state(generators["numpy"])
        random.setstate(generators["python"])
        task.train.generator.set_state(generators["order"])
    return state["step"], state["epoch"]


def _trained(task: Task) -> dict[str, Tensor]:
    adapter = task.adapter
    return {"theta_d": adapter.theta_d.detach(), **adapter.heads(), **tensors_of(adapter.spec, adapter.chains.frozen)}


def _generators(task: Task, device: torch.device) -> dict[str, Any]:
    kind, keys, *place = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (kind, np.asarray(keys).tolist(), *place),
        "python": random.getstate(),
        "order": task.train.generator.get_state(),
    }
