"""`unilora check`: which serving engines take a LoRA folder. Imports the core only."""

from unilora_cli.console import say
from unilora_cli.options.files import Check
from unilora_core.engines import ENGINES, Lora, read_lora, refuse, serving, verdicts

__all__ = ["describe", "run"]


def run(options: Check) -> None:
    """Print what each engine says to the folder.

    Raises:
        FileNotFoundError, CorruptFileError: no LoRA folder.
        AdapterFileError: the engine that the user named would not serve it.
    """
    lora = read_lora(options.folder)
    say(describe(options.folder, lora))
    if options.engine:
        refuse(lora, options.engine)


def describe(folder: str, lora: Lora) -> str:
    """A paragraph per engine: how it serves the folder, or every reason why it would not."""
    lines = []
    for name, reasons in verdicts(lora).items():
        lines.append(f"{name} ({ENGINES[name].version}): {'no' if reasons else 'yes'}")
        lines += [f"  - {reason}" for reason in reasons] or [f"  {serving(name, folder, lora)}"]
    return "\n".join(lines)
