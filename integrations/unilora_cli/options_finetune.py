"""The arguments of `unilora finetune`, and the texts of its help."""

import argparse
from typing import Any

from unilora_cli.defaults import DEFAULTS
from unilora_cli.options import command, model_arguments
from unilora_cli.options_training import adapter_arguments, memory_arguments, output_arguments, training_arguments
from unilora_cli.values import flag, fraction, names, not_negative, part, positive, rate, span

__all__ = ["add_finetune", "add_recipes", "complete"]

WRITES = """
Writes to the output folder: adapter.safetensors (theta_d, the trained head, and what they belong to), metrics.csv
(loss and rate of each step), summary.csv (a line per epoch), metrics.json (settings and results) and loss.png. A run
that was interrupted or killed goes on with --resume. With `torchrun --nproc-per-node 2 -m unilora_cli` in the place of
`unilora`, two processes share each step.
"""

VIT_WRITES = """
Also confusion.csv and .png, predictions.csv (each held-out image, or test image where there are any) and mistakes.png
(the most confident ones), all of the adapter that is kept.
"""

VIT = """
  unilora finetune vit --model vit_base_patch16_224.augreg_in21k --data flowers/
  unilora finetune vit --model vit_small_patch16_224 --data uoft-cs/cifar10 --limit 5000 --epochs 1
  unilora finetune vit --model vit_small_patch16_224 --data torch/cifar10 --data-dir ~/data --download
  unilora finetune vit --model vit_base_patch16_224 --data flowers/ --augment timm --aa rand-m9-mstd0.5-inc1 \\
      --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 --drop-path 0.1 --epochs 30
  unilora finetune vit --model vit_small_patch16_224 --checkpoint mine.pth --data photos/ --bad-images skip
  unilora finetune vit --model vit_tiny_patch16_224 --no-pretrained --model-arg img_size=32 --data digits/ --d 2000
  unilora finetune vit --recipe vision/vit-base/pets --seed 1
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
Lists the recipes that are shipped, or prints one. They hold the settings of the experiments of the Uni-LoRA paper;
`unilora finetune vit|text|lm --recipe NAME` runs one, and further options override it.
"""
    examples = """
  unilora recipes glue/roberta-base/cola
  unilora recipes glue/roberta-base/cola > mine.toml
"""
    parser = command(commands, "recipes", "list the recipes for finetune", details, examples, "unilora_cli.recipes:run")
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one")


def _task(
    tasks: Any, kind: str, purpose: str, details: str, examples: str, writes: str = ""
) -> tuple[argparse.ArgumentParser, Any]:
    about = details + WRITES + writes.lstrip("\n")
    parser = command(tasks, kind, purpose, about, examples, "unilora_cli.commands.finetune:run")
    parser.usage = (
        f"unilora finetune {kind} --model NAME --data DATA [options]\n"
        f"       unilora finetune {kind} --recipe NAME [options]"
    )
    parser.set_defaults(kind=kind, parser=parser)
    source = parser.add_argument_group("model and data")
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
    adapter_arguments(parser.add_argument_group("adapter"), kind)
    training_arguments(parser.add_argument_group("training"), DEFAULTS[kind])
    if kind != "vit":
        memory_arguments(parser.add_argument_group("precision and memory"))
    output_arguments(parser.add_argument_group("output"))
    return parser, source


def _add_vit(tasks: Any) -> None:
    details = """
Data: a folder of class folders of images (train/, val/ and test/ inside it are used, if there); a data set of
torchvision as timm names it (torch/cifar10, torch/image_folder); or an image data set of the hub (or a local folder
that datasets can load). Model: a name that timm knows, hf-hub:NAME, or a local folder.
"""
    parser, source = _task(tasks, "vit", "fine-tune an image classifier of timm", details, VIT, VIT_WRITES)
    weights = source.add_mutually_exclusive_group()
    weights.add_argument("--no-pretrained", action="store_true", help="random weights instead of pretrained ones")
    weights.add_argument(
        "--checkpoint", metavar="FILE", help="pretrained weights from a file (.safetensors, .pth; .npz of some models)"
    )
    source.add_argument("--data-dir", metavar="FOLDER", help="where data of torchvision are")
    flag(source, "--download", "let torchvision fetch them, if they are not there")
    source.add_argument("--test-data", metavar="DATA", help="scored once, at the end, with the adapter that is kept")
    source.add_argument(
        "--test-split", metavar="NAME", help="the split or folder of the data for that (default: test/ beside val/)"
    )
    source.add_argument("--image-column", metavar="NAME", help="of a hub data set (default: the one that holds images)")
    source.add_argument("--label-column", metavar="NAME", default="label", help="of a hub data set")
    source.add_argument(
        "--bad-images",
        choices=("stop", "skip"),
        default="stop",
        help="an image that does not decode ends the run (one to test on, before it begins); or all are decoded once "
        "before, and such are left out",
    )
    _augmentation(parser.add_argument_group("augmentation and regularisation, with the names that timm gives them"))


def _augmentation(group: Any) -> None:
    group.add_argument(
        "--augment",
        choices=("none", "crop", "timm"),
        default="crop",
        help="training images: as those to read; random crop of 60 to 100 %% and flip; or timm's own defaults",
    )
    group.add_argument(
        "--scale", type=span, metavar="MIN,MAX", help="area of a random crop, such as 0.08,1 (default: from --augment)"
    )
    group.add_argument("--hflip", type=part, metavar="P", help="how often an image is mirrored (default: 0.5)")
    group.add_argument("--vflip", type=part, metavar="P", help="how often it is turned upside down (default: 0)")
    group.add_argument(
        "--color-jitter", type=not_negative, metavar="X", help="changes of colour (default: 0; 0.4 with --augment timm)"
    )
    group.add_argument("--aa", metavar="POLICY", help="RandAugment and the like, such as rand-m9-mstd0.5-inc1")
    group.add_argument("--reprob", type=part, metavar="P", help="how often a rectangle is erased")
    group.add_argument("--mixup", type=not_negative, metavar="ALPHA", default=0.0, help="mixup, such as 0.8")
    group.add_argument("--cutmix", type=not_negative, metavar="ALPHA", default=0.0, help="CutMix, such as 1.0")
    group.add_argument("--mixup-prob", type=part, metavar="P", default=1.0, help="how often a batch is mixed at all")
    group.add_argument(
        "--mixup-switch-prob", type=part, metavar="P", default=0.5, help="how often by CutMix, where both are on"
    )
    group.add_argument("--smoothing", type=part, metavar="X", default=0.0, help="label smoothing, such as 0.1")
    group.add_argument("--drop", type=part, metavar="P", help="dropout of the model")
    group.add_argument("--drop-path", type=part, metavar="P", help="stochastic depth of the model")
    group.add_argument(
        "--crop-pct", type=rate, metavar="X", help="of an image to read, the part (default: the model's)"
    )
    group.add_argument(
        "--interpolation", choices=("bilinear", "bicubic", "lanczos"), help="when resizing (default: the model's)"
    )


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
Data: a .txt file (cut into blocks of --length tokens); a .csv, .tsv, .jsonl, .json or .parquet file, or a data set of
the hub, with the columns "text" (joined and cut likewise); "prompt" and "response" (or "completion"), "question" and
"answer", "query" and "response", "instruction", "output" and perhaps "input"; or "messages" or "conversations" (lists
of {"role", "content"} or {"from", "value"}; the tokenizer's chat template makes a text of them, "tools" and all).
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
    flag(source, "--shard", "each process of torchrun holds a part of the base's weights (FSDP2), for large ones")
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
