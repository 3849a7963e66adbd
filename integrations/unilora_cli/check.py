"""`unilora check`: which serving engines take a LoRA folder. Imports the core only."""

import argparse

from unilora_cli.console import say
from unilora_core.engines import ENGINES, check, read_lora, refuse, serving

__all__ = ["describe", "run"]


def run(arguments: argparse.Namespace) -> None:
    """Print what each engine says to the folder.

    Raises:
        AdapterFileError: the engine that the user named would not serve it.
    """
    say(describe(arguments.folder))
    if arguments.engine:
        refuse(read_lora(arguments.folder), arguments.engine)


def describe(folder: str) -> str:
    """A paragraph per engine: how it serves the folder, or every reason why it would not.

    Raises:
        FileNotFoundError, CorruptFileError: no LoRA folder.
    """
    lora, lines = read_lora(folder), []
    for name, reasons in check(folder).items():
        lines.append(f"{name} ({ENGINES[name].version}): {'no' if reasons else 'yes'}")
        lines += [f"  - {reason}" for reason in reasons] or [f"  {serving(name, folder, lora)}"]
    return "\n".join(lines)
