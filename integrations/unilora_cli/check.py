"""`unilora check`: which serving engines take a LoRA folder. Imports the core only."""

import argparse

from unilora_cli.console import say
from unilora_core.engines import ENGINES, check, read_lora, refuse

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
    config = read_lora(folder).config
    known = {"folder": folder, "base": config.get("base_model_name_or_path") or "BASE", "rank": config.get("r")}
    lines = []
    for name, reasons in check(folder).items():
        engine = ENGINES[name]
        lines.append(f"{name} ({engine.version}): {'no' if reasons else 'yes'}")
        lines += [f"  - {reason}" for reason in reasons] or [f"  {engine.command.format(**known)}"]
    return "\n".join(lines)
