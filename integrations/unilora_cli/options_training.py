"""The arguments of `unilora finetune` that all tasks share: adapter, training, memory and output."""

from typing import Any

from unilora_cli.defaults import Defaults
from unilora_cli.values import (
    assignment,
    auto_or_positive,
    flag,
    learning_rate,
    names,
    natural,
    not_negative,
    one_of,
    part,
    positive,
    rate,
    selection,
)
from unilora_core.maps import MAPS
from unilora_core.methods import METHODS
from unilora_core.spec import STARTS

__all__ = ["adapter_arguments", "memory_arguments", "output_arguments", "training_arguments"]


WORDS = {"vit": "all-linear, qkv, q, mlp", "text": "all-linear, query of BERT", "lm": "all-linear, q_proj of Llama"}
"""What --targets takes, said by the names that the models of a task have."""


def adapter_arguments(group: Any, kind: str) -> None:
    """What is adapted, and how."""
    group.add_argument(
        "--method",
        type=one_of("method", METHODS),
        metavar="NAME",
        default="uni-lora",
        help=f"{', '.join(METHODS)} (`unilora analyze` compares them)",
    )
    group.add_argument(
        "--method-arg",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as vectors=64 of vb-lora (repeat)",
    )
    group.add_argument(
        "--rank", type=positive, metavar="R", help="of the factors (default: the method's; uni-lora: 16)"
    )
    group.add_argument(
        "--d", type=auto_or_positive, metavar="N", default="auto", help="trained numbers; auto: the method's"
    )
    group.add_argument(
        "--grow-to",
        type=positive,
        metavar="N",
        help="double d, up to N, after an epoch whose held-out loss has come to rest, while that pays",
    )
    group.add_argument(
        "--targets",
        type=selection,
        metavar="NAMES",
        help=f"layers: a word ({WORDS[kind]}), a comma list, or a regular expression of whole names "
        "(default: the query and value layers, or what suits the model)",
    )
    group.add_argument("--exclude", type=selection, metavar="NAMES", help="layers left out, said likewise")
    group.add_argument(
        "--modules-to-save",
        type=names,
        metavar="NAMES",
        help="comma list of modules trained in full (default: the head)",
    )
    group.add_argument("--seed", type=natural, metavar="N", default=0, help="of the projection, the head and the data")
    group.add_argument(
        "--start", type=one_of("start", STARTS), metavar="NAME", help=f"{', '.join(STARTS)} (default: the method's)"
    )
    group.add_argument("--bound", type=rate, metavar="X", help="theta_d starts as U(-X, X) (default: from the start)")
    group.add_argument(
        "--grouping",
        type=one_of("grouping", MAPS),
        metavar="NAME",
        help=f"the map P: {', '.join(MAPS)} (default: the method's)",
    )


def training_arguments(group: Any, default: Defaults) -> None:
    """Rates, steps and precision."""
    rates = group.add_mutually_exclusive_group()
    rates.add_argument(
        "--lora-rate",
        type=learning_rate,
        metavar="X",
        help=f"the learning rate that LoRA would have; theta_d's follows from it (default: {default.lora_rate})",
    )
    rates.add_argument("--theta-rate", type=learning_rate, metavar="X", help="theta_d's own learning rate instead")
    group.add_argument("--head-rate", type=learning_rate, metavar="X", default=default.head_rate, help="of the head")
    group.add_argument("--epochs", type=positive, metavar="N", default=default.epochs, help="passes over the data")
    group.add_argument("--max-steps", type=positive, metavar="N", help="stop after N steps")
    group.add_argument(
        "--batch-size", type=positive, metavar="N", default=default.batch_size, help="examples at once (per process)"
    )
    group.add_argument(
        "--accumulate", type=positive, metavar="N", default=1, help="batches per step; together they act as one"
    )
    group.add_argument(
        "--warmup", type=part, metavar="PART", default=default.warmup, help="the part of the steps in which rates rise"
    )
    group.add_argument(
        "--schedule", choices=("linear", "cosine"), default=default.schedule, help="how the rates fall to 0 after that"
    )
    group.add_argument("--weight-decay", type=not_negative, metavar="X", default=0.01, help="of the head (AdamW)")
    group.add_argument("--max-grad-norm", type=rate, metavar="X", help="gradients are scaled down to this norm")
    group.add_argument(
        "--keep",
        choices=("last", "best"),
        default="last",
        help="which epoch's adapter to keep; the best by the first --metric on held-out data",
    )
    group.add_argument(
        "--patience",
        type=positive,
        metavar="N",
        help="stop after N epochs in which that metric has not become better; --keep says what is in the file then",
    )
    flag(group, "--bf16", "bfloat16 autocast (theta_d stays float32)")
    flag(group, "--fp16", "float16 autocast with scaled gradients, for GPUs without bfloat16")
    flag(group, "--gradient-checkpointing", "compute activations again in the backward pass: less memory, more time")
    group.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile the model (without BACKEND: inductor): slow first steps, then fast ones",
    )
    group.add_argument(
        "--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, mps, or auto; with torchrun cuda or cpu"
    )
    group.add_argument("--workers", type=natural, metavar="N", default=0, help="processes that read data")
    group.add_argument(
        "--report-to", type=names, metavar="NAMES", help="trackers to write to, as well: tensorboard, wandb, mlflow, …"
    )
    group.add_argument(
        "--trainer-arg",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of transformers' TrainingArguments, such as lr_scheduler_type=polynomial (repeat)",
    )


def memory_arguments(group: Any) -> None:
    """How a base model of transformers is held in memory."""
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="of the base model's weights; auto: as in the checkpoint. Beside half precision, bfloat16 autocast is on",
    )
    flag(group, "--load-in-4bit", "base in 4-bit nf4 with double quantisation (needs bitsandbytes)")


def output_arguments(group: Any) -> None:
    """Where a run goes."""
    group.add_argument("--out", metavar="FOLDER", help="output folder (default: a new one, runs/MODEL-DATA)")
    group.add_argument("--overwrite", action="store_true", help="replace an adapter that is already in that folder")
    group.add_argument(
        "--resume", action="store_true", help="go on with the interrupted run in --out, with the same arguments"
    )
