"""`unilora finetune vit|text|lm`: build the task, print the plan, train, report."""

import importlib
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unilora_cli.console import CommandError, one_line, path_of, say, table
from unilora_cli.options.finetune import Finetune
from unilora_cli.tasks.adapting import check_method, checkpoint_activations
from unilora_cli.tasks.loading import prepare
from unilora_cli.tasks.models import readable_errors
from unilora_cli.tasks.task import Task
from unilora_cli.training import checkpoints, distributed, hub, settings, trainer
from unilora_cli.training.plan import plan_of, rows_of
from unilora_cli.training.recorder import ADAPTER, Recorder
from unilora_core import __version__
from unilora_core.files import try_files

__all__ = ["run"]


def run(options: Finetune) -> None:
    """Fine-tune as the options say."""
    if options.fp16 and options.bf16:
        raise CommandError("--fp16 and --bf16 exclude each other; where a recipe sets one, take it back: --no-bf16.")
    if options.private and not options.push_to_hub:
        raise CommandError("--private is for a repository on the hub: --push-to-hub USER/NAME.")
    with distributed.started(options.device) as device:
        if options.fp16 and device.type == "cpu":
            raise CommandError(f"--fp16 is for GPUs, and this run is on {device}; say --bf16, or neither.")
        said = asdict(options) | {"processes": distributed.processes()}
        about = {"command": f"finetune {options.word}", "unilora": __version__, "settings": said}
        _train(replace(options, device=str(device)), about)


def _train(options: Finetune, about: dict[str, Any]) -> None:
    settings.check_more(options)
    check_method(options)
    folder = distributed.from_first(lambda: _output_folder(options))
    resumed = distributed.from_first(lambda: checkpoints.read(folder)) if options.resume else None
    run = resumed[1] if resumed else None
    if options.push_to_hub:  # before the training: what the hub has against it is said now
        name, private = options.push_to_hub, options.private
        options = replace(options, push_to_hub=distributed.from_first(lambda: hub.repository(name, private)))
    if run:
        checkpoints.check_settings(run, options, folder)
    _seed(options.seed)
    task = importlib.import_module(f"unilora_cli.tasks.{options.word}").task(options)
    if run:
        checkpoints.check_task(run, task, folder)
    if not getattr(task.model, "is_quantized", False):  # that one is where it was loaded to
        task.model.to(torch.device(options.device))
    half = prepare(task.model, task.adapter)
    how = replace(options, bf16=options.bf16 or (half and not options.fp16))  # as beside a base in half precision
    _save_memory_or_time(task, options)
    trainer.growth_of(task, options.grow_to)
    plan = plan_of(task, how)
    say("plan\n" + table(rows_of(task, plan, how)) + "\n\ntraining")
    with Recorder(folder, task, options, {**about, "plan": plan, **task.facts}, run) as recorder:
        with readable_errors("the Trainer takes no such options"):
            trains = trainer.AdapterTrainer(task, how, recorder, run)
        _seed(options.seed + distributed.rank())  # after the Trainer, which gives all processes the same
        try:
            trainer.fit(trains, options.patience, resumed)
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


def _save_memory_or_time(task: Task, options: Finetune) -> None:
    """``--gradient-checkpointing`` of a model of timm (others are loaded with it), and ``--compile``."""
    if options.gradient_checkpointing and options.word == "vit":
        checkpoint_activations(task.model, options.model)
    if options.compile:
        known = torch.compiler.list_backends(exclude_tags=())
        if options.compile not in known:
            raise CommandError(f"--compile {options.compile}: torch has no such backend; it has {', '.join(known)}.")
        task.model.compile(backend=options.compile)


def _output_folder(options: Finetune) -> Path:
    """The folder to write to, which is tried; no adapter is overwritten unless asked.

    Raises:
        CommandError: there is an adapter in it, or its name is a file's; ``--resume`` without ``--out``.
        OSError: nothing can be written there.
    """
    folder = _new_folder(options) if options.out is None else _given_folder(options.out, options)
    try_files(folder / ADAPTER)
    return folder


def _new_folder(options: Finetune) -> Path:
    if options.resume:
        raise CommandError("--resume wants the folder of the interrupted run: --out FOLDER.")
    names = (Path(options.model).name, Path(options.data).stem)
    stem = "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in name) for name in names)
    stem = stem.encode()[:200].decode(errors="ignore")  # a name has 255 bytes at most
    folder, number = Path("runs", stem), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{stem}-{number}")
    return folder


def _given_folder(out: str, options: Finetune) -> Path:
    folder = path_of(out)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{out}: this is a file; --out wants a folder.")
    if (folder / ADAPTER).exists() and not (options.overwrite or options.resume):
        raise CommandError(f"{out}: there is an adapter in it already; add --overwrite, or choose another --out.")
    return folder
