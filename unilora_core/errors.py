"""The errors of unilora. Each message says where, what was expected, what came, and what to do."""

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
"""Characters of a message, of which the last 1,000 say what to do."""


def printable(text: str) -> str:
    """The text with every character that does not print as Python escapes it (``\\x1b``), lines kept.

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
    """A layout or a projection that cannot exist: d < 1, d > D, a repeated name, an unknown grouping."""


class ValuesError(UniLoraError, ValueError):
    """An array that does not fit: wrong shape, wrong dtype, NaN or infinity in θ_d."""


class AdapterFileError(UniLoraError):
    """An adapter file that cannot be used."""


class CorruptFileError(AdapterFileError):
    """The file is truncated, damaged, or no unilora file at all."""


class UnknownVersionError(AdapterFileError):
    """The file was written by a format or an algorithm that this version does not know."""


class MismatchError(UniLoraError):
    """The file is whole, but belongs to another model: a missing module, another width, another head."""


class TargetError(UniLoraError, ValueError):
    """A module that cannot be adapted, or a choice of targets that reaches none."""
