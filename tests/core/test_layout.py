"""Layout: what θ_D holds, cut and joined."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import Layout, ProjectionSpec, SpecError, ValuesError

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


def test_a_repr_is_short_whatever_the_layout(layout):
    head = layout.fingerprint[:12]
    assert repr(layout) == f"Layout('q.A' (2, 3) and 2 more, D = 19, fingerprint {head})"
    alone = Layout({"m.A": (7,)})
    assert repr(alone) == f"Layout('m.A' (7,), D = 7, fingerprint {alone.fingerprint[:12]})"
    long = Layout({"\x1b" * 10**5 + str(i): (1,) * 1000 for i in range(50)})
    assert len(repr(long)) <= 300
    assert repr(long).isprintable()
    spec = ProjectionSpec(Layout({f"layers.{i}.A": (4, 64) for i in range(5000)}), 64)
    assert repr(spec) == (
        f"ProjectionSpec(layout=Layout('layers.0.A' (4, 64) and 4999 more, D = 1280000, fingerprint "
        f"{spec.layout.fingerprint[:12]}), d=64, seed=0, grouping='balanced', start='paper', bound=0.02, frame='pair', "
        "options=())"
    )


def test_layouts_are_frozen(layout):
    with pytest.raises(AttributeError, match="cannot assign to field 'factors'"):
        layout.factors = ()


@pytest.mark.parametrize("mapping", ["shapes", "slices"])
def test_shapes_and_slices_are_read_only(layout, mapping):
    before = dict(getattr(layout, mapping))
    with pytest.raises(AttributeError, match="no attribute 'pop'"):
        getattr(layout, mapping).pop("q.A")
    with pytest.raises(TypeError, match="does not support item assignment"):
        getattr(layout, mapping)["q.A"] = None
    with pytest.raises(TypeError, match="does not support item deletion"):
        del getattr(layout, mapping)["q.A"]
    assert getattr(layout, mapping) == before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))])
def test_copies_of_a_layout_in_use_are_layouts(layout, copied):
    spec = ProjectionSpec(layout, 4)
    assert (spec.layout.slices["bias"], spec.layout.shapes["bias"]) == (slice(14, 19), (5,))  # kept from here on
    assert copied(spec) == spec
    again = copied(layout)
    assert again == layout
    assert (again.fingerprint, again.shapes, again.slices) == (layout.fingerprint, layout.shapes, layout.slices)


def test_a_layout_is_used_as_a_dict_of_its_shapes(layout):
    assert Layout({"q.A": (2, 3), "q.B": [4, 2], "bias": (5,)}) == layout
    assert Layout(layout.shapes) == layout
    assert len(layout) == 3
    assert list(layout) == ["q.A", "q.B", "bias"]
    assert "q.A" in layout
    assert "k.A" not in layout
    assert ("q.A", (2, 3)) not in layout


def test_layouts_are_joined(layout):
    more = Layout([("k.A", (2, 3)), ("k.B", (4, 2))])
    joined = layout + more
    assert joined == Layout([*layout.factors, *more.factors])
    assert joined.size == layout.size + more.size
    assert joined != more + layout
    assert (len(layout), len(more)) == (3, 2)
    with pytest.raises(SpecError, match="the name 'bias' occurs twice; every factor needs a name of its own"):
        layout + Layout({"bias": (1,)})
    with pytest.raises(TypeError, match="unsupported operand"):
        layout + more.factors


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "expected at least one factor, got none"),
        ({"a": (2, 0)}, r"the shape of 'a' must be a sequence of positive integers, got \(2, 0\)"),
        (5, r"expected pairs of a name and a shape, or a mapping of them, got 5"),
        ("ab", "expected pairs of a name and a shape, got 'a'"),
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
