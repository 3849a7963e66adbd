"""What is drawn from a text: known answers, the definitions in plain Python, moments, and the same in any namespace.

Threefry itself is held to the published answers in `test_grouping`.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import draws
from unilora_core.testing import definitions
from unilora_core.testing.compare import sha256

TEXT = "unilora/test/1 seed=0"
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)

# ---- known answers, written once: they are part of the file format ---------------------------------------------------


def test_known_words():
    assert draws.keys(TEXT)[:2] == (1445488360, 1429921505)
    assert draws.words(TEXT, 5).tolist() == [1246409396, 344639929, 1268497306, -2091444272, -1795895795]
    assert sha256(draws.words(TEXT, 200_003)) == "76ffd455e74940cb1dbee3179c6aabeb7781277550bb8fcc64ba8d67262fb971"


def test_known_numbers():
    assert draws.uniform(TEXT, (4,), 0.5).tobytes().hex() == "36d556be6dead6be129151bee0c5553c"
    assert draws.signs(TEXT, (12,)).tolist() == [1, -1, 1, 1, -1, -1, -1, 1, -1, 1, 1, -1]
    normal = [1.37728012, 0.759903431, -1.55655563, -0.127894178, 0.993006885]
    np.testing.assert_allclose(draws.normal(TEXT, (5,)), normal, rtol=2e-7)


def test_known_permutations():
    assert draws.permutations(TEXT, 2, 7).tolist() == [[3, 6, 4, 5, 1, 0, 2], [0, 2, 5, 3, 4, 6, 1]]
    whole = "725f3262a5e6a9a7835312822f0b235b8582d7a3de935182f2fd8afa1a1c9951"
    assert sha256(draws.permutations(TEXT, 3, 5000).astype(np.int64)) == whole


# ---- by definition ---------------------------------------------------------------------------------------------------


@given(text=texts, n=st.integers(0, 9))
def test_every_draw_is_that_of_its_definition(text, n):
    words = [(definitions.word(text, i) + 2**31) % 2**32 - 2**31 for i in range(n)]
    assert draws.words(text, n).tolist() == words
    assert (draws.uniform(text, (n,), 0.3) == definitions.uniform(text, n, 0.3)).all()
    assert draws.signs(text, (n,)).tolist() == definitions.signs(text, n)
    np.testing.assert_allclose(draws.normal(text, (n,)), definitions.normals(text, n), rtol=1e-6)
    assert draws.permutations(text, 3, n).tolist() == definitions.permutations(text, 3, n)


@pytest.mark.parametrize("n", [1, 6, 7, 63, 64, 65])
def test_the_size_of_a_block_does_not_show(monkeypatch, n):
    drawn = [draws.words(TEXT, n), draws.normal(TEXT, (n,))]
    monkeypatch.setattr(draws, "BLOCK", 3)
    assert (draws.words(TEXT, n) == drawn[0]).all()
    assert (draws.normal(TEXT, (n,)) == drawn[1]).all()


def test_what_is_drawn_is_a_beginning_of_more():
    """But for permutations, of which each row has words of its own."""
    for draw in (draws.normal, draws.signs, lambda text, shape: draws.uniform(text, shape, 1.0)):
        assert (draw(TEXT, (7,)) == draw(TEXT, (3, 5)).reshape(-1)[:7]).all()
        assert draw(TEXT, (3, 5)).dtype == np.float32
        assert draw(TEXT, ()).shape == ()


def test_a_text_that_is_not_ascii_has_no_keys():
    with pytest.raises(UnicodeEncodeError):
        draws.keys("θ")


# ---- moments ---------------------------------------------------------------------------------------------------------

N = 2**18


def within_five_deviations(found, expected, deviation):
    assert abs(found - expected) < 5 * deviation / math.sqrt(N)


def test_moments_of_uniform_numbers():
    x = draws.uniform(TEXT, (N,), 1.0).astype(np.float64)
    assert -1 < x.min() < x.max() < 1
    within_five_deviations(x.mean(), 0, 3**-0.5)
    within_five_deviations((x**2).mean(), 1 / 3, (1 / 5 - 1 / 9) ** 0.5)


def test_moments_of_normal_numbers():
    x = draws.normal(TEXT, (N,)).astype(np.float64)
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        within_five_deviations((x**power).mean(), moment, deviation)
    within_five_deviations((x[::2] * x[1::2]).mean(), 0, 2**0.5)  # the two of a pair do not depend on each other
    assert 4 < abs(x).max() < 6


def test_signs_are_even():
    within_five_deviations(draws.signs(TEXT, (N,)).mean(), 0, 1)


def test_permutations_are_permutations_and_even():
    rows = draws.permutations(TEXT, N // 8, 8)
    assert (np.sort(rows, axis=1) == np.arange(8)).all()
    for place in range(8):
        counts = np.bincount(rows[:, place], minlength=8)
        assert abs(counts - N / 64).max() < 5 * math.sqrt(N / 64)


# ---- in any namespace ------------------------------------------------------------------------------------------------


def test_threefry_and_normals_are_the_same_in_any_namespace(namespace):
    """Words bit by bit; normal numbers to the rounding of log, sin and cos, whatever the words."""
    x0 = np.concatenate([draws.words("a", 1000), np.array([-1, 0, 255, 256, 2**31 - 1, -(2**31)], np.int32)])
    x1 = np.concatenate([draws.words("b", 1000), np.array([0, -1, 2**31 - 1, -(2**31), 256, 255], np.int32)])
    xp = namespace.load()
    arrays = [namespace.asarray(x) for x in (x0, x1)]
    for ours, theirs in zip(draws.threefry((1, -2), *arrays), draws.threefry((1, -2), x0, x1), strict=True):
        assert (np.asarray(ours) == theirs).all()
    wide = [((x.view(np.uint32) >> 9) + 0.5) / 2**23 for x in (x0, x1)]
    radius = np.sqrt(-2 * np.log(wide[0]))
    expected = radius * np.cos(2 * np.pi * wide[1]), radius * np.sin(2 * np.pi * wide[1])
    for ours, theirs in zip(draws.normals(*arrays, draws.standard(xp)), expected, strict=True):
        assert ours.dtype == xp.float32
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=3e-6)


def test_shift_fills_with_zeros(namespace):
    x = namespace.asarray(np.array([-1, -(2**31), 5], np.int32))
    assert np.asarray(draws.shift(x, 8)).tolist() == [2**24 - 1, 2**23, 0]
