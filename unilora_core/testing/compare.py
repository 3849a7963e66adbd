"""Comparisons that say what differs: where, what was expected, what was found."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
from hypothesis import Phase, settings

from unilora_core.spec import ProjectionSpec

__all__ = ["close", "drawn", "expect", "raises", "same", "sha256", "text_of"]

drawn = settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
"""The settings that draw the same examples each time and write nothing to the disk; the text of the first failure says
all."""


def text_of(spec: ProjectionSpec) -> str:
    """Return a spec as text for a message."""
    return f"{spec.grouping}, start = {spec.start}, D = {spec.D}, d = {spec.d}, seed = {spec.seed}"


def expect(what: str, got: object, expected: object) -> None:
    """Check that two values are equal."""
    if got != expected:
        raise AssertionError(f"{what}: expected {expected}, got {got}")


def same(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Check that two arrays have the same shape and numbers; NaN equals NaN."""
    _compare(what, got, expected, lambda a, b: (a == b) | ((a != a) & (b != b)))


def close(what: str, got: np.ndarray, expected: np.ndarray, rtol: float, atol: float = 0.0) -> None:
    """Check that two arrays have the same shape, and that no number is off by more than ``atol + rtol·|expected|``."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    _compare(what, got, expected, lambda a, b: abs(a - b) <= atol + rtol * abs(b))


def _compare(what, got, expected, equal):
    expect(f"{what}: shape", got.shape, expected.shape)
    wrong = np.argwhere(~equal(got, expected))
    if wrong.size:
        at = tuple(wrong[0].tolist())
        place = at[0] if len(at) == 1 else at
        raise AssertionError(
            f"{what}, position {place}: expected {expected[at]!s}, got {got[at]!s} "
            f"({len(wrong)} of {got.size} positions differ)"
        )


@contextlib.contextmanager
def raises(what: str, error: type[Exception], start: str, end: str = "") -> Iterator[None]:
    """Check that this error is raised, and that its text starts and ends as given."""
    try:
        yield
    except error as raised:
        text = str(raised)
        if not (text.startswith(start) and text.endswith(end)):
            raise AssertionError(f"{what}: expected a text {start!r} … {end!r}, got {text!r}") from raised
    except Exception as raised:
        raise AssertionError(f"{what}: expected {error.__name__}, got {raised!r}") from raised
    else:
        raise AssertionError(f"{what}: expected {error.__name__}, and nothing was raised")


def sha256(array: np.ndarray) -> str:
    """Return the SHA-256 (hex) of the array's bytes, little-endian."""
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
