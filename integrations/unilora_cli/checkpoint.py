"""The state of an interrupted run: what `--resume` needs to go on as if nothing had happened."""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unilora_cli import distributed
from unilora_cli.console import CommandError
from unilora_cli.models import readable_errors
from unilora_cli.task import Task
from unilora_core import ProjectionSpec

__all__ = ["FILE", "check_settings", "check_spec", "made_for", "read", "restore", "state", "write"]

FILE = "training.pt"

FREE = {"out", "overwrite", "resume", "recipe", "device", "workers", "compile", "gradient_checkpointing"}
"""Arguments that may change between a run and its continuation: they say how to compute, not what."""


def write(folder: Path, contents: dict[str, Any]) -> None:
    """Write the file, so that an interruption leaves the old one or the new one."""
    torch.save(contents, folder / f"{FILE}.new")
    os.replace(folder / f"{FILE}.new", folder / FILE)


def read(folder: Path) -> dict[str, Any]:
    """What `write` left; tensors and plain values only, no code.

    Raises:
        CommandError: there is none, or it is damaged.
    """
    if not (folder / FILE).is_file():
        raise CommandError(f"{folder}: there is no interrupted run to --resume in it (no {FILE}).")
    with readable_errors(f"cannot read {folder / FILE}"):
        return torch.load(folder / FILE, map_location="cpu", weights_only=True)


def made_for(settings: Mapping[str, Any], spec: ProjectionSpec) -> dict[str, Any]:
    """What a run must agree on with its continuation: the arguments, and the projection."""
    kept = {name: str(value) for name, value in settings.items() if name not in FREE}
    return {"settings": kept, "spec": json.dumps(spec.to_json(), sort_keys=True)}


def check_settings(contents: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other arguments than the run began with.

    Raises:
        CommandError: it names the first argument that differs, and both values.
    """
    for name, was in contents["settings"].items():
        if was != (now := str(settings.get(name))):
            raise CommandError(
                f"{folder}: the interrupted run has {name} = {was}, this one {now}; --resume with the same arguments, "
                "or start anew with another --out."
            )


def check_spec(contents: Mapping[str, Any], spec: ProjectionSpec, folder: Path) -> None:
    """Refuse to go on with another projection, which another model or another version of it gives.

    Raises:
        CommandError: it names the first field that differs, and both values.
    """
    was, now = json.loads(contents["spec"]), json.loads(json.dumps(spec.to_json()))
    for name in was:
        if was[name] != now[name]:
            raise CommandError(
                f"{folder}: the interrupted run has a projection with {name} = {was[name]!s:.80}, this one "
                f"{now[name]!s:.80}; is --model what it was? Start anew with another --out."
            )


def state(epoch: int, step: int, task: Task, parts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """All that the rest of a run depends on: θ_d and the modules to save (their buffers too), what `parts` hold (the
    optimiser, the schedule, the scale of float16's gradients), and of each process the generators of random numbers:
    torch's, NumPy's and Python's, and that of the order of the data, from which the workers' seeds follow.
    """
    return {
        "epoch": epoch,
        "step": step,
        "trained": _trained(task),
        **{name: part.state_dict() for name, part in parts.items()},
        "generators": distributed.gathered(_generators(task, device)),
    }


def restore(state: dict[str, Any], task: Task, parts: Mapping[str, Any], device: torch.device) -> tuple[int, int]:
    """Go back to a `state`; the steps and the epochs that are done."""
    with torch.no_grad():
        for name, value in _trained(task).items():
            value.copy_(state["trained"][name])
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
    return {"theta_d": task.adapter.theta_d.detach(), **task.adapter.heads()}


def _generators(task: Task, device: torch.device) -> dict[str, Any]:
    kind, keys, *place = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (kind, np.asarray(keys).tolist(), *place),
        "python": random.getstate(),
        "order": task.train.generator.get_state(),
    }
