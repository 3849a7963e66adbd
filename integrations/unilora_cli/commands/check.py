"""`unilora check`: which serving engines take a LoRA folder. Imports the core only."""

import argparse

from unilora_cli.console import say
from unilora_core.engines import ENGINES, Lora, read_lora, refuse, serving, verdicts

__all__ = ["describe", "run"]


def run(arguments: argparse.Namespace) -> None:
    """Print what each engine says to the folder.

    Raises:
        FileNotFoundError, CorruptFileError: no LoRA folder.
        AdapterFileError: the engine that the user named would not serve it.
    """
    lora = read_lora(arguments.folder)
    say(describe(arguments.folder, lora))
    if arguments.engine:
        refuse(lora, arguments.engine)


def describe(folder: str, lora: Lora) -> str:
    """A paragraph per engine: how it serves the folder, or every reason why it would not."""
    lines = []
    for name, reasons in verdicts(lora).items():
        lines.append(f"{name} ({ENGINES[name].version}): {'no' if reasons else 'yes'}")
        lines += [f"  - {reason}" for reason in reasons] or [f"  {serving(name, folder, lora)}"]
    return "\n".join(lines)
