"""Recipes: the settings of an experiment in a TOML file, and `unilora recipes`, which lists those that are shipped.

A recipe's keys are the options of `unilora finetune vit`, `text` or `lm` without their dashes in front; ``task`` says
which of them, ``about`` what the recipe is. Options of the command line win over it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, one_line, path_of, say, table
from unilora_cli.defaults import DEFAULTS
from unilora_core.schema import shown

__all__ = ["FOLDER", "fill_in", "run", "shipped"]

FOLDER = Path(__file__).with_name("recipes")
HEADER = ("task", "about")
NOT_SETTINGS = {"help", "debug", "recipe", "model_arg", "method_arg", "trainer_arg"}
NOT_SETTINGS |= {"report_to", "out", "overwrite", "resume"}
"""What belongs to one run, not to an experiment."""


def run(arguments: argparse.Namespace) -> None:
    """List the shipped recipes, or print one.

    Raises:
        CommandError: no such recipe, or no TOML.
    """
    if arguments.name:
        _read(arguments.name)
        say(_text(arguments.name).rstrip())
        return
    rows = [(name, _read(name)) for name in shipped()]
    say(table([(name, recipe["task"], recipe["about"]) for name, recipe in rows], indent=""))


def shipped() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.toml"))


def fill_in(arguments: argparse.Namespace) -> None:
    """Make the values of ``--recipe`` the defaults of the parser of this subcommand, ``arguments.parser``.

    Raises:
        CommandError: no such recipe, or it is another task's; a key that is no option, or a value that the option does
            not take: the message names the key.
    """
    name, options = arguments.recipe, _read(arguments.recipe)
    if options["task"] != arguments.kind:
        raise CommandError(f"{name}: this recipe is for `unilora finetune {options['task']}`.")
    actions = {
        action.option_strings[0].removeprefix("--"): action
        for action in arguments.parser._actions  # argparse has no public list of them
        if action.dest not in NOT_SETTINGS
    }
    settings = {key: value for key, value in options.items() if key not in HEADER}
    if unknown := [key for key in settings if key not in actions]:
        known = ", ".join([*HEADER, *actions])
        raise CommandError(f"{name}: there is no setting {shown(unknown[0])}; a recipe may have {known}.")
    if {"lora-rate", "theta-rate"} <= settings.keys():
        raise CommandError(f"{name}: theta-rate takes the place of lora-rate; leave one of them out.")
    values = {key: _value(actions[key], value, f"{name}: {key}") for key, value in settings.items()}
    rates_given = arguments.lora_rate is not None or arguments.theta_rate is not None
    for key, value in values.items():
        if not (rates_given and key in ("lora-rate", "theta-rate")):
            actions[key].default = value


def _read(name: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = _text(name)
    try:
        recipe = tomllib.loads(text)
        repr(recipe)  # or no message could show what is wrong
    except (ValueError, RecursionError) as error:  # beside TOMLDecodeError: numbers of too many digits, deep nesting
        raise CommandError(f"{name}: not TOML ({one_line(error, 200)}).") from error
    if (task := recipe.get("task")) not in tuple(DEFAULTS):
        raise CommandError(f'{name}: expected task = "vit", "text" or "lm", got {shown(task)}.')
    if not isinstance(about := recipe.get("about", ""), str):
        raise CommandError(f"{name}: about: expected a text, got {shown(about)}.")
    return {"about": ""} | recipe


def _text(name: str) -> str:
    path = _path(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not TOML ({error}).") from error


def _path(name: str) -> Path:
    """A shipped recipe by its name, or a file."""
    if name in shipped():
        return FOLDER / f"{name}.toml"
    path = path_of(name)
    if path.suffix != ".toml" or not path.is_file():
        what = "there is no such file" if path.suffix == ".toml" else "there is no recipe of this name"
        raise CommandError(f"{name}: {what}; `unilora recipes` lists those that there are.")
    return path


def _value(action: Any, value: Any, where: str) -> Any:
    """A TOML value as the option takes it: numbers for numbers, lists for comma lists, true and false for flags."""
    flag, parts = isinstance(action, argparse.BooleanOptionalAction), value if isinstance(value, list) else [value]
    if not all(isinstance(part, (str, int, float)) for part in parts):
        raise CommandError(f"{where}: expected a text, a number, true or false, or a list of such, got {shown(value)}.")
    text = ",".join(map(str, parts))
    if "\0" in text:
        raise CommandError(
            f"{where}: expected what a command line could say, got {shown(value)}, with a null character."
        )
    try:
        made = value if flag else (action.type or str)(text)
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"{where}: {error}.") from error
    if flag:
        fits, wanted = isinstance(value, bool), "true or false"
    elif action.choices:
        fits, wanted = value in action.choices, " or ".join(map(repr, action.choices))
    elif isinstance(made, (int, float)):
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits, wanted = isinstance(value, (str, list) if isinstance(made, tuple) else str), "a text"
    if not fits:
        raise CommandError(f"{where}: expected {wanted}, got {shown(value)}.")
    return made
