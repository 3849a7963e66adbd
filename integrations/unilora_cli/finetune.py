"""`unilora finetune vit|text|lm`: build the task, print the plan, train, report."""

import argparse
import importlib
import inspect
import random
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, number, one_line, say, table
from unilora_core import __version__

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Fine-tune as the arguments say."""
    import numpy as np
    import torch

    from unilora_cli import loop
    from unilora_cli.report import Recorder

    folder = _output_folder(arguments)
    device = _device(arguments.device)
    random.seed(arguments.seed)
    np.random.seed(arguments.seed % 2**32)
    task = importlib.import_module(f"unilora_cli.{arguments.kind}").task(arguments)
    torch.manual_seed(arguments.seed)
    settings = loop.Settings(
        lora_rate=arguments.lora_rate,
        head_rate=arguments.head_rate,
        epochs=arguments.epochs,
        warmup=arguments.warmup,
        schedule=arguments.schedule,
        device=device,
        bf16=arguments.bf16,
        max_steps=arguments.max_steps,
    )
    task.model.to(device)
    plan = _plan(task, settings, loop.steps_of(task, settings))
    say("plan\n" + table(_plan_rows(task, plan, settings)) + "\n\ntraining")
    with Recorder(folder, task, {**_about(arguments), "plan": plan}) as recorder:
        try:
            if task.measure == "perplexity":
                recorder.epoch(0, 0, loop.evaluate(task, settings))
            loop.fit(task, settings, recorder)
        except torch.OutOfMemoryError as error:
            recorder.failed("out of memory")
            raise CommandError(f"out of memory ({one_line(error, 120)}); use a smaller --batch-size.") from error
        except KeyboardInterrupt:
            recorder.failed("interrupted")
            raise
        recorder.finish()


def _output_folder(arguments: argparse.Namespace) -> Path:
    """The folder to write to; no adapter is overwritten unless asked.

    Raises:
        CommandError: there is an adapter in it, or its name is a file's.
    """
    from unilora_cli.report import ADAPTER

    if arguments.out is None:
        names = (Path(arguments.model).name, Path(arguments.data).stem)
        stem = "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in name) for name in names)
        folder, number = Path("runs", stem), 1
        while folder.exists():
            number += 1
            folder = Path("runs", f"{stem}-{number}")
        return folder
    folder = Path(arguments.out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{arguments.out}: this is a file; --out wants a folder.")
    if (folder / ADAPTER).exists() and not arguments.overwrite:
        raise CommandError(
            f"{arguments.out}: there is an adapter in it already; add --overwrite, or choose another --out."
        )
    return folder


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name}: there is no such device here ({one_line(error, 120)}).") from error
    return device


def _plan(task: Any, settings: Any, steps: int) -> dict[str, Any]:
    """The numbers of a run, for the printed plan and for metrics.json."""
    adapter, spec = task.adapter, task.adapter.spec
    groups = adapter.parameter_groups(settings.lora_rate, settings.head_rate)
    return {
        "targets": len(adapter.targets),
        "D": spec.D,
        "d": spec.d,
        "D/d": spec.D / spec.d,
        "seed": spec.seed,
        "grouping": spec.grouping,
        "start": spec.start,
        "bound": spec.bound,
        "modules_to_save": list(adapter.modules_to_save),
        "theta_rate": groups[0]["lr"],
        "head_rate": groups[1]["lr"] if len(groups) > 1 else None,
        "trained": sum(p.numel() for group in groups for p in group["params"]),
        "total": sum(p.numel() for p in task.model.parameters()),
        "train_examples": len(task.train.dataset),
        "held_out_examples": len(task.held_out.dataset),
        "steps": steps,
        "device": str(settings.device),
    }


def _plan_rows(task: Any, plan: dict[str, Any], settings: Any) -> list[tuple[str, str]]:
    lora = settings.lora_rate
    factor = plan["theta_rate"] / lora
    heads = ", ".join(plan["modules_to_save"])
    rows = [
        ("model", f"{task.base.name} ({task.base.kind})"),
        ("data", f"{plan['train_examples']:,} examples to train on, {plan['held_out_examples']:,} held out"),
        *((name, number(value)) for name, value in task.notes),
        ("adapter", task.adapter.summary()),
        ("D/d", f"{plan['D']:,} / {plan['d']:,} = {plan['D/d']:.4g}"),
        ("projection", f"seed {plan['seed']}, grouping {plan['grouping']}, start {plan['start']}"),
        (
            "rate of θ_d",
            f"{plan['theta_rate']:.4g} = {factor:.4g} × {lora:g}, the rate that trains as LoRA would at {lora:g}",
        ),
        ("", f"because {_reason()}"),
        ("steps", f"{plan['steps']:,} on {plan['device']}" + (", bfloat16 autocast" if settings.bf16 else "")),
    ]
    if heads:
        rows.insert(-1, ("rate of the head", f"{plan['head_rate']:g} ({heads})"))
    return rows


def _reason() -> str:
    """Why θ_d's rate is what it is, in the words of the library that decides it."""
    from unilora_core import rates

    return (inspect.getdoc(rates.theta_rate) or "unilora_core.rates says so").splitlines()[0].rstrip(".")


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in vars(arguments).items() if name not in ("run", "debug", "kind")}
    return {"command": f"finetune {arguments.kind}", "unilora": __version__, "settings": settings}
