"""The arguments of `unilora finetune`, and the texts of its help."""

import argparse
from typing import Any

from unilora_cli.defaults import DEFAULTS
from unilora_cli.options import command, model_arguments
from unilora_cli.options_training import adapter_arguments, memory_arguments, output_arguments, training_arguments
from unilora_cli.values import flag, fraction, names, part, positive

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
    adapter_arguments(parser.add_argument_group("adapter"))
    training_arguments(parser.add_argument_group("training"), DEFAULTS[kind])
    if kind != "vit":
        memory_arguments(parser.add_argument_group("precision and memory"))
    output_arguments(parser.add_argument_group("output"))
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
