"""Options as fields of frozen dataclasses, from which the parser, the recipe check and that of ``--resume`` follow."""

from argparse import BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

__all__ = ["REQUIRED", "Command", "Option", "option", "options_of"]

T = TypeVar("T")

REQUIRED: Any = MISSING
"""In the place of a default: the option must be said."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of `unilora`; its options are the fields, those of its bases first.

    Attributes:
        word: what the user types.
        purpose, details, examples, usage: texts of its help; usage: None for argparse's own.
        run: the function that runs it, as ``module:function``.
        group: of the fields that a class adds, see `Option`.
    """

    word: ClassVar[str]
    purpose: ClassVar[str]
    details: ClassVar[str]
    examples: ClassVar[str]
    usage: ClassVar[str | None] = None
    run: ClassVar[str]
    group: ClassVar[str] = ""


@dataclass(frozen=True)
class Option:
    """What is known of a field.

    Attributes:
        name, default: the field's.
        argument: keywords for argparse's `add_argument`; ``type`` makes a value of a word.
        group: the title above it in the help, and perhaps a line below that; its class's, unless it has one.
        scope: ``"experiment"``: a recipe may set it, and ``--resume`` wants it alike; ``"computing"``: it says how to
            compute, and may change then; ``"run"``: it may change, and is nothing for a recipe.
        instead_of: the word of the option whose place it takes: only one of both may be said.
    """

    name: str
    default: Any
    argument: Mapping[str, Any]
    group: str = ""
    scope: str = "experiment"
    instead_of: str = ""
    positional: bool = False

    @property
    def word(self) -> str:
        """Its name on the command line, without the dashes in front, and in a recipe."""
        return self.name.replace("_", "-")

    @property
    def repeated(self) -> bool:
        """Whether each time that it is said adds a value."""
        return self.argument.get("action") == "append"


def option(purpose: str, default: T = None, **more: Any) -> T:  # type: ignore[assignment]
    """A field that is an option; ``more``: of `Option`, or of its ``argument``, where its type does not say that.

    A bool is a flag that ``--no-its-name`` takes back, as one may wish to where a recipe sets it; a Literal is a
    choice; to a tuple of any length each ``--its-name WORD`` adds an item; for others see `unilora_cli.options.values`.
    """
    about: dict[str, Any] = {name: more.pop(name) for name in tuple(more) if name in Option.__dataclass_fields__}
    return field(default=default, metadata=about | {"argument": {"help": purpose} | more})


def options_of(command: type[Command]) -> dict[str, Option]:
    """The options of a command, by the names of their fields.

    A class may give a field of a base another default and nothing else: the rest is the base's.
    """
    classes = {each: vars(each).get("__dataclass_fields__", {}) for each in command.__mro__}
    types, found = get_type_hints(command, include_extras=True), {}
    for name, default in ((each.name, each.default) for each in fields(command)):
        having = {each: its[name].metadata for each, its in classes.items() if name in its}
        about = dict(next(filter(None, having.values())))
        argument = _argument(types[name]) | about.pop("argument")
        if "nargs" in argument:
            argument.pop("action", None)
        about = {"group": vars([*having][-1]).get("group", "")} | about
        found[name] = Option(name, default, argument, **about)
    return found


def _argument(kind: Any) -> dict[str, Any]:
    """The keywords for `add_argument` that follow from the type of a field."""
    inner = [each for each in get_args(kind) if each is not type(None)]
    if type(None) in get_args(kind):
        return _argument(inner[0])
    if kind is bool:
        return {"action": BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": tuple(inner)}
    if get_origin(kind) is tuple:
        return {"action": "append", **_argument(inner[0])}
    if get_origin(kind) is Annotated:
        return {"type": kind.__metadata__[0], "metavar": kind.__metadata__[1]}
    return {"type": kind, "metavar": "NAME"}
