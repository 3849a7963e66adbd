"""The arguments of `unilora finetune`, and the texts of its help."""

import argparse
from typing import Any

from unilora_cli.defaults import DEFAULTS, RANK, Defaults
from unilora_cli.options import command, model_arguments
from unilora_cli.values import (
    auto_or_positive,
    flag,
    fraction,
    names,
    natural,
    not_negative,
    part,
    positive,
    rate,
    selection,
)

__all__ = ["add_finetune", "add_recipes", "complete"]

WRITES = """
Writes to the output folder: adapter.safetensors (theta_d, the trained head, and what they belong to), metrics.csv
(loss and rate of each step), metrics.json (settings and results) and loss.png.
"""

VIT = """
  unilora finetune vit --model vit_base_patch16_224.augreg_in21k --data flowers/
  unilora finetune vit --model vit_small_patch16_224 --data uoft-cs/cifar10 --limit 5000 --epochs 1
  unilora finetune vit --model vit_tiny_patch16_224 --no-pretrained --model-arg img_size=32 --data digits/ --d 2000
"""

TEXT = """
  unilora finetune text --model roberta-base --data train.tsv --eval-data dev.tsv
  unilora finetune text --model roberta-base --data nyu-mll/glue --subset mrpc \\
      --text-column sentence1 --pair-column sentence2
  unilora finetune text --model roberta-base --data nyu-mll/glue --subset stsb --regression \\
      --text-column sentence1 --pair-column sentence2
  unilora finetune text --recipe glue/roberta-base/cola --seed 1
  unilora finetune text --model ./my-bert --data reviews.csv --text-column review --label-column stars --bf16
"""

LM = """
  unilora finetune lm --model HuggingFaceTB/SmolLM2-135M --data book.txt --length 512
  unilora finetune lm --model meta-llama/Llama-3.2-1B --data instructions.jsonl --response-only --bf16
  unilora finetune lm --model Qwen/Qwen3-0.6B --data chats.jsonl --response-only --packing --load-in-4bit
  unilora finetune lm --recipe math/mistral-7b --batch-size 4 --accumulate 16
  unilora finetune lm --model gpt2 --data roneneldan/TinyStories --limit 2000
"""


def add_finetune(commands: Any) -> None:
    """`unilora finetune vit|text|lm`."""
    purpose = "train one vector beside a frozen model"
    parser = commands.add_parser("finetune", help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    tasks = parser.add_subparsers(metavar="vit|text|lm", required=True)
    _add_vit(tasks)
    _add_text(tasks)
    _add_lm(tasks)


def complete(arguments: argparse.Namespace) -> None:
    """Of `finetune`: what must be there, on the command line or in a recipe, and the rate where neither has one.

    The parser ends the process if something is missing, as with any wrong usage.
    """
    parser = vars(arguments).pop("parser", None)
    if parser is None:
        return
    if missing := [f"--{name}" for name in ("model", "data") if not getattr(arguments, name)]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if arguments.lora_rate is None:
        arguments.lora_rate = DEFAULTS[arguments.kind].lora_rate


def add_recipes(commands: Any) -> None:
    """`unilora recipes`."""
    details = """
Lists the recipes that are shipped, or prints one. They hold the settings of the language experiments of the Uni-LoRA
paper; `unilora finetune text|lm --recipe NAME` runs one, and further options override it.
"""
    examples = """
  unilora recipes glue/roberta-base/cola
  unilora recipes glue/roberta-base/cola > mine.toml
"""
    parser = command(commands, "recipes", "list the recipes for finetune", details, examples, "unilora_cli.recipes:run")
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one")


def _task(tasks: Any, kind: str, purpose: str, details: str, examples: str) -> tuple[argparse.ArgumentParser, Any]:
    parser = command(tasks, kind, purpose, details + WRITES, examples, "unilora_cli.finetune:run")
    parser.usage = f"unilora finetune {kind} --model NAME --data DATA [options]"
    parser.set_defaults(kind=kind, parser=parser)
    source = parser.add_argument_group("model and data")
    if kind != "vit":
        parser.usage += f"\n       unilora finetune {kind} --recipe NAME [options]"
        source.add_argument(
            "--recipe", metavar="NAME", help="settings by name (see `unilora recipes`), or a .toml file; options win"
        )
    source.add_argument("--model", metavar="NAME", help="name on the hub, or a local folder")
    model_arguments(source)
    source.add_argument("--data", metavar="DATA", help="training data, as said above")
    source.add_argument("--eval-data", metavar="DATA", help="held-out data; else a split of the data, or a part of it")
    source.add_argument(
        "--subset", metavar="NAME", help="configuration of a hub data set, such as sst2 of nyu-mll/glue"
    )
    source.add_argument(
        "--eval-subset", metavar="NAME", help="configuration of the hub data set that --eval-data names"
    )
    source.add_argument(
        "--train-split",
        metavar="NAME",
        default="train",
        help="split of a hub data set to train on; train[:1000]: a part",
    )
    source.add_argument(
        "--eval-split", metavar="NAME", help="held-out split of a hub data set (default: found by name)"
    )
    source.add_argument(
        "--holdout",
        type=fraction,
        metavar="PART",
        default=DEFAULTS[kind].holdout,
        help="the part held out where there is no held-out data",
    )
    source.add_argument("--limit", type=positive, metavar="N", help="train on N examples only, drawn at random")
    _adapter_arguments(parser.add_argument_group("adapter"))
    _training_arguments(parser.add_argument_group("training"), DEFAULTS[kind])
    if kind != "vit":
        _memory_arguments(parser.add_argument_group("precision and memory"))
    _output_arguments(parser.add_argument_group("output"))
    return parser, source


def _add_vit(tasks: Any) -> None:
    details = """
Data: a folder of class folders of images (train/ and val/ inside it are used, if there), or an image data set of the
hub (or a local folder that datasets can load). Model: a name that timm knows, hf-hub:NAME, or a local folder.
"""
    _, source = _task(tasks, "vit", "fine-tune an image classifier of timm", details, VIT)
    source.add_argument("--no-pretrained", action="store_true", help="random weights instead of pretrained ones")
    source.add_argument("--checkpoint", metavar="FILE", help="pretrained weights from a file (.safetensors or .pth)")
    source.add_argument("--image-column", metavar="NAME", help="of a hub data set (default: the one that holds images)")
    source.add_argument("--label-column", metavar="NAME", default="label", help="of a hub data set")
    source.add_argument(
        "--augment",
        choices=("none", "crop", "timm"),
        default="crop",
        help="training images: centre crop; random crop of 60 to 100 %% and flip; or timm's own defaults",
    )
    source.add_argument("--hflip", type=part, metavar="P", default=0.5, help="how often an image is mirrored")


def _add_text(tasks: Any) -> None:
    details = """
Data: a .tsv, .csv, .jsonl or .parquet file with a column of texts and one of labels, or a data set of the hub (or a
local folder that datasets can load). Model: anything that AutoModelForSequenceClassification loads.
"""
    _, source = _task(tasks, "text", "fine-tune a text classifier of transformers", details, TEXT)
    source.add_argument("--text-column", metavar="NAME", help="of the texts (default: sentence or text)")
    source.add_argument("--pair-column", metavar="NAME", help="of the second texts, for tasks on pairs")
    source.add_argument("--label-column", metavar="NAME", default="label", help="of the labels: words or integers")
    flag(source, "--regression", "the labels are numbers: one output, squared error")
    source.add_argument("--length", type=positive, metavar="N", default=DEFAULTS["text"].length, help="tokens at most")
    source.add_argument(
        "--metric",
        type=names,
        metavar="NAMES",
        help="comma list of accuracy, f1, mcc; with --regression of pearson, spearman (default: accuracy; pearson and "
        "spearman)",
    )


def _add_lm(tasks: Any) -> None:
    details = """
Data: a .txt file (cut into blocks of --length tokens); a .csv, .tsv, .jsonl or .parquet file, or a data set of the hub,
with the columns "text" (joined and cut likewise); "prompt" and "response" (or "completion"), "question" and "answer",
"query" and "response", "instruction", "output" and perhaps "input"; or "messages" (lists of {"role", "content"}; the
tokenizer's chat template makes a text of them).
Model: anything that AutoModelForCausalLM loads. Reported: loss and perplexity, before and after.
"""
    _, source = _task(tasks, "lm", "fine-tune a causal language model of transformers", details, LM)
    source.add_argument("--text-column", metavar="NAME", help="of whole texts (default: text)")
    source.add_argument(
        "--prompt", metavar="TEXT", help="the words of a prompt, with columns in braces: 'Question: {question} Answer:'"
    )
    source.add_argument("--response-column", metavar="NAME", help="of the responses to --prompt (default: by name)")
    flag(source, "--response-only", "no loss on the tokens of the prompt; in a chat, on the assistant's turns only")
    flag(source, "--packing", "several examples in one block of --length tokens; none attends to another")
    source.add_argument("--length", type=positive, metavar="N", default=DEFAULTS["lm"].length, help="tokens at most")
    source.add_argument(
        "--metric",
        type=names,
        metavar="NAMES",
        help="comma list of perplexity and exact-match (of the final number in an answer that the model writes to a "
        "held-out prompt, as for GSM8K) (default: perplexity)",
    )
    source.add_argument(
        "--eval-prompts", type=positive, metavar="N", default=100, help="held-out prompts answered for exact-match"
    )
    source.add_argument("--max-new-tokens", type=positive, metavar="N", default=256, help="of an answer")


def _adapter_arguments(group: Any) -> None:
    group.add_argument("--rank", type=positive, metavar="R", default=RANK, help="of the LoRA factors")
    group.add_argument("--d", type=auto_or_positive, metavar="N", default="auto", help="trained numbers, or auto")
    group.add_argument(
        "--targets",
        type=selection,
        metavar="NAMES",
        help="layers: a word (all-linear, query, qkv), a comma list, or a regular expression of whole names "
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
    group.add_argument("--start", metavar="NAME", help="identity or paper (default: the library's)")
    group.add_argument("--bound", type=rate, metavar="X", help="theta_d starts as U(-X, X) (default: from the start)")
    group.add_argument("--grouping", metavar="NAME", help="balanced, iid or numpy-shuffle (default: the library's)")


def _training_arguments(group: Any, default: Defaults) -> None:
    rates = group.add_mutually_exclusive_group()
    rates.add_argument(
        "--lora-rate",
        type=rate,
        metavar="X",
        help=f"the learning rate that LoRA would have; theta_d's follows from it (default: {default.lora_rate})",
    )
    rates.add_argument("--theta-rate", type=rate, metavar="X", help="theta_d's own learning rate instead")
    group.add_argument("--head-rate", type=rate, metavar="X", default=default.head_rate, help="of the head")
    group.add_argument("--epochs", type=positive, metavar="N", default=default.epochs, help="passes over the data")
    group.add_argument("--max-steps", type=positive, metavar="N", help="stop after N steps")
    group.add_argument("--batch-size", type=positive, metavar="N", default=default.batch_size, help="examples at once")
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
    flag(group, "--bf16", "bfloat16 autocast (theta_d stays float32)")
    group.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, mps, or auto")
    group.add_argument("--workers", type=natural, metavar="N", default=0, help="processes that read data")


def _memory_arguments(group: Any) -> None:
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="of the base model's weights; auto: as in the checkpoint. Beside half precision, bfloat16 autocast is on",
    )
    flag(group, "--load-in-4bit", "base in 4-bit nf4 with double quantisation (needs bitsandbytes)")
    flag(group, "--gradient-checkpointing", "compute activations again in the backward pass: less memory, more time")


def _output_arguments(group: Any) -> None:
    group.add_argument("--out", metavar="FOLDER", help="output folder (default: a new one, runs/MODEL-DATA)")
    group.add_argument("--overwrite", action="store_true", help="replace an adapter that is already in that folder")
    group.add_argument(
        "--resume", action="store_true", help="go on with the interrupted run in --out, with the same arguments"
    )
