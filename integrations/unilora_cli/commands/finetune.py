"""`unilora finetune vit|text|lm`: build the task, print the plan, train, report."""

import argparse
import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unilora_cli.console import CommandError, one_line, path_of, say, table
from unilora_cli.tasks.adapting import check_method, checkpoint_activations
from unilora_cli.tasks.loading import prepare
from unilora_cli.tasks.models import readable_errors
from unilora_cli.tasks.task import Task
from unilora_cli.training import checkpoints, distributed, settings, trainer
from unilora_cli.training.plan import plan_of, rows_of
from unilora_cli.training.recorder import ADAPTER, Recorder
from unilora_core import __version__
from unilora_core.files import try_files

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Fine-tune as the arguments say."""
    if arguments.fp16 and arguments.bf16:
        raise CommandError("--fp16 and --bf16 exclude each other; where a recipe sets one, take it back: --no-bf16.")
    about = _about(arguments)
    with distributed.started(arguments.device) as device:
        if arguments.fp16 and device.type == "cpu":
            raise CommandError(f"--fp16 is for GPUs, and this run is on {device}; say --bf16, or neither.")
        about["settings"]["processes"] = distributed.processes()
        arguments.device = str(device)
        _train(arguments, about)


def _train(arguments: argparse.Namespace, about: dict[str, Any]) -> None:
    settings.check_more(dict(arguments.trainer_arg))
    check_method(arguments)
    folder = distributed.from_first(lambda: _output_folder(arguments))
    resumed = distributed.from_first(lambda: checkpoints.read(folder)) if arguments.resume else None
    run = resumed[1] if resumed else None
    if run:
        checkpoints.check_settings(run, about["settings"], folder)
    device = torch.device(arguments.device)
    _seed(arguments.seed)
    task = importlib.import_module(f"unilora_cli.tasks.{arguments.kind}").task(arguments)
    if run:
        checkpoints.check_task(run, task, folder)
    if not getattr(task.model, "is_quantized", False):  # that one is where it was loaded to
        task.model.to(device)
    how = settings.settings_of(arguments, half=prepare(task.model, task.adapter))
    _save_memory_or_time(task, arguments)
    trainer.growth_of(task, how.grow_to)
    plan = plan_of(task, how)
    say("plan\n" + table(rows_of(task, plan, how)) + "\n\ntraining")
    with Recorder(folder, task, {**about, "plan": plan, **task.facts}, arguments.keep, run) as recorder:
        with readable_errors("the Trainer takes no such options"):
            trains = trainer.AdapterTrainer(task, how, recorder, run)
        _seed(arguments.seed + distributed.rank())  # after the Trainer, which gives all processes the same
        try:
            trainer.fit(trains, how.patience, resumed)
            trainer.conclude(trains)
        except torch.OutOfMemoryError as error:
            recorder.failed("out of memory")
            raise CommandError(
                f"out of memory ({one_line(error, 120)}); use a smaller --batch-size (with --accumulate), or "
                "--gradient-checkpointing."
            ) from error
        recorder.finish()


def _seed(seed: int) -> None:
    """Everything random: torch's generators, NumPy's and Python's, which augmentation uses."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _save_memory_or_time(task: Task, arguments: argparse.Namespace) -> None:
    """``--gradient-checkpointing`` of a model of timm (others are loaded with it), and ``--compile``."""
    if arguments.gradient_checkpointing and arguments.kind == "vit":
        checkpoint_activations(task.model, arguments.model)
    if arguments.compile:
        known = torch.compiler.list_backends(exclude_tags=())
        if arguments.compile not in known:
            raise CommandError(f"--compile {arguments.compile}: torch has no such backend; it has {', '.join(known)}.")
        task.model.compile(backend=arguments.compile)


def _output_folder(arguments: argparse.Namespace) -> Path:
    """The folder to write to, which is tried; no adapter is overwritten unless asked.

    Raises:
        CommandError: there is an adapter in it, or its name is a file's; ``--resume`` without ``--out``.
        OSError: nothing can be written there.
    """
    folder = _new_folder(arguments) if arguments.out is None else _given_folder(arguments)
    try_files(folder / ADAPTER)
    return folder


def _new_folder(arguments: argparse.Namespace) -> Path:
    if arguments.resume:
        raise CommandError("--resume wants the folder of the interrupted run: --out FOLDER.")
    names = (Path(arguments.model).name, Path(arguments.data).stem)
    stem = "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in name) for name in names)
    stem = stem.encode()[:200].decode(errors="ignore")  # a name has 255 bytes at most
    folder, number = Path("runs", stem), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{stem}-{number}")
    return folder


def _given_folder(arguments: argparse.Namespace) -> Path:
    folder = path_of(arguments.out)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{arguments.out}: this is a file; --out wants a folder.")
    if (folder / ADAPTER).exists() and not (arguments.overwrite or arguments.resume):
        raise CommandError(
            f"{arguments.out}: there is an adapter in it already; add --overwrite, or choose another --out."
        )
    return folder


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in vars(arguments).items() if name not in ("run", "debug", "kind")}
    return {"command": f"finetune {arguments.kind}", "unilora": __version__, "settings": settings}
