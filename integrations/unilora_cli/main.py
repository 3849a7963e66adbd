"""The entry point of `unilora`, and the one place where an error becomes a line and an exit code."""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from unilora_cli.command_line import parse
from unilora_cli.console import one_line
from unilora_core import UniLoraError
from unilora_core.errors import printable

__all__ = ["main", "parse"]

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
        options = parse(argv)
        module, function = options.run.split(":")
        getattr(importlib.import_module(module), function)(options)
    except KeyboardInterrupt:
        sys.stderr.write("unilora: interrupted\n")
        return 130
    except Exception as error:  # a library's, too: its traceback is for --debug
        if debug:
            sys.stderr.write(printable(traceback.format_exc()))
        sys.stderr.write(f"unilora: error{_process()}: {_message(error)}\n")
        return 1
    return 0


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
