"""What transformers' Trainer is told of the options of a run."""

import difflib
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from unilora_cli.console import CommandError
from unilora_cli.options.finetune import Finetune, Training
from unilora_cli.tasks.models import readable_errors
from unilora_cli.tasks.task import Task

__all__ = ["check_more", "parameter_groups", "steps_of", "trainer_arguments"]

OURS = re.compile(
    "(eval|save|logging|dataloader|include|do|hub|per_device|warmup|torch_compile|(gradient|activation)_check)_?.*|"
    "output_dir|num_train_epochs|max_steps|max_grad_norm|gradient_accumulation_steps|learning_rate|weight_decay|bf16|fp16|"
    "seed|data_seed|use_cpu|report_to|push_to_hub|resume_from.*|load_best.*|metric_for.*|greater_is.*|label_.*|auto_find.*|"
    "batch_eval.*|disable_tqdm|enable_jit.*|ignore_data.*|length_col.*|local_rank|parallelism.*|prediction_loss.*|"
    "average_tokens.*|remove_unused.*|restore_callback.*|train_sampling.*"
)
"""Options of the Trainer that are set by this command's own, or have no effect: it reads, scores and saves itself."""


def check_more(options: Training) -> None:
    """Refuse what is no option of the Trainer, and those that the command sets itself.

    Raises:
        CommandError: it names the option, and the nearest ones.
    """
    known = [each.name for each in fields(TrainingArguments) if each.init]
    for name, _ in options.trainer_arg:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or "listed at TrainingArguments of transformers"
            raise CommandError(f"--trainer-arg {name}: the Trainer has no such option; the nearest are {near}.")
        if name.startswith(("fsdp", "deepspeed")):
            raise CommandError(f"--trainer-arg {name}: only in Python so far; docs/training.md says how.")
        if OURS.fullmatch(name):
            raise CommandError(f"--trainer-arg {name}: unilora sets this itself; --help lists its own options.")


def trainer_arguments(options: Finetune, steps: int, folder: Path, before: bool) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        before: whether to evaluate before the first step.

    Raises:
        CommandError: a ``--trainer-arg`` that it does not take.
    """
    device = torch.device(options.device)
    usual = {"lr_scheduler_type": options.schedule, "optim": "adamw_torch", "log_level": "error"}
    with readable_errors("--trainer-arg: the Trainer takes no such options"):
        made = TrainingArguments(
            **usual | dict(options.trainer_arg),
            output_dir=str(folder),
            max_steps=steps,
            gradient_accumulation_steps=options.accumulate,
            warmup_steps=round(steps * options.warmup),
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm or 0.0,
            seed=options.seed % 2**32,
            bf16=options.precision == "bfloat16",
            fp16=options.precision == "float16",
            use_cpu=device.type == "cpu",
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="epoch",
            eval_on_start=before,
            save_strategy="epoch",
            save_total_limit=2,  # the one before is there until the new one is whole
            report_to=list(options.report_to or ()) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        _place(made, device)
    return made


def _place(made: TrainingArguments, device: torch.device) -> None:
    """On this device and no other: the Trainer would take the first GPU, and share batches between all of them."""
    if made.device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        vars(made)["_setup_devices"] = torch.device("cuda", torch.cuda.current_device())
        made._n_gpu = 1


def parameter_groups(task: Task, options: Training) -> list[dict[str, Any]]:
    """The groups for the optimiser: θ_d, without weight decay, and the head."""
    groups = task.adapter.parameter_groups(options.lora_rate, options.head_rate)
    if options.theta_rate is not None:
        groups[0]["lr"] = options.theta_rate
    return groups


def steps_of(task: Task, options: Training) -> int:
    """How many steps training takes."""
    steps = options.epochs * math.ceil(len(task.train) / options.accumulate)
    return steps if options.max_steps is None else min(options.max_steps, steps)
