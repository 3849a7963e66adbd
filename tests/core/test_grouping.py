"""The groupings beyond the conformance suite: every tiny size, published vectors, and what the method needs of them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unilora_core import SpecError
from unilora_core import grouping as impl
from unilora_core._namespace import standard
from unilora_core.testing import reference
from unilora_core.testing.reference import GROUPS, flat, problems

# ---- against the references ----


@pytest.mark.parametrize("name", GROUPS)
def test_every_tiny_spec_equals_the_reference(spec_of, name):
    """A network whose points outside the domain form a cycle of their own must not be walked for ever (D = 7)."""
    for D, seed in itertools.product(range(1, 17), range(4)):
        for d in {1, D // 2 or 1, D}:
            ours = spec_of(D, d, seed=seed, grouping=name).groups()
            assert ours.tolist() == [GROUPS[name](D, d, seed, i) for i in range(D)], (D, d, seed)


def test_a_cycle_outside_the_domain_ends(spec_of):
    spec = spec_of(7, 7, seed=2**64 - 1)
    assert sorted(spec.groups().tolist()) == list(range(7))
    assert sorted(spec_of(7, 3, seed=2**64 - 1).groups().tolist()) == [0, 0, 0, 1, 1, 2, 2]


@given(problem=problems(largest=2**20), bound=st.floats(1e-3, 10))
def test_init_equals_the_reference(spec_of, problem, bound):
    D, d, seed = problem
    theta_d = spec_of(D, d, seed=seed, bound=bound).init()
    assert theta_d.dtype == np.float32
    for j in {0, d // 2, d - 1}:
        assert theta_d[j] == reference.init(D, d, seed, bound, j)


def test_init_fills_its_interval_evenly(spec_of):
    theta_d = spec_of(2**17, 2**17, bound=0.5).init()
    quarters, _ = np.histogram(theta_d, bins=4, range=(-0.5, 0.5))
    assert quarters.sum() == 2**17
    assert abs(quarters - 2**15).max() < 6 * math.sqrt(2**15)


# ---- the parts, against what is published ----

THREEFRY = [  # Random123, kat_vectors: threefry2x32, 20 rounds: counter, key, result
    ("00000000 00000000", "00000000 00000000", "6b200159 99ba4efe"),
    ("ffffffff ffffffff", "ffffffff ffffffff", "1cb996fc bb002be7"),
    ("243f6a88 85a308d3", "13198a2e 03707344", "c4923a9c 483df7a0"),
]


def words(text):
    return [impl.signed(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), THREEFRY)
def test_threefry_gives_the_published_answers(namespace, counter, key, result):
    x0, x1 = (namespace.asarray(np.array([word], np.int32)) for word in words(counter))
    ours = impl.threefry(tuple(words(key)), x0, x1)
    assert [np.asarray(word).tolist() for word in ours] == [[word] for word in words(result)]


def test_threefry_equals_that_of_jax(jax):
    from jax.extend.random import threefry_2x32

    x = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 1000), dtype=np.int64).astype(np.int32)
    key = (123456789, -987654321)
    ours = np.concatenate(impl.threefry(key, x[0], x[1])).view(np.uint32)
    theirs = threefry_2x32(np.array(key, np.int32).view(np.uint32), x.reshape(-1).view(np.uint32))
    assert (ours == np.asarray(theirs)).all()


@given(word=st.integers(0, 2**32 - 1))
def test_lowbias32_equals_its_definition(word):
    ours = impl._lowbias32(np.array([impl.signed(word)], np.int32))
    assert int(ours[0]) % 2**32 == reference.lowbias32(word)


@given(high=st.integers(0, 2**32 - 1), low=st.integers(0, 2**32 - 1), d=st.integers(1, 2**31))
def test_the_96_bit_product_is_exact(high, low, d):
    as_array = [np.array([impl.signed(word)], np.int32) for word in (high, low)]
    assert int(impl._times_shifted(*as_array, d, np)[0]) == (high * 2**32 + low) * d // 2**64


@given(problem=problems(largest=2**31))
def test_the_rectangle_covers_its_domain_within_a_word(problem):
    size = problem[0]
    a, b = impl._factor(size)
    assert size <= a * b <= 2**31
    assert a * b - size <= max(1, size // 3)


# ---- what the method needs ----


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1))
def test_balanced_is_a_permutation_before_mod(size, seed):
    permute = impl.permutation(impl.Problem(size, 1, seed), 0)
    image = permute(np.arange(size, dtype=np.int32), standard(np))
    assert (np.sort(image) == np.arange(size)).all()


@pytest.mark.parametrize("D", [2**10, 2**10 - 1, 2**10 + 1, 8191, 8192, 10007, 3 * 2**11])
@pytest.mark.parametrize("d", [1, 2, 64, 100, 127, 1000])
def test_balanced_groups_differ_by_at_most_one(spec_of, D, d):
    sizes = np.bincount(spec_of(D, d).groups(), minlength=d)
    assert sizes.sum() == D
    assert sizes.max() - sizes.min() == (1 if D % d else 0)


@pytest.mark.parametrize("name", impl.ALGORITHMS)
@given(problem=problems(largest=2**14))
def test_counts_equal_bincount(spec_of, name, problem):
    D, d, seed = problem
    spec = spec_of(D, d, seed=seed, grouping=name)
    counts = spec.counts()
    assert counts.dtype == np.int64
    assert (counts == np.bincount(spec.groups(), minlength=d)).all()


@pytest.mark.parametrize("name", impl.ALGORITHMS)
@given(problem=problems(largest=2**14), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_slice_is_a_part_of_the_whole(spec_of, name, problem, cuts):
    D, d, seed = problem
    spec = spec_of(D, d, seed=seed, grouping=name)
    start, stop = sorted(int(cut * D) for cut in cuts)
    assert (spec.groups(start, stop) == spec.groups()[start:stop]).all()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("block", [1, 7, 999, 1000, 1001])
def test_the_size_of_a_block_does_not_matter(spec_of, monkeypatch, name, block):
    spec = spec_of(1000, 10, grouping=name)
    whole = spec.groups()
    monkeypatch.setattr(impl, "BLOCK", block)
    assert (spec.groups() == whole).all()
    assert (spec.groups(3, 998) == whole[3:998]).all()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("share", [1, 7, 999, 1000])
def test_what_threads_share_does_not_matter(spec_of, monkeypatch, name, share):
    spec = spec_of(1000, 10, grouping=name)
    whole = spec.groups()
    monkeypatch.setattr(impl, "SHARE", share)
    impl._shuffled.cache_clear()
    impl.permutation.cache_clear()
    assert (spec.groups() == whole).all()
    assert (spec.groups(3, 998) == whole[3:998]).all()


def test_what_fails_in_a_thread_comes_out(spec_of, monkeypatch):
    positions = impl._positions

    def fails(offset, *rest):
        if offset >= 500:
            raise MemoryError(offset)
        return positions(offset, *rest)

    monkeypatch.setattr(impl, "SHARE", 100)
    monkeypatch.setattr(impl, "_positions", fails)
    with pytest.raises(MemoryError, match="500"):
        spec_of(1000, 10).groups()


def test_init_does_not_depend_on_the_size_of_a_block(spec_of, monkeypatch):
    spec = spec_of(1000, 100)
    whole = spec.init()
    monkeypatch.setattr(impl, "BLOCK", 7)
    assert (spec.init() == whole).all()


def test_segments_of_balanced_are_permuted_apart(spec_of, monkeypatch):
    monkeypatch.setattr(impl, "WORD", 300)
    monkeypatch.setattr(impl, "signed", lambda word: (word + 2**31) % 2**32 - 2**31)
    spec = spec_of(1000, 10, seed=123)
    sizes = [np.bincount(spec.groups(start, min(start + 300, 1000)), minlength=10) for start in range(0, 1000, 300)]
    assert [size.tolist() for size in sizes] == [[30] * 10, [30] * 10, [30] * 10, [10] * 10]
    first, second = spec.groups(0, 300), spec.groups(300, 600)
    assert (first != second).any()


@pytest.mark.parametrize("name", impl.ALGORITHMS)
def test_the_seed_changes_the_groups(spec_of, name):
    base = spec_of(1000, 100, seed=0, grouping=name).groups()
    assert (spec_of(1000, 100, seed=1, grouping=name).groups() != base).mean() > 0.9


@pytest.mark.parametrize("name", GROUPS)
def test_the_size_changes_the_groups(spec_of, name):
    base = spec_of(1000, 100, grouping=name).groups()
    assert (spec_of(1001, 100, grouping=name).groups()[:1000] != base).mean() > 0.9
    assert (spec_of(1000, 101, grouping=name).groups() != base).mean() > 0.9


@pytest.mark.parametrize("name", impl.ALGORITHMS)
def test_the_caller_may_write_into_groups(spec_of, name):
    spec = spec_of(100, 10, grouping=name)
    first = spec.groups()
    expected = first.copy()
    first[:] = 0
    assert (spec.groups() == expected).all()


def test_the_end_of_a_huge_vector_costs_as_much_as_its_beginning(spec_of):
    """Not timed: were anything of size D made on the way, this would not fit any memory."""
    for name in GROUPS:
        assert spec_of(2**48, 1000, grouping=name).groups(2**48 - 1000).shape == (1000,)


# ---- members ----


@settings(max_examples=200, deadline=None)
@given(problem=problems(3000), grouping=st.sampled_from([*impl.ALGORITHMS, "unnormalised"]))
def test_members_are_the_inverse_of_groups(problem, grouping):
    """A stable sort, up to the order in a group."""
    D, d, seed = problem
    spec = flat(D, d, seed=seed, grouping=grouping)
    offsets, positions = spec.members()
    groups = spec.groups()
    assert (groups[positions] == np.repeat(np.arange(d), np.diff(offsets))).all()
    assert (np.sort(positions) == np.arange(D)).all()
    assert (np.diff(offsets) == spec.counts()).all()


def test_members_past_2_31_are_int64():
    spec = flat(2**40, 2**31 - 5, seed=3)
    offsets, positions = spec.members(2**31 - 1000, 2**31 - 997)
    assert positions.dtype == offsets.dtype == np.int64
    assert [spec.groups(i, i + 1)[0] for i in positions[offsets[1] : offsets[2]]] == [2**31 - 999] * 512


def test_a_map_without_groups_has_no_members():
    with pytest.raises(SpecError, match="the grouping 'gaussian' has no groups: a row of its P has other entries"):
        flat(10, 3, grouping="gaussian").members()
