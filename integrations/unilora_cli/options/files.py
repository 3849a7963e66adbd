"""The options of the commands beside `unilora finetune`, and the texts of their help."""
# ruff: noqa: RUF009  (`option` makes a field)

from dataclasses import dataclass
from typing import Any, Literal

from unilora_cli.options.fields import REQUIRED, Command, option
from unilora_cli.options.finetune import PASSED_ON
from unilora_cli.options.values import Assignment, AutoOrPositive, File, Folder, Names, Natural, Positive, Selection

__all__ = ["COMMANDS", "Analyze", "BaseModel", "Check", "Combine", "Convert", "Inspect", "Merge", "Recipes"]

Kind = Literal["vit", "text", "lm"]
Engine = Literal["vllm", "sglang", "lorax", "llama.cpp"]

OF_MODEL = "instead of FILE: the targets of a model, and its weights"
MADE_UP = "without either: q and v of a transformer with random weights"
"""Groups of the options of `unilora analyze`."""


OVERWRITE = "replace a file that is already there"


def _positional(purpose: str, metavar: str = "FILE", **more: Any) -> Any:
    return option(purpose, REQUIRED, metavar=metavar, positional=True, **more)


@dataclass(frozen=True, kw_only=True)
class Recipes(Command):
    """The options of `unilora recipes`."""

    word, purpose = "recipes", "list the recipes for finetune"
    details = """
Lists the recipes that are shipped, or prints one. They hold the settings of the experiments of the Uni-LoRA paper;
`unilora finetune vit|text|lm --recipe NAME` runs one, and further options override it.
"""
    examples = """
  unilora recipes glue/roberta-base/cola
  unilora recipes glue/roberta-base/cola > mine.toml
"""
    run = "unilora_cli.recipes:run"
    name: str | None = option("print this one", positional=True, nargs="?")


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """The options of `unilora inspect`."""

    word, purpose = "inspect", "show what an adapter file holds"
    details = """
Prints the spec of the projection, the targets, the saved head and statistics of theta_d. Reads the whole file and
checks it; loads no framework.
"""
    examples = """
  unilora inspect runs/flowers/adapter.safetensors
  unilora inspect adapter.safetensors --json | jq .theta_d
"""
    run = "unilora_cli.commands.inspect:run"
    file: str = _positional("adapter.safetensors")
    json: bool = option("everything, as JSON", False, action="store_true")


@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """Which methods are measured."""

    group = "methods"
    method: Names | None = option("names, METHOD or METHOD/GROUPING, or all (default: all, or with FILE its own alone)")
    rank: Positive = option("of the methods that have one", 4, metavar="R")
    d: AutoOrPositive = option("of the methods that have a choice", "auto")
    seed: Natural = option("of what is drawn", 0)
    option: tuple[Assignment, ...] = option("of the methods that take it, such as frequencies=100; may be repeated", ())


@dataclass(frozen=True, kw_only=True)
class Analyze(Methods):
    """The options of `unilora analyze`."""

    word, purpose = "analyze", "measure what the projection of each method is: global, uniform, isometric, cheap"
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
    run = "unilora_cli.commands.analyze:run"
    file: str | None = option("an adapter file: its P, for its targets", positional=True, nargs="?", metavar="FILE")
    out: Folder | None = option("folder to write into")
    model: str | None = option("name or folder of the model", group=OF_MODEL)
    kind: Kind | None = option("what it is", group=OF_MODEL)
    no_pretrained: bool = option("of timm: random weights", False, action="store_true", group=OF_MODEL)
    targets: Selection | None = option("layers, as for finetune", group=OF_MODEL)
    model_arg: tuple[Assignment, ...] = option(PASSED_ON, (), group=OF_MODEL)
    layers: Positive = option("how many", 4, group=MADE_UP)
    width: Positive = option("of each", 64, group=MADE_UP)


@dataclass(frozen=True, kw_only=True)
class ToLora(Command):
    """What a LoRA folder is for."""

    group = "with --to lora"
    engine: Engine | None = option("the engine that will serve it")
    rank: Positive | None = option(
        "of every layer, filled up with zeros (default: the largest needed; for vllm the next it can start with)",
        metavar="R",
    )


@dataclass(frozen=True, kw_only=True)
class BaseModel(Command):
    """The base model of an adapter file, as far as the file does not say it."""

    group = "base model\nan adapter written by `unilora finetune` knows its base model"
    model: str | None = option("name or folder of the base model (default: the file's)")
    kind: Kind | None = option("what the base model is (default: the file's)")
    checkpoint: File | None = option("weights of a timm model; wanted where it was trained with such a file")
    any_rank: bool = option(
        "take factors of ranks that would need far more memory than the model", False, action="store_true"
    )
    model_arg: tuple[Assignment, ...] = option(PASSED_ON, ())


@dataclass(frozen=True, kw_only=True)
class Convert(BaseModel, ToLora):
    """The options of `unilora convert`."""

    word, purpose = "convert", "turn an adapter into another format, or another format into an adapter"
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
    run = "unilora_cli.commands.convert:run"
    source: str = _positional("adapter file, or a PEFT folder", "SOURCE")
    out: str = _positional("folder or file to write", "OUT")
    to: Literal["lora", "gguf", "peft-unilora", "unilora"] = option("the format of OUT", REQUIRED)
    overwrite: bool = option(OVERWRITE, False, action="store_true")


@dataclass(frozen=True, kw_only=True)
class Check(Command):
    """The options of `unilora check`."""

    word, purpose = "check", "say which serving engines take a LoRA folder"
    details = """
Says for vLLM, SGLang, LoRAX and llama.cpp whether they take a LoRA folder: how they serve it, or which field or tensor
stops them. Reads the config and the names of the tensors; loads no framework.
"""
    examples = """
  unilora check lora/
  unilora check lora/ --engine vllm   # exit code 1 if vLLM would not serve it
"""
    run = "unilora_cli.commands.check:run"
    folder: str = _positional("a LoRA folder, as `unilora convert --to lora` writes it", "FOLDER")
    engine: Engine | None = option("end with an error if this one would not serve it")


@dataclass(frozen=True, kw_only=True)
class Combine(Command):
    """The options of `unilora combine`."""

    word, purpose = "combine", "make one adapter of several: their mean, an interpolation, a sum"
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
    run = "unilora_cli.commands.combine:run"
    files: tuple[str, ...] = _positional("adapter files of one spec and base", nargs="+")
    out: File = option("file to write", REQUIRED)
    weights: tuple[float, ...] | None = option("one for each file (default: the mean)", nargs="+", metavar="W")
    overwrite: bool = option(OVERWRITE, False, action="store_true")


@dataclass(frozen=True, kw_only=True)
class Merge(BaseModel):
    """The options of `unilora merge`."""

    word, purpose = "merge", "write the base model with the adapter merged into its weights"
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
    run = "unilora_cli.commands.merge:run"
    file: str = _positional("adapter.safetensors")
    out: Folder = option("folder to write", REQUIRED)
    onnx: bool = option("for a timm model: write model.onnx beside the weights", False, action="store_true")


COMMANDS: tuple[type[Command], ...] = (Recipes, Inspect, Analyze, Convert, Check, Combine, Merge)
