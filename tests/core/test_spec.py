"""ProjectionSpec: validated, frozen, and the same after any journey."""

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import Layout, ProjectionSpec, SpecError, UnknownVersionError
from unilora_core.maps import MAPS
from unilora_core.spec import option

LAYOUT = Layout([("q.A", (2, 3)), ("q.B", (4, 2))])


@pytest.fixture
def spec():
    return ProjectionSpec(LAYOUT, d=5, seed=2**64 - 1, grouping="iid", start="identity", bound=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d": 0}, r"expected 1 ≤ d ≤ min\(D, 2\^31\), got d = 0 with D = 14"),
        ({"d": -3}, "got d = -3 with D = 14"),
        ({"d": 15}, "got d = 15 with D = 14.*a sixteenth of the numbers of LoRA at rank 4"),
        ({"d": 3.0}, "d must be an integer, got 3.0"),
        ({"d": "3"}, "d must be an integer, got '3'"),
        ({"d": None}, "d must be an integer, got None"),
        ({"d": 3, "seed": -1}, r"expected 0 ≤ seed < 2\^64, got -1"),
        ({"d": 3, "seed": 2**64}, r"expected 0 ≤ seed < 2\^64, got 18446744073709551616"),
        ({"d": 3, "seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"d": 3, "grouping": "sorted"}, "unknown grouping 'sorted'; known: balanced, iid, numpy-shuffle, local, "),
        ({"d": 3, "start": "warm"}, "unknown start 'warm'; known: paper, identity, zero"),
        ({"d": 3, "bound": 0}, "bound must be a positive .*, got 0"),
        ({"d": 3, "bound": -0.1}, "bound must be a positive .*, got -0.1"),
        ({"d": 3, "bound": float("nan")}, "bound must be a positive .*, got nan"),
        ({"d": 3, "bound": float("inf")}, "bound must be a positive .*, got inf"),
        ({"d": 3, "bound": np.float64("inf")}, r"bound must be a positive .*, got .*inf"),
        ({"d": 3, "bound": np.float32(-0.5)}, r"bound must be a positive .*, got .*-0.5"),
        ({"d": 3, "bound": True}, "bound must be a positive .*, got True"),
        ({"d": 3, "bound": np.True_}, "bound must be a positive .*, got .*True"),
        ({"d": 3, "bound": np.array([0.5])}, r"bound must be a positive .*, got array\(\[0.5\]\)"),
        ({"d": 3, "bound": 1j}, "bound must be a positive .*, got 1j"),
        ({"d": 3, "bound": None}, "bound must be a positive .*, got None"),
        ({"d": 3, "bound": "0.02"}, "bound must be a positive .*, got '0.02'"),
        ({"d": 3, "bound": 10**400}, "bound must be a positive .*, got 1000"),
        ({"d": 3, "bound": 1e39}, r"bound must be a positive .*, got 1e\+39"),
        ({"d": 3, "bound": 1e-50}, "bound must be a positive .*, got 1e-50"),
        ({"d": 3, "bound": 1.2e18, "grouping": "fastfood"}, r"at most 2\^60 with the grouping 'fastfood', which adds"),
        ({"d": 3, "bound": 3e38, "grouping": "gaussian"}, r"at most 2\^60 with the grouping 'gaussian'.* got 3e\+38"),
    ],
)
def test_impossible_specs_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        ProjectionSpec(LAYOUT, **fields)


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ([("a", (3,))], {"d": 1}, "layout must be a Layout, got list"),
        (Layout([("a", (2**24, 2**24 + 1))]), {"d": 1}, r"D = 281474993487872 is more than 2\^48"),
        (Layout([("a", (2**32,))]), {"d": 2**31 + 1}, "got d = 2147483649"),
        (Layout([("a", (2**32,))]), {"d": 2**32, "grouping": "identity"}, r"D is at most 2\^31, got 4294967296"),
        (Layout([("a", (2**31 + 1,))]), {"d": 1, "grouping": "numpy-shuffle"}, r"D = 2147483649 is more than 2\^31"),
        (Layout([("m.A", (3,)), ("gain", (3,))]), {"d": 1, "start": "identity"}, "'gain' ends in none of .A, .B"),
    ],
)
def test_impossible_layouts_are_refused(layout, fields, message):
    with pytest.raises(SpecError, match=message):
        ProjectionSpec(layout, **fields)


def test_numpy_integers_are_integers():
    spec = ProjectionSpec(LAYOUT, np.int64(5), seed=np.uint64(2**63), bound=np.float64(0.5))
    assert spec == ProjectionSpec(LAYOUT, 5, seed=2**63, bound=0.5)
    assert type(spec.d) is type(spec.seed) is int
    assert ProjectionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


REALS = [np.float16, np.float32, np.float64, np.longdouble, np.int32, np.uint8, np.int64, int]


@pytest.mark.parametrize("kind", REALS, ids=lambda kind: kind.__name__)
def test_numpy_numbers_are_numbers(kind):
    spec = ProjectionSpec(LAYOUT, 5, bound=kind(2))
    assert spec == ProjectionSpec(LAYOUT, 5, bound=2.0)
    assert type(spec.bound) is float
    assert spec.to_json() == ProjectionSpec(LAYOUT, 5, bound=2.0).to_json()
    assert json.dumps(ProjectionSpec(LAYOUT, 5, bound=np.float32(0.02)).to_json())


@pytest.mark.parametrize("kind", REALS, ids=lambda kind: kind.__name__)
def test_numpy_numbers_are_options(kind):
    layout = Layout({"m.u": (3,), "m.v": (5,)})
    rank = kind(3) if issubclass(kind, (int, np.integer)) else 3
    given = (("initial", kind(2)), ("rank", rank))
    spec = ProjectionSpec(layout, 4, frame="scaled", options=given)
    assert spec.options == (("initial", 2.0), ("rank", 3))
    assert [type(value) for _, value in spec.options] == [float, int]


def test_an_integer_of_any_library_is_an_integer():
    class Integer:
        def __index__(self):
            return 3

    options = (("initial", 0.5), ("rank", Integer()))
    spec = ProjectionSpec(Layout({"m.u": (3,), "m.v": (5,)}), Integer(), frame="scaled", options=options)
    assert (spec.d, spec.options) == (3, (("initial", 0.5), ("rank", 3)))


def test_specs_are_values(spec):
    same = ProjectionSpec(Layout(LAYOUT.factors), 5, 2**64 - 1, "iid", "identity", 0.1)
    assert same == spec
    assert hash(same) == hash(spec)
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == copy.copy(spec) == spec
    assert ProjectionSpec(LAYOUT, 5, seed=1) != ProjectionSpec(LAYOUT, 5, seed=2)


def test_specs_are_frozen(spec):
    with pytest.raises(AttributeError, match="cannot assign to field 'seed'"):
        spec.seed = 0


@given(
    d=st.integers(1, 14),
    seed=st.integers(0, 2**64 - 1),
    grouping=st.sampled_from(["balanced", "iid", "numpy-shuffle"]),
    start=st.sampled_from(["paper", "identity"]),
    bound=st.floats(1e-30, 1e30),
)
def test_json_round_trip(d, seed, grouping, start, bound):
    spec = ProjectionSpec(LAYOUT, d, seed, grouping, start, bound)
    assert ProjectionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_json_of_a_spec_is_frozen(spec):
    assert spec.to_json() == {
        "layout": [["q.A", [2, 3]], ["q.B", [4, 2]]],
        "d": 5,
        "seed": 2**64 - 1,
        "grouping": "iid",
        "grouping_version": 1,
        "start": "identity",
        "bound": 0.1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grouping": "sorted"}, "grouping 'sorted' version 1 is not known here .*a newer unilora may read it"),
        ({"grouping": ["iid"]}, r"grouping \['iid'\] version 1"),
        ({"grouping_version": 2}, "grouping 'iid' version 2 is not known here"),
        ({"grouping_version": "1"}, "version '1' is not known here"),
        ({"start": "warm"}, "start 'warm' is not known here"),
        ({"start": []}, r"start \[\] is not known here"),
    ],
)
def test_algorithms_of_the_future_are_named(spec, change, message):
    with pytest.raises(UnknownVersionError, match=message):
        ProjectionSpec.from_json(spec.to_json() | change)


@pytest.mark.parametrize("field", ["layout", "d", "seed", "grouping", "grouping_version", "start", "bound"])
def test_a_missing_field_is_named(spec, field):
    data = spec.to_json()
    del data[field]
    with pytest.raises(SpecError, match=rf"expected the fields .*'{field}'.*, got"):
        ProjectionSpec.from_json(data)


@pytest.mark.parametrize("data", [None, [], "spec", 3, {}, {"d": 3}])
def test_json_of_another_structure_is_refused(data):
    with pytest.raises(SpecError, match=r"expected the fields \["):
        ProjectionSpec.from_json(data)


def test_an_unknown_field_is_refused(spec):
    with pytest.raises(SpecError, match=r"got .*'colour'"):
        ProjectionSpec.from_json({**spec.to_json(), "colour": 1})


def test_scale_is_one_over_the_root_of_the_counts(xp, spec_of):
    spec = spec_of(1000, 7)
    scale = spec.scale(xp=xp)
    assert scale.dtype == xp.float32
    assert (np.asarray(scale) == (1 / np.sqrt(spec.counts())).astype(np.float32)).all()


def test_scale_of_an_empty_group_is_one(spec_of):
    spec = spec_of(50, 50, grouping="iid")
    assert (spec.counts() == 0).any()
    assert (spec.scale()[spec.counts() == 0] == 1).all()


def test_scale_in_float64_is_not_rounded(spec_of):
    spec = spec_of(1000, 7)
    assert (spec.scale(dtype=np.float64) == 1 / np.sqrt(spec.counts())).all()


def test_init_may_be_written_into(xp, spec_of):
    spec = spec_of(100, 10)
    first = spec.init()
    first[:] = 0
    assert np.asarray(spec.init(xp=xp)).all()


def test_a_grouping_that_is_no_string_is_refused():
    with pytest.raises(SpecError, match="unknown grouping"):
        ProjectionSpec(Layout([("a", (4,))]), d=2, grouping=["balanced"])


def test_all_groups_are_those_of_every_position():
    spec = ProjectionSpec(Layout([("q.A", (2, 8)), ("q.B", (8, 2))]), 5)
    assert np.array_equal(spec.groups(), spec.groups(0, 32))
    assert len(spec.groups()) == 32


@pytest.mark.parametrize(("value", "taken"), [(1, True), (2**63 - 1, True), (2**63, False), (0, False)])
def test_an_option_is_a_positive_number_of_63_bits(value, taken):
    if taken:
        assert option("rank", value, 4) == value
    else:
        with pytest.raises(SpecError, match="rank must be a positive integer"):
            option("rank", value, 4)


@pytest.mark.parametrize("grouping", [name for name, each in MAPS.items() if each.groups is not None])
def test_writing_into_what_was_given_changes_nothing_that_is_kept(grouping):
    spec = ProjectionSpec(Layout({"m.A": (2, 50), "m.B": (30, 2)}), 7, grouping=grouping)
    gives = (spec.groups, spec.counts, spec.scale, spec.init, lambda: spec.members()[0], lambda: spec.members()[1])
    for give in gives:
        before = give().copy()
        give()[:] = 1
        assert (give() == before).all()
