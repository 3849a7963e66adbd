"""Layout: what θ_D holds, cut and joined."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import Layout, SpecError, ValuesError

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
LAYOUTS = st.dictionaries(st.text(min_size=1, max_size=8), SHAPES, min_size=1, max_size=5).map(
    lambda factors: Layout(factors.items())
)


@pytest.fixture
def layout():
    return Layout([("q.A", (2, 3)), ("q.B", (4, 2)), ("bias", (5,))])


def test_size_and_slices_follow_the_order(layout):
    assert layout.size == 19
    assert layout.slices == {"q.A": slice(0, 6), "q.B": slice(6, 14), "bias": slice(14, 19)}
    assert list(layout.shapes) == ["q.A", "q.B", "bias"]


def test_split_cuts_row_by_row(layout, namespace):
    factors = layout.split(namespace.asarray(np.arange(19, dtype=np.float32)))
    assert np.asarray(factors["q.A"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert np.asarray(factors["q.B"]).tolist() == [[6, 7], [8, 9], [10, 11], [12, 13]]
    assert np.asarray(factors["bias"]).tolist() == [14, 15, 16, 17, 18]


def test_join_inverts_split(layout, namespace):
    theta_D = namespace.asarray(np.arange(19, dtype=np.float32))
    assert np.asarray(layout.join(layout.split(theta_D))).tolist() == list(range(19))


@given(layout=LAYOUTS)
def test_join_inverts_split_of_any_layout(layout):
    theta_D = np.arange(layout.size, dtype=np.float32)
    factors = layout.split(theta_D)
    assert {name: array.shape for name, array in factors.items()} == layout.shapes
    assert (layout.join(factors) == theta_D).all()


def test_join_takes_the_factors_in_any_order(layout):
    theta_D = np.arange(19.0)
    factors = layout.split(theta_D)
    assert (layout.join(dict(reversed(factors.items()))) == theta_D).all()


@given(layout=LAYOUTS)
def test_json_round_trip(layout):
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.fingerprint == layout.fingerprint


def test_the_fingerprint_is_frozen(layout):
    assert layout.fingerprint == "2ed9c7c433de96feaf1664b8fe6f0bd05a6cecd092f592a8816b0df207fa2b78"


@pytest.mark.parametrize(
    "other",
    [
        [("q.B", (4, 2)), ("q.A", (2, 3)), ("bias", (5,))],
        [("q.A", (3, 2)), ("q.B", (4, 2)), ("bias", (5,))],
        [("q.A", (2, 3)), ("k.B", (4, 2)), ("bias", (5,))],
        [("q.A", (2, 3)), ("q.B", (4, 2)), ("bias", (5, 1))],
        [("q.A", (2, 3)), ("q.B", (4, 2))],
    ],
)
def test_order_shapes_and_names_change_the_fingerprint(layout, other):
    assert Layout(other).fingerprint != layout.fingerprint
    assert Layout(other) != layout


def test_layouts_are_values(layout):
    same = Layout([("q.A", [2, 3]), ("q.B", np.array([4, 2])), ("bias", (np.int64(5),))])
    assert same == layout
    assert hash(same) == hash(layout)
    assert pickle.loads(pickle.dumps(layout)) == copy.deepcopy(layout) == layout
    assert pickle.loads(pickle.dumps(layout)).fingerprint == layout.fingerprint


def test_layouts_are_frozen(layout):
    with pytest.raises(AttributeError, match="cannot assign to field 'factors'"):
        layout.factors = ()


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([], "expected at least one factor, got none"),
        ([("a", (1,)), ("b", (1,)), ("a", (2,))], "the name 'a' occurs twice"),
        ([("", (1,))], "must be a non-empty string, got ''"),
        ([(3, (1,))], "must be a non-empty string, got 3"),
        ([("a", ())], r"the shape of 'a' must be a sequence of positive integers, got \(\)"),
        ([("a", (2, 0))], r"positive integers, got \(2, 0\)"),
        ([("a", (-1,))], r"positive integers, got \(-1,\)"),
        ([("a", (2.0,))], r"positive integers, got \(2.0,\)"),
        ([("a", "23")], "positive integers, got '23'"),
        ([("a", 6)], "positive integers, got 6"),
    ],
)
def test_impossible_layouts_are_refused(factors, message):
    with pytest.raises(SpecError, match=message):
        Layout(factors)


@pytest.mark.parametrize("data", [None, {}, "ab", [["a"]], [["a", [1], 2]], [("a", [1])], [[1, 2], 3]])
def test_json_of_another_structure_is_refused(data):
    with pytest.raises(SpecError, match=r"expected a list of \[name, shape\] pairs"):
        Layout.from_json(data)


def test_split_refuses_another_size(layout):
    with pytest.raises(ValuesError, match=r"expected theta_D of shape \(19,\), got \(18,\)"):
        layout.split(np.zeros(18))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q.A": None}, r"the factor 'q.A' \(2, 3\) is missing"),
        ({"q.A": np.zeros((3, 2))}, r"expected 'q.A' of shape \(2, 3\), got \(3, 2\)"),
        ({"k.A": np.zeros(1)}, "'k.A' is no factor of this layout"),
    ],
)
def test_join_refuses_what_does_not_fit(layout, change, message):
    factors = {**layout.split(np.zeros(19)), **change}
    with pytest.raises(ValuesError, match=message):
        layout.join({name: array for name, array in factors.items() if array is not None})


@pytest.mark.parametrize("factors", [[5], [("a",)], [("a", (1,), 2)]])
def test_what_is_no_pair_is_refused(factors):
    with pytest.raises(SpecError, match="expected pairs of a name and a shape"):
        Layout(factors)
