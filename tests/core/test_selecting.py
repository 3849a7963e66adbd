"""Which layers are meant, for PyTorch's dotted names and JAX's paths alike."""

import pytest

from unilora_core import TargetError
from unilora_core.selecting import check_apart, given, matches


@pytest.mark.parametrize(
    ("names", "pattern", "separator", "expected"),
    [
        (["a.q_proj"], ["q_proj"], ".", True),
        (["a.q_proj"], ["a.q_proj"], ".", True),
        (["a.my_q_proj"], ["q_proj"], ".", False),
        (["a.q_proj"], [], ".", False),
        (["a.q_proj"], r".*q_proj", ".", True),
        (["a.q_proj"], "q_proj", ".", False),
        (["a/q/kernel", "a/q"], ["q"], "/", True),
        (["a/q/kernel", "a/q"], ["a.q"], "/", True),
        (["a/q/kernel", "a/q"], "a/q", "/", False),
        (["a/q/kernel", "a/q"], "a/q/kernel", "/", True),
    ],
)
def test_names_and_endings(names, pattern, separator, expected):
    assert matches(names, pattern, separator) is expected


def test_no_regular_expression():
    with pytest.raises(TargetError, match=r"'\(' is not a regular expression .* give a list for plain names"):
        matches(["a"], "(")


def test_targets_or_names_but_not_both():
    assert given([1, 2], int) == (1, 2)
    assert given(["a"], int) == ()
    with pytest.raises(TargetError, match="both in one"):
        given(["a", 1], int)


def test_blocks_lie_apart():
    check_apart("w", [("k", 2, 2), ("q", 0, 2)])
    with pytest.raises(TargetError, match="q and k adapt the same outputs of w"):
        check_apart("w", [("k", 1, 2), ("q", 0, 2)])
