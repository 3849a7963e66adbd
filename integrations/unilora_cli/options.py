"""The arguments of every subcommand, and the texts of their help. Standard library only."""

import argparse
import ast
import re
from typing import Any

from unilora_cli.defaults import DEFAULTS, RANK, Defaults

__all__ = ["add_convert", "add_finetune", "add_inspect", "add_merge"]

KINDS = ("vit", "text", "lm")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS, []) and action.option_strings
        return f"{action.help} (default: %(default)s)" if shown else action.help


def _command(commands: Any, name: str, purpose: str, details: str, examples: str, run: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{details.strip(chr(10))}",
        epilog=f"examples:\n{examples.strip(chr(10))}",
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


# ---- finetune ---------------------------------------------------------------------------------------------------

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
    parser = _command(tasks, kind, purpose, details + WRITES, examples, "unilora_cli.finetune:run")
    parser.usage = f"unilora finetune {kind} --model NAME --data DATA [options]"
    parser.set_defaults(kind=kind)
    source = parser.add_argument_group("model and data")
    source.add_argument("--model", required=True, metavar="NAME", help="name on the hub, or a local folder")
    _model_arguments(source)
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
        type=_fraction,
        metavar="PART",
        default=DEFAULTS[kind].holdout,
        help="the part held out where there is no held-out data",
    )
    source.add_argument("--limit", type=_positive, metavar="N", help="train on N examples only, drawn at random")
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
    source.add_argument("--hflip", type=_part, metavar="P", default=0.5, help="how often an image is mirrored")


def _add_text(tasks: Any) -> None:
    details = """
Data: a .tsv, .csv or .jsonl file with a column of texts and one of labels, or a data set of the hub (or a local
folder that datasets can load). Model: anything that AutoModelForSequenceClassification loads.
"""
    _, source = _task(tasks, "text", "fine-tune a text classifier of transformers", details, TEXT)
    source.add_argument("--text-column", metavar="NAME", help="of the texts (default: sentence or text)")
    source.add_argument("--pair-column", metavar="NAME", help="of the second texts, for tasks on pairs")
    source.add_argument("--label-column", metavar="NAME", default="label", help="of the labels: words or integers")
    source.add_argument("--length", type=_positive, metavar="N", default=DEFAULTS["text"].length, help="tokens at most")


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
    source.add_argument("--length", type=_positive, metavar="N", default=DEFAULTS["lm"].length, help="tokens at most")


def _model_arguments(group: Any) -> None:
    group.add_argument(
        "--model-arg",
        action="append",
        type=_assignment,
        default=[],
        metavar="KEY=VALUE",
        help="passed on when the model is built, such as img_size=384 or num_labels=3; may be repeated",
    )


def _adapter_arguments(group: Any) -> None:
    group.add_argument("--rank", type=_positive, metavar="R", default=RANK, help="of the LoRA factors")
    group.add_argument("--d", type=_auto_or_positive, metavar="N", default="auto", help="trained numbers, or auto")
    group.add_argument(
        "--targets",
        type=_selection,
        metavar="NAMES",
        help="layers: a word (all-linear, query, qkv), a comma list, or a regular expression of whole names "
        "(default: the query and value layers, or what suits the model)",
    )
    group.add_argument("--exclude", type=_selection, metavar="NAMES", help="layers left out, said likewise")
    group.add_argument(
        "--modules-to-save",
        type=_names,
        metavar="NAMES",
        help="comma list of modules trained in full (default: the head)",
    )
    group.add_argument("--seed", type=_natural, metavar="N", default=0, help="of the projection, the head and the data")
    group.add_argument("--start", metavar="NAME", help="identity or paper (default: the library's)")
    group.add_argument("--bound", type=_rate, metavar="X", help="theta_d starts as U(-X, X) (default: from the start)")
    group.add_argument("--grouping", metavar="NAME", help="balanced, iid or numpy-shuffle (default: the library's)")


def _training_arguments(group: Any, default: Defaults) -> None:
    group.add_argument(
        "--lora-rate",
        type=_rate,
        metavar="X",
        default=default.lora_rate,
        help="the learning rate that LoRA would have; theta_d's follows from it",
    )
    group.add_argument("--head-rate", type=_rate, metavar="X", default=default.head_rate, help="of the head")
    group.add_argument("--epochs", type=_positive, metavar="N", default=default.epochs, help="passes over the data")
    group.add_argument("--max-steps", type=_positive, metavar="N", help="stop after N steps")
    group.add_argument(
        "--batch-size", type=_positive, metavar="N", default=default.batch_size, help="examples per step"
    )
    group.add_argument(
        "--warmup", type=_part, metavar="PART", default=default.warmup, help="the part of the steps in which rates rise"
    )
    group.add_argument(
        "--schedule", choices=("linear", "cosine"), default=default.schedule, help="how the rates fall to 0 after that"
    )
    group.add_argument("--bf16", action="store_true", help="bfloat16 autocast (theta_d stays float32)")
    group.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, mps, or auto")
    group.add_argument("--workers", type=_natural, metavar="N", default=0, help="processes that read data")


def _output_arguments(group: Any) -> None:
    group.add_argument("--out", metavar="FOLDER", help="output folder (default: a new one, runs/MODEL-DATA)")
    group.add_argument("--overwrite", action="store_true", help="replace an adapter that is already in that folder")


# ---- inspect, convert, merge ------------------------------------------------------------------------------------


def add_inspect(commands: Any) -> None:
    """`unilora inspect`."""
    details = """
Prints the spec of the projection, the targets, the saved head and statistics of theta_d. Reads the whole file and
checks it; loads no framework.
"""
    examples = """
  unilora inspect runs/flowers/adapter.safetensors
  unilora inspect adapter.safetensors --json | jq .theta_d
"""
    parser = _command(
        commands, "inspect", "show what an adapter file holds", details, examples, "unilora_cli.inspect:run"
    )
    parser.add_argument("file", metavar="FILE", help="adapter.safetensors")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def add_convert(commands: Any) -> None:
    """`unilora convert`."""
    details = """
  --to lora          a PEFT LoRA folder: the factors A and B exactly; for PEFT, vLLM, llama.cpp, ...
  --to peft-unilora  a PEFT Uni-LoRA folder (for adapters with grouping numpy-shuffle and start paper)
  --to unilora       from a PEFT Uni-LoRA folder to an adapter file
The base model is needed, because the file holds one vector and not the layers.
"""
    examples = """
  unilora convert adapter.safetensors --to lora lora/
  unilora convert adapter.safetensors --model roberta-base --kind text --to peft-unilora peft/
  unilora convert peft/ --model roberta-base --kind text --to unilora adapter.safetensors
"""
    purpose = "turn an adapter into another format, or another format into an adapter"
    parser = _command(commands, "convert", purpose, details, examples, "unilora_cli.convert:run")
    parser.add_argument("source", metavar="SOURCE", help="adapter file, or a PEFT folder")
    parser.add_argument("out", metavar="OUT", help="folder, or adapter file, to write")
    parser.add_argument("--to", required=True, choices=("lora", "peft-unilora", "unilora"), help="the format of OUT")
    _base_arguments(parser)


def add_merge(commands: Any) -> None:
    """`unilora merge`."""
    details = """
The adapted model becomes a plain one, which needs no unilora: a folder that transformers' from_pretrained reads, or
timm's create_model("local-dir:FOLDER").
"""
    examples = """
  unilora merge runs/sst2/adapter.safetensors --out merged/
  unilora merge adapter.safetensors --model vit_base_patch16_224 --kind vit --out merged/
"""
    purpose = "write the base model with the adapter merged into its weights"
    parser = _command(commands, "merge", purpose, details, examples, "unilora_cli.merge:run")
    parser.add_argument("file", metavar="FILE", help="adapter.safetensors")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    _base_arguments(parser)


def _base_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model", "an adapter written by `unilora finetune` knows its base model")
    group.add_argument("--model", metavar="NAME", help="name or folder of the base model (default: the file's)")
    group.add_argument("--kind", choices=KINDS, help="what the base model is (default: the file's)")
    group.add_argument("--checkpoint", metavar="FILE", help="weights of a timm model (default: the file's)")
    _model_arguments(group)


# ---- values -----------------------------------------------------------------------------------------------------


def _number(text: str, kind: type, check: Any, wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not check(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value


def _positive(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def _natural(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number from 0")


def _rate(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def _part(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def _auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _selection(text: str) -> str | tuple[str, ...]:
    """Words become a tuple of names or endings; ``all-linear`` and everything else stays one string, a pattern."""
    words = re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*,?", text)
    return _names(text) if words and text != "all-linear" else text


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, {"true": True, "false": False, "none": None}.get(value.lower(), value)
