"""How to train, as the user said it, and what transformers' Trainer is told of that."""

import argparse
import difflib
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from unilora_cli.console import CommandError
from unilora_cli.tasks.models import readable_errors
from unilora_cli.tasks.task import Task

__all__ = ["Settings", "parameter_groups", "settings_of", "steps_of", "trainer_arguments"]

OURS = re.compile(
    "(eval|save|logging|dataloader|include|do|hub|per_device|warmup|torch_compile|(gradient|activation)_check)_?.*|"
    "output_dir|num_train_epochs|max_steps|max_grad_norm|gradient_accumulation_steps|learning_rate|weight_decay|bf16|fp16|"
    "seed|data_seed|use_cpu|report_to|push_to_hub|resume_from.*|load_best.*|metric_for.*|greater_is.*|label_.*|auto_find.*|"
    "batch_eval.*|disable_tqdm|enable_jit.*|ignore_data.*|length_col.*|local_rank|parallelism.*|prediction_loss.*|"
    "average_tokens.*|remove_unused.*|restore_callback.*|train_sampling.*"
)
"""Options of the Trainer that are set by this command's own, or have no effect: it reads, scores and saves itself."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        lora_rate: the learning rate that LoRA would have.
        warmup: the part of the steps in which the rates rise from 0.
        schedule: the name of a schedule of transformers.
        precision: of autocast, ``torch.bfloat16`` or ``torch.float16``; or None.
        max_steps: an upper bound of the steps, or None.
        theta_rate: θ_d's own rate, in place of the one that follows from ``lora_rate``; or None.
        weight_decay: of the head; θ_d has none.
        accumulate: batches per step.
        max_grad_norm: gradients are scaled down to this norm, all of them as one vector; or None.
        patience: epochs without a better score after which training stops; or None.
        grow_to: d doubles up to this where the held-out loss has come to rest (`unilora_torch.Growth`); or None.
        report_to: names of trackers, as the Trainer knows them.
        more: further options of the Trainer.
    """

    lora_rate: float
    head_rate: float
    epochs: int
    warmup: float
    schedule: str
    device: torch.device
    precision: torch.dtype | None = None
    max_steps: int | None = None
    theta_rate: float | None = None
    weight_decay: float = 0.01
    accumulate: int = 1
    max_grad_norm: float | None = None
    patience: int | None = None
    grow_to: int | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


def settings_of(arguments: argparse.Namespace, half: bool) -> Settings:
    """The settings that the arguments say; ``half``: the base is in half precision."""
    said = {each.name: getattr(arguments, each.name) for each in fields(Settings) if hasattr(arguments, each.name)}
    precision = torch.float16 if arguments.fp16 else torch.bfloat16 if arguments.bf16 or half else None
    said |= {"device": torch.device(arguments.device), "report_to": arguments.report_to or ()}
    return Settings(**said, precision=precision, more=dict(arguments.trainer_arg))


def check_more(given: dict[str, Any]) -> None:
    """Refuse what is no option of the Trainer, and those that the command sets itself.

    Raises:
        CommandError: it names the option, and the nearest ones.
    """
    known = [each.name for each in fields(TrainingArguments) if each.init]
    for name in given:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or "listed at TrainingArguments of transformers"
            raise CommandError(f"--trainer-arg {name}: the Trainer has no such option; the nearest are {near}.")
        if name.startswith(("fsdp", "deepspeed")):
            raise CommandError(f"--trainer-arg {name}: only in Python so far; docs/training.md says how.")
        if OURS.fullmatch(name):
            raise CommandError(f"--trainer-arg {name}: unilora sets this itself; --help lists its own options.")


def trainer_arguments(settings: Settings, steps: int, folder: Path, before: bool) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        before: whether to evaluate before the first step.

    Raises:
        CommandError: an option of ``settings.more`` that it does not take.
    """
    usual = {"lr_scheduler_type": settings.schedule, "optim": "adamw_torch", "log_level": "error"}
    with readable_errors("--trainer-arg: the Trainer takes no such options"):
        made = TrainingArguments(
            **usual | settings.more,
            output_dir=str(folder),
            max_steps=steps,
            gradient_accumulation_steps=settings.accumulate,
            warmup_steps=round(steps * settings.warmup),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm or 0.0,
            seed=settings.seed % 2**32,
            bf16=settings.precision is torch.bfloat16,
            fp16=settings.precision is torch.float16,
            use_cpu=settings.device.type == "cpu",
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="epoch",
            eval_on_start=before,
            save_strategy="epoch",
            save_total_limit=2,  # the one before is there until the new one is whole
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        _place(made, settings.device)
    return made


def _place(made: TrainingArguments, device: torch.device) -> None:
    """On this device and no other: the Trainer would take the first GPU, and share batches between all of them."""
    if made.device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        vars(made)["_setup_devices"] = torch.device("cuda", torch.cuda.current_device())
        made._n_gpu = 1


def parameter_groups(task: Task, settings: Settings) -> list[dict[str, Any]]:
    """The groups for the optimiser: θ_d, without weight decay, and the head."""
    groups = task.adapter.parameter_groups(settings.lora_rate, settings.head_rate)
    if settings.theta_rate is not None:
        groups[0]["lr"] = settings.theta_rate
    return groups


def steps_of(task: Task, settings: Settings) -> int:
    """How many steps training takes."""
    steps = settings.epochs * math.ceil(len(task.train) / settings.accumulate)
    return steps if settings.max_steps is None else min(settings.max_steps, steps)
