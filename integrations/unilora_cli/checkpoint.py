"""The state of an interrupted run: what `--resume` needs to go on as if nothing had happened."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unilora_cli.console import CommandError
from unilora_cli.models import readable_errors
from unilora_core import ProjectionSpec

__all__ = ["FILE", "check_settings", "check_spec", "made_for", "read", "restore", "state", "write"]

FILE = "training.pt"

FREE = {"out", "overwrite", "resume", "recipe", "device", "workers"}
"""Arguments that may change between a run and its continuation."""


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


def state(
    epoch: int, step: int, loader: DataLoader, trained: Sequence[Tensor], optimizer: Any, scheduler: Any
) -> dict[str, Any]:
    """All that the rest of a run depends on: the trained numbers, the optimiser, the schedule, and the generators of
    random numbers (torch's, Python's, and that of the order of the data).
    """
    return {
        "epoch": epoch,
        "step": step,
        "trained": [parameter.detach() for parameter in trained],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "order": loader.generator.get_state(),
    }


def restore(
    state: dict[str, Any], loader: DataLoader, trained: Sequence[Tensor], optimizer: Any, scheduler: Any
) -> tuple[int, int]:
    """Go back to a `state`; the steps and the epochs that are done."""
    with torch.no_grad():
        for parameter, value in zip(trained, state["trained"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    loader.generator.set_state(state["order"])
    return state["step"], state["epoch"]
