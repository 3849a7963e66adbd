"""Recipes: the settings of an experiment in a TOML file, and `unilora recipes`, which lists those that are shipped.

A recipe's keys are the options of `unilora finetune vit`, `text` or `lm` without their dashes in front; ``task`` says
which of them, ``about`` what the recipe is. Options of the command line win over it.
"""

import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, one_line, path_of, say, table
from unilora_cli.options.fields import Command, Option, options_of
from unilora_cli.options.files import Recipes
from unilora_cli.options.finetune import TASKS
from unilora_core.schema import shown

__all__ = ["FOLDER", "filled_in", "run", "shipped"]

FOLDER = Path(__file__).with_name("recipes")
HEADER = ("task", "about")


def run(options: Recipes) -> None:
    """List the shipped recipes, or print one.

    Raises:
        CommandError: no such recipe, or no TOML.
    """
    if options.name:
        _read(options.name)
        say(_path(options.name).read_text("utf-8").rstrip())
        return
    rows = [(name, _read(name)) for name in shipped()]
    say(table([(name, recipe["task"], recipe["about"]) for name, recipe in rows], indent=""))


def shipped() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.toml"))


def filled_in(command: type[Command], said: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, and beneath it the values of the recipe that it names.

    Raises:
        CommandError: no such recipe, or it is another task's; a key that is no option, or a value that the option does
            not take: the message names the key.
    """
    name, recipe = said["recipe"], _read(said["recipe"])
    if recipe["task"] != command.word:
        raise CommandError(f"{name}: this recipe is for `unilora finetune {recipe['task']}`.")
    every = options_of(command).values()
    options = {option.word: option for option in every if option.scope != "run" and not option.repeated}
    settings = {key: value for key, value in recipe.items() if key not in HEADER}
    if unknown := [key for key in settings if key not in options]:
        known = ", ".join([*HEADER, *options])
        raise CommandError(f"{name}: there is no setting {shown(unknown[0])}; a recipe may have {known}.")
    values = {key: _value(options[key], value, f"{name}: {key}") for key, value in settings.items()}
    for key, other in ((key, option.instead_of) for key, option in options.items() if option.instead_of):
        if {key, other} <= values.keys():
            raise CommandError(f"{name}: {key} takes the place of {other}; leave one of them out.")
        if {options[key].name, options[other].name} & said.keys():
            values = {k: value for k, value in values.items() if k not in (key, other)}
    return {options[key].name: value for key, value in values.items()} | dict(said)


def _read(name: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    path = _path(name)
    try:
        recipe = tomllib.loads(path.read_text("utf-8"))
        repr(recipe)  # or no message could show what is wrong
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML; too many digits, deep nesting
        raise CommandError(f"{name}: not TOML ({one_line(error, 200)}).") from error
    if (task := recipe.get("task")) not in tuple(TASKS):
        raise CommandError(f'{name}: expected task = "vit", "text" or "lm", got {shown(task)}.')
    if not isinstance(about := recipe.get("about", ""), str):
        raise CommandError(f"{name}: about: expected a text, got {shown(about)}.")
    return {"about": ""} | recipe


def _path(name: str) -> Path:
    """A shipped recipe by its name, or a file."""
    if name in shipped():
        return FOLDER / f"{name}.toml"
    path = path_of(name)
    if path.suffix != ".toml" or not path.is_file():
        what = "there is no such file" if path.suffix == ".toml" else "there is no recipe of this name"
        raise CommandError(f"{name}: {what}; `unilora recipes` lists those that there are.")
    return path


def _value(option: Option, value: Any, where: str) -> Any:
    """A TOML value as the option takes it: numbers for numbers, lists for comma lists, true and false for flags."""
    choices, flag = option.argument.get("choices"), "action" in option.argument
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, (str, int, float)) for part in parts):
        raise CommandError(f"{where}: expected a text, a number, true or false, or a list of such, got {shown(value)}.")
    text = ",".join(map(str, parts))
    if "\0" in text:
        raise CommandError(
            f"{where}: expected what a command line could say, got {shown(value)}, with a null character."
        )
    try:
        made = value if flag else option.argument.get("type", str)(text)
    except ArgumentTypeError as error:
        raise CommandError(f"{where}: {error}.") from error
    if flag:
        fits, wanted = isinstance(value, bool), "true or false"
    elif choices:
        fits, wanted = value in choices, " or ".join(map(repr, choices))
    elif isinstance(made, (int, float)):
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits, wanted = isinstance(value, (str, list) if isinstance(made, tuple) else str), "a text"
    if not fits:
        raise CommandError(f"{where}: expected {wanted}, got {shown(value)}.")
    return made
