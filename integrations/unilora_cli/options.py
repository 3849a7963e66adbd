"""The arguments of the subcommands on files, what all subcommands share, and the texts of their help."""

import argparse
from typing import Any

from unilora_cli.values import assignment, auto_or_positive, names, natural, positive, selection

__all__ = [
    "add_analyze",
    "add_check",
    "add_combine",
    "add_convert",
    "add_inspect",
    "add_merge",
    "command",
    "model_arguments",
]

KINDS = ("vit", "text", "lm")
ENGINES = ("vllm", "sglang", "lorax", "llama.cpp")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS, []) and action.option_strings
        return f"{action.help} (default: %(default)s)" if shown else action.help


def command(commands: Any, name: str, purpose: str, details: str, examples: str, run: str) -> argparse.ArgumentParser:
    """The parser of a subcommand; ``run`` is the function for it, as ``module:function``."""
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


def model_arguments(group: Any) -> None:
    """What is passed on when a model is built."""
    group.add_argument(
        "--model-arg",
        action="append",
        type=assignment,
        default=[],
        metavar="KEY=VALUE",
        help="passed on when the model is built, such as img_size=384 or num_labels=3; may be repeated",
    )


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
    parser = command(
        commands, "inspect", "show what an adapter file holds", details, examples, "unilora_cli.commands.inspect:run"
    )
    parser.add_argument("file", metavar="FILE", help="adapter.safetensors")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def add_convert(commands: Any) -> None:
    """`unilora convert`."""
    details = """
  --to lora          a PEFT LoRA folder: the factors A and B exactly; for PEFT, vLLM, llama.cpp, ... With --engine,
                     only what that engine would serve is written.
  --to gguf          a GGUF LoRA, which llama.cpp loads beside the base's GGUF file (needs the package gguf)
  --to peft-unilora  a PEFT Uni-LoRA folder (for adapters with grouping numpy-shuffle and start paper)
  --to unilora       from a PEFT Uni-LoRA folder to an adapter file
The base model is needed, because the file holds one vector and not the layers.
"""
    examples = """
  unilora convert adapter.safetensors --to lora lora/
  unilora convert adapter.safetensors --to lora --engine vllm lora/
  unilora convert adapter.safetensors --to gguf lora.gguf
  unilora convert adapter.safetensors --model roberta-base --kind text --to peft-unilora peft/
  unilora convert peft/ --model roberta-base --kind text --to unilora adapter.safetensors
"""
    purpose = "turn an adapter into another format, or another format into an adapter"
    parser = command(commands, "convert", purpose, details, examples, "unilora_cli.commands.convert:run")
    parser.add_argument("source", metavar="SOURCE", help="adapter file, or a PEFT folder")
    parser.add_argument("out", metavar="OUT", help="folder or file to write")
    formats = ("lora", "gguf", "peft-unilora", "unilora")
    parser.add_argument("--to", required=True, choices=formats, help="the format of OUT")
    lora = parser.add_argument_group("with --to lora")
    lora.add_argument("--engine", choices=ENGINES, help="the engine that will serve it")
    lora.add_argument(
        "--rank",
        type=positive,
        metavar="R",
        help="of every layer, filled up with zeros (default: the largest needed; for vllm the next it can start with)",
    )
    _base_arguments(parser)


def add_check(commands: Any) -> None:
    """`unilora check`."""
    details = """
Says for vLLM, SGLang, LoRAX and llama.cpp whether they take a LoRA folder: how they serve it, or which field or tensor
stops them. Reads the config and the names of the tensors; loads no framework.
"""
    examples = """
  unilora check lora/
  unilora check lora/ --engine vllm   # exit code 1 if vLLM would not serve it
"""
    purpose = "say which serving engines take a LoRA folder"
    parser = command(commands, "check", purpose, details, examples, "unilora_cli.commands.check:run")
    parser.add_argument("folder", metavar="FOLDER", help="a LoRA folder, as `unilora convert --to lora` writes it")
    parser.add_argument("--engine", choices=ENGINES, help="end with an error if this one would not serve it")


def add_combine(commands: Any) -> None:
    """`unilora combine`."""
    details = """
Adapters of one spec are vectors of one space: the result is a file like theirs. With weights that add up to 1 (the
default is the mean) it is their weighted mean, trained heads included. Other weights add, scale or negate what
training has changed since the start that all have in common; then no file may hold a head.
"""
    examples = """
  unilora combine a.safetensors b.safetensors --out mean.safetensors
  unilora combine a.safetensors b.safetensors --weights 0.7 0.3 --out between.safetensors
  unilora combine a.safetensors b.safetensors --weights 1 1 --out both.safetensors
  unilora combine toxic.safetensors --weights -1 --out less_toxic.safetensors
"""
    purpose = "make one adapter of several: their mean, an interpolation, a sum"
    parser = command(commands, "combine", purpose, details, examples, "unilora_cli.commands.combine:run")
    parser.add_argument("files", nargs="+", metavar="FILE", help="adapter files of one spec and base")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each file (default: the mean)")


def add_merge(commands: Any) -> None:
    """`unilora merge`."""
    details = """
The adapted model becomes a plain one, which needs no unilora: a folder that transformers' from_pretrained reads, or
timm's create_model("local-dir:FOLDER"). The checkpoint of a transformers model is merged file by file: one of them is
in memory at a time, and the model never is. A base that was quantised for the training is merged unquantised.
With --onnx a timm model is written as FOLDER/model.onnx, too: images in, logits out, for any batch size.
"""
    examples = """
  unilora merge runs/sst2/adapter.safetensors --out merged/
  unilora merge adapter.safetensors --model vit_base_patch16_224 --kind vit --out merged/
  unilora merge runs/flowers/adapter.safetensors --out merged/ --onnx
"""
    purpose = "write the base model with the adapter merged into its weights"
    parser = command(commands, "merge", purpose, details, examples, "unilora_cli.commands.merge:run")
    parser.add_argument("file", metavar="FILE", help="adapter.safetensors")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--onnx", action="store_true", help="for a timm model: write model.onnx beside the weights")
    _base_arguments(parser)


def add_analyze(commands: Any) -> None:
    """`unilora analyze`."""
    details = """
P maps the trained vector to the numbers of A and B of every target (or to the update itself, where a method trains
that). For each method, from P itself:
  global       how many columns of P reach more than one target
  A and B      how many reach both A and B
  rows/column  how many rows a column reaches, least and most: P is uniform where they are equal
  gains        |P x|^2 / |x|^2, least and most: the eigenvalues of P'P, of a large P the gains of random x; P is
               isometric where they are 1
  file, memory bytes of numbers in the file, and kept while it is used
  operations   numbers that the map and its transpose compute or move; ms: their time in NumPy
Without --model no framework is loaded. Writes analysis.csv, with every figure, and support.png, a picture of each P.
"""
    examples = """
  unilora analyze --out properties/
  unilora analyze --method uni-lora,vera,fastfood --layers 2 --width 32
  unilora analyze --method uni-lora/local,vera/balanced    # with another grouping
  unilora analyze runs/sst2/adapter.safetensors --method gaussian
  unilora analyze --model roberta-base --kind text --method uni-lora,lora-xs
"""
    purpose = "measure what the projection of each method is: global, uniform, isometric, cheap"
    parser = command(commands, "analyze", purpose, details, examples, "unilora_cli.commands.analyze:run")
    parser.add_argument("file", nargs="?", metavar="FILE", help="an adapter file: its P, for its targets")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write into")
    _method_arguments(parser.add_argument_group("methods"))
    _target_arguments(parser)


def _method_arguments(group: Any) -> None:
    group.add_argument(
        "--method",
        type=names,
        metavar="NAMES",
        help="names, METHOD or METHOD/GROUPING, or all (default: all, or with FILE its own alone)",
    )
    group.add_argument("--rank", type=positive, default=4, metavar="R", help="of the methods that have one")
    group.add_argument(
        "--d", type=auto_or_positive, default="auto", metavar="N", help="of the methods that have a choice"
    )
    group.add_argument("--seed", type=natural, default=0, metavar="N", help="of what is drawn")
    group.add_argument(
        "--option",
        action="append",
        type=assignment,
        default=[],
        metavar="KEY=VALUE",
        help="of the methods that take it, such as frequencies=100; may be repeated",
    )


def _target_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("instead of FILE: the targets of a model, and its weights")
    group.add_argument("--model", metavar="NAME", help="name or folder of the model")
    group.add_argument("--kind", choices=KINDS, help="what it is")
    group.add_argument("--no-pretrained", action="store_true", help="of timm: random weights")
    group.add_argument("--targets", type=selection, metavar="NAMES", help="layers, as for finetune")
    model_arguments(group)
    group = parser.add_argument_group("without either: q and v of a transformer with random weights")
    group.add_argument("--layers", type=positive, default=4, metavar="N", help="how many")
    group.add_argument("--width", type=positive, default=64, metavar="N", help="of each")


def _base_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model", "an adapter written by `unilora finetune` knows its base model")
    group.add_argument("--model", metavar="NAME", help="name or folder of the base model (default: the file's)")
    group.add_argument("--kind", choices=KINDS, help="what the base model is (default: the file's)")
    group.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a timm model; wanted where it was trained with such a file"
    )
    group.add_argument(
        "--any-rank", action="store_true", help="take factors of ranks that would need far more memory than the model"
    )
    model_arguments(group)
