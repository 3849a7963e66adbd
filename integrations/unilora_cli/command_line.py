"""From the words of a command line to the options of a command."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from unilora_cli import recipes
from unilora_cli.options import files, finetune
from unilora_cli.options.fields import Command, Option, options_of
from unilora_core import __version__

__all__ = ["build_parser", "parse"]

DEBUG = "show the traceback of an error"


def parse(argv: Sequence[str] | None = None) -> Command:
    """The options that a command line says, over those of its recipe where it names one.

    The parser ends the process after wrong usage.

    Raises:
        CommandError: a recipe that cannot be used.
    """
    said = vars(build_parser().parse_args(argv))
    command, parser = said.pop("command"), said.pop("parser")
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    said.pop("debug", None)  # `main` has looked for it itself
    if said.get("recipe"):
        said = recipes.filled_in(command, said)
    wanted = [each for each in options_of(command).values() if each.default is MISSING and not each.positional]
    if missing := [f"--{each.word}" for each in wanted if not said.get(each.name)]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return command(**said)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Of a command it gives the class, its own parser, and the options that were said."""
    parser = argparse.ArgumentParser(
        prog="unilora",
        description="One trainable vector adapts a whole model (Uni-LoRA): train it, look at it, convert it, merge it.",
        epilog="`unilora COMMAND --help` explains each command, with examples.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"unilora {__version__}")
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    purpose = "train one vector beside a frozen model"
    finetuning = commands.add_parser("finetune", help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    tasks = finetuning.add_subparsers(metavar="|".join(finetune.TASKS), required=True)
    for task in finetune.TASKS.values():
        _add_command(tasks, task)
    for command in files.COMMANDS:
        _add_command(commands, command)
    return parser


def _add_command(commands: Any, command: type[Command]) -> None:
    parser = commands.add_parser(
        command.word,
        help=command.purpose,
        usage=command.usage,
        description=f"{command.purpose[0].upper()}{command.purpose[1:]}.\n\n{command.details.strip(chr(10))}",
        epilog=f"examples:\n{command.examples.strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # it keeps the line breaks of the examples
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=command, parser=parser)
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    options, groups, either = options_of(command), {"": parser}, dict[str, Any]()
    for option in sorted(options.values(), key=lambda each: bool(each.group)):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(*option.group.split("\n"))
        place = either.get(option.instead_of, groups[option.group])
        if any(other.instead_of == option.word for other in options.values()):
            place = either[option.word] = place.add_mutually_exclusive_group()
        _add_argument(place, option, by_recipe="recipe" in options)


def _add_argument(place: Any, option: Option, by_recipe: bool) -> None:
    """Add an option to a parser or a group of one; ``by_recipe``: what is required may come from a recipe, too."""
    argument = dict(option.argument)
    if option.positional:
        place.add_argument(option.name, **argument)
        return
    if option.default is MISSING:
        argument["required"] = not by_recipe
    elif option.default not in (None, False, ()):
        argument["help"] += f" (default: {option.default})"
    place.add_argument(f"--{option.word}", **argument)
