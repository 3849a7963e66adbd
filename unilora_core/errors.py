"""The error classes of unilora. Each message says where, what was expected, what was found, and what to do."""

__all__ = [
    "AdapterFileError",
    "CorruptFileError",
    "MismatchError",
    "SpecError",
    "TargetError",
    "UniLoraError",
    "UnknownVersionError",
    "ValuesError",
    "printable",
]


LONGEST = 4000
"""The largest length of a message in characters, of which the last 1,000 say what to do."""


def printable(text: str) -> str:
    """Return the text with each character that does not print escaped as Python does (``\\x1b``); lines are kept.

    Names and strings that come from a file end up in messages and on terminals, which act on control characters.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class UniLoraError(Exception):
    """Base class of every error raised on purpose by unilora. Its text is `printable` and short, whatever names a file
    brings; ``args`` has the whole.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 1000]} … {text[-1000:]}")


class SpecError(UniLoraError, ValueError):
    """A layout or a projection that cannot exist was asked for: d < 1, d > D, a repeated name, an unknown grouping."""


class ValuesError(UniLoraError, ValueError):
    """An array does not fit: it has a wrong shape or dtype, or θ_d holds NaN or infinity."""


class AdapterFileError(UniLoraError):
    """An adapter file cannot be used."""


class CorruptFileError(AdapterFileError):
    """The file is truncated, damaged, or no unilora file at all."""


class UnknownVersionError(AdapterFileError):
    """The file was written by a format or an algorithm that this version does not know."""


class MismatchError(UniLoraError):
    """The file is whole, but belongs to another model: a module is missing, or a width or a head is another."""


class TargetError(UniLoraError, ValueError):
    """A module cannot be adapted, or a choice of targets reaches none."""
