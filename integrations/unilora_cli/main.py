"""The entry point of `unilora`: the parser, and the one place where an error becomes a line and an exit code."""

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from unilora_cli import options, options_finetune, recipes
from unilora_cli.console import one_line
from unilora_core import UniLoraError, __version__
from unilora_core.errors import printable

__all__ = ["build_parser", "main", "parse"]

EXTRAS = (
    "torch",
    "timm",
    "transformers",
    "datasets",
    "matplotlib",
    "PIL",
    "tqdm",
    "sklearn",
    "scipy",
    "tomli",
    "peft",
    "gguf",
)
"""What a subcommand may miss; the extra ``unilora[cli]`` has all but the last two, which converting needs at times."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 after an error that the user can put right; 130 after Ctrl-C (argparse exits with 2 by itself).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and not a replaced one, as in tests and notebooks
            stream.reconfigure(errors="replace")  # a terminal without θ must not end a training run
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        arguments = parse(argv)
        module, function = arguments.run.split(":")
        getattr(importlib.import_module(module), function)(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("unilora: interrupted\n")
        return 130
    except Exception as error:  # a library's, too: its traceback is for --debug
        if debug:
            sys.stderr.write(printable(traceback.format_exc()))
        sys.stderr.write(f"unilora: error{_process()}: {_message(error)}\n")
        return 1
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line, with those of its recipe where it names one.

    Raises:
        CommandError: a recipe that cannot be used.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if getattr(arguments, "recipe", None):
        recipes.fill_in(arguments)
        arguments = parser.parse_args(argv)
    options_finetune.complete(arguments)
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each names the function that runs it as ``module:function``."""
    parser = argparse.ArgumentParser(
        prog="unilora",
        description="One trainable vector adapts a whole model (Uni-LoRA): train it, look at it, convert it, merge it.",
        epilog="`unilora COMMAND --help` explains each command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"unilora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    options_finetune.add_finetune(commands)
    options_finetune.add_recipes(commands)
    options.add_inspect(commands)
    options.add_analyze(commands)
    options.add_convert(commands)
    options.add_check(commands)
    options.add_combine(commands)
    options.add_merge(commands)
    return parser


def _process() -> str:
    """Which process of several says so; all of them do where all have the error."""
    count, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    return "" if count == "1" else f" in process {rank} of {count}"


def _message(error: Exception) -> str:
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in EXTRAS:
        what = {"peft": "peft", "gguf": "unilora[gguf]"}.get(package, "unilora[cli]")
        return f"this needs {package}, which is not installed: pip install '{what}'"
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, (UniLoraError, OSError)):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)} (not foreseen; --debug shows where)"
