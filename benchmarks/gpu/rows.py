"""Rows: one measurement each, in a process of its own; a part's results are one file, written after every row."""

import contextlib
import gc
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SMOKE, machine

FOLDER = RESULTS / "gpu"
DEVICE = torch.device("cpu" if SMOKE else "cuda")
VERSIONS = ("cuda", "torch", "triton", "transformers", "peft", "timm", "jax", "jaxlib")
"""What figures depend on beside the card: rows of two versions are not mixed in one file."""

Outcome = dict[str, Any]
"""``figures`` → name → value; or ``skipped`` or ``failed`` → why, in words."""


class Skip(Exception):
    """A row that cannot be measured here, such as one of a package that is not there; with the reason."""


@dataclass(frozen=True)
class Row:
    """What is measured, and what measures it."""

    settings: dict[str, Any]
    figures: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        """Its settings in words."""
        return ", ".join(f"{name} = {value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Results:
    """The file of one part: the machine, and an outcome for each row."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, part: str) -> "Results":
        """What is there, unless other versions made it: figures of two versions are not mixed."""
        path = FOLDER / card() / f"{part}.json"
        if not path.exists():
            return cls(path)
        found, here = json.loads(path.read_text(encoding="utf-8")), about()
        other = [name for name in VERSIONS if found["machine"].get(name) != here.get(name)]
        if other:
            print(f"{part}: measured with another {', '.join(other)}; all its rows are run again.")
        return cls(path, [] if other else found["rows"])

    def has(self, row: Row) -> bool:
        """Whether the row has figures; what failed or was skipped is tried again."""
        return "figures" in self.outcome(row)

    def outcome(self, row: Row) -> Outcome:
        """Of a row; empty where there is none."""
        return next((kept["outcome"] for kept in self.rows if kept["settings"] == row.settings), {})

    def keep(self, row: Row, outcome: Outcome) -> None:
        """Put an outcome in the place of the row's last one, and write the file."""
        kept = [each for each in self.rows if each["settings"] != row.settings]
        self.rows[:] = [*kept, {"settings": row.settings, "outcome": outcome}]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": about(), "rows": self.rows}, indent=1) + "\n"
        beside = self.path.with_suffix(".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path)  # a call that is cut off here leaves the old file


def alone(row: Row) -> Outcome:
    """The outcome of a row in this process; what the row prints goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return {"figures": row.figures()}
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def apart(part: str, row: Row, seconds: float) -> Outcome:
    """The same in a process of its own, that no row before has left memory or a broken context to."""
    command = [sys.executable, str(Path(__file__).parent), part, "--row", json.dumps(row.settings)]
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [*command, *(["--smoke"] if SMOKE else [])],
            env=os.environ | quiet,
            timeout=seconds,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after the {seconds:.0f} s that were left"}
    if done.returncode:
        return {"failed": f"status {done.returncode}: {done.stderr[-2000:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def card() -> str:
    """The folder of this card's results."""
    if SMOKE:
        return "no-card"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia")
    return f"nvidia-{re.sub('[^a-z0-9]+', '-', name).strip('-')}"


def about() -> dict[str, Any]:
    """The machine with its card, driver, and the versions that matter beside those of `common.machine`."""
    found = machine() | {"card": "none" if SMOKE else torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if not SMOKE and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    for package in ("triton", "jaxlib", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def fitting(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or that the card's memory does not hold it: also a figure."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # the exception holds the frames, and they the tensors
    gc.collect()
    torch.cuda.empty_cache()
    return {"skipped": "does not fit this card's memory"}
