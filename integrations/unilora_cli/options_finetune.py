"""The arguments of `unilora finetune`, and the texts of its help."""

import argparse
from typing import Any

from unilora_cli.defaults import DEFAULTS, RANK, Defaults
from unilora_cli.options import command, model_arguments
from unilora_cli.values import auto_or_positive, fraction, names, natural, part, positive, rate, selection

__all__ = ["add_finetune"]

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
  unilora finetune text --model ./my-bert --data reviews.csv --text-column review --label-column stars --bf16
"""

LM = """
  unilora finetune lm --model HuggingFaceTB/SmolLM2-135M --data book.txt --length 512
  unilora finetune lm --model meta-llama/Llama-3.2-1B --data instructions.jsonl --response-only --bf16
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


def _task(tasks: Any, kind: str, purpose: str, details: str, examples: str) -> tuple[argparse.ArgumentParser, Any]:
    parser = command(tasks, kind, purpose, details + WRITES, examples, "unilora_cli.finetune:run")
    parser.usage = f"unilora finetune {kind} --model NAME --data DATA [options]"
    parser.set_defaults(kind=kind)
    source = parser.add_argument_group("model and data")
    source.add_argument("--model", required=True, metavar="NAME", help="name on the hub, or a local folder")
    model_arguments(source)
    source.add_argument("--data", required=True, metavar="DATA", help="training data, as said above")
    source.add_argument("--eval-data", metavar="DATA", help="held-out data; else a split of the data, or a part of it")
    source.add_argument(
        "--subset", metavar="NAME", help="configuration of a hub data set, such as sst2 of nyu-mll/glue"
    )
    source.add_argument("--train-split", metavar="NAME", default="train", help="split of a hub data set to train on")
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
Data: a .tsv, .csv or .jsonl file with a column of texts and one of labels, or a data set of the hub (or a local
folder that datasets can load). Model: anything that AutoModelForSequenceClassification loads.
"""
    _, source = _task(tasks, "text", "fine-tune a text classifier of transformers", details, TEXT)
    source.add_argument("--text-column", metavar="NAME", help="of the texts (default: sentence or text)")
    source.add_argument("--pair-column", metavar="NAME", help="of the second texts, for tasks on pairs")
    source.add_argument("--label-column", metavar="NAME", default="label", help="of the labels: words or integers")
    source.add_argument("--length", type=positive, metavar="N", default=DEFAULTS["text"].length, help="tokens at most")


def _add_lm(tasks: Any) -> None:
    details = """
Data: a .txt file (cut into blocks of --length tokens); a .jsonl file, or a data set of the hub, with the columns
"text" (joined and cut likewise), "prompt" and "response" (or "completion"), "question" and "answer", or "instruction",
"output" and perhaps "input".
Model: anything that AutoModelForCausalLM loads. Reported: loss and perplexity, before and after.
"""
    _, source = _task(tasks, "lm", "fine-tune a causal language model of transformers", details, LM)
    source.add_argument("--text-column", metavar="NAME", help="of whole texts (default: text)")
    source.add_argument("--response-only", action="store_true", help="no loss on the tokens of the prompt")
    source.add_argument("--length", type=positive, metavar="N", default=DEFAULTS["lm"].length, help="tokens at most")


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
    group.add_argument(
        "--lora-rate",
        type=rate,
        metavar="X",
        default=default.lora_rate,
        help="the learning rate that LoRA would have; theta_d's follows from it",
    )
    group.add_argument("--head-rate", type=rate, metavar="X", default=default.head_rate, help="of the head")
    group.add_argument("--epochs", type=positive, metavar="N", default=default.epochs, help="passes over the data")
    group.add_argument("--max-steps", type=positive, metavar="N", help="stop after N steps")
    group.add_argument("--batch-size", type=positive, metavar="N", default=default.batch_size, help="examples per step")
    group.add_argument(
        "--warmup", type=part, metavar="PART", default=default.warmup, help="the part of the steps in which rates rise"
    )
    group.add_argument(
        "--schedule", choices=("linear", "cosine"), default=default.schedule, help="how the rates fall to 0 after that"
    )
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast (theta_d stays float32)")
    group.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, mps, or auto")
    group.add_argument("--workers", type=natural, metavar="N", default=0, help="processes that read data")


def _output_arguments(group: Any) -> None:
    group.add_argument("--out", metavar="FOLDER", help="output folder (default: a new one, runs/MODEL-DATA)")
    group.add_argument("--overwrite", action="store_true", help="replace an adapter that is already in that folder")
