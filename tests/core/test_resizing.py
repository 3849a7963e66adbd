"""Another d for the same function: against the definition, P′ᵀ P, written out; and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from unilora_core import (
    Layout,
    ProjectionSpec,
    SpecError,
    UnknownVersionError,
    ValuesError,
    load_adapter,
    project,
    save_adapter,
)
from unilora_core import grouping as impl
from unilora_core.frames import Sizes
from unilora_core.maps import MAPS
from unilora_core.methods import METHODS, method_of, plan_spec
from unilora_core.rates import theta_rate
from unilora_core.resizing import carried, grow, grown, moved, resized, shrink, shrunk
from unilora_core.testing.reference import GROUPS, dense, init, normal

TARGETS = [("q", Sizes(8, 6)), ("v", Sizes(8, 6)), ("up", Sizes(5, 9))]


def planned(method="uni-lora", **fields):
    return plan_spec(TARGETS, method=method, grouping="balanced", **fields)


@st.composite
def specs(draw, **fields):
    """Of any frame, d and start; θ_d away from where it started."""
    method = draw(st.sampled_from(sorted(METHODS)))
    rank = {} if METHODS[method].rank is None else {"rank": draw(st.integers(1, 4))}
    options = {"options": {"frequencies": 7}} if method == "fourierft" else {}
    D = planned(method, d=1, **rank, **options).D
    start = draw(st.sampled_from(["paper", "identity"]))
    d = draw(st.integers(1, max(1, D // 2)))
    spec = planned(method, d=d, seed=draw(st.integers(0, 2**64 - 1)), start=start, **rank, **options, **fields)
    return spec, spec.init() + 0.1 * normal(spec.d)


def near(found, wanted, scale=1.0):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * scale)


# ---- the function, and P ---------------------------------------------------------------------------------------------


@given(case=specs(), data=st.data())
def test_growing_keeps_theta_D_and_shrinking_takes_it_back(case, data):
    spec, theta_d = case
    assume(spec.D // spec.d > 1)
    factor = data.draw(st.integers(2, spec.D // spec.d))
    larger, theta = grow(spec, theta_d, factor)
    assert (larger.d, larger.first, theta.dtype) == (spec.d * factor, spec, np.float32)
    near(project(larger, theta), project(spec, theta_d), scale=abs(theta_d).max())
    back, again = shrink(larger, theta, factor)
    assert back == spec
    near(again, theta_d, scale=abs(theta_d).max())


@given(case=specs(), data=st.data())
def test_shrinking_is_the_least_squares_fit(case, data):
    spec, theta_d = case
    factor = data.draw(st.sampled_from([each for each in range(2, spec.d + 1) if spec.d % each == 0] or [0]))
    assume(factor)
    smaller, theta = shrink(spec, theta_d, factor)
    fit = dense(smaller).T @ dense(spec)
    near(theta, fit @ theta_d, scale=factor**0.5)
    near(smaller.init(), fit @ spec.init(), scale=factor**0.5)


@given(case=specs(), factors=st.lists(st.integers(2, 3), min_size=1, max_size=3))
def test_the_groups_are_those_of_the_reference(case, factors):
    """Whatever the way to a d, its P is the one that d and the first d fix."""
    spec, theta_d = case
    assume(spec.d * np.prod(factors) <= spec.D)
    larger = spec
    for factor in factors:
        larger, theta_d = grow(larger, theta_d, factor)
    assert larger == grown(spec, int(np.prod(factors))) == resized(larger, larger.d)
    positions = range(0, spec.D, max(1, spec.D // 40))
    # d does not enter π: the reference's own group of position i, were all its D numbers groups, is π(i)
    found = larger.groups()
    assert [int(found[i]) % spec.d for i in positions] == [
        GROUPS["balanced"](spec.D, spec.d, spec.seed, i) for i in positions
    ]
    assert (larger.counts() == np.bincount(found, minlength=larger.d)).all()
    assert larger.counts().max() - larger.counts().min() <= 1


def test_the_start_is_that_of_the_first_d():
    spec = planned(d=10, seed=5, bound=0.3)
    values, larger = [init(spec.D, 10, 5, 0.3, j) for j in range(10)], grown(spec, 4)
    n, n_new = spec.counts(), larger.counts()
    expected = [np.float32(float(values[c % 10]) * np.sqrt(n_new[c] / n[c % 10])) for c in range(40)]
    assert larger.init().tolist() == expected
    assert shrunk(larger, 4).init().tolist() == values


@pytest.mark.parametrize("way", [(2,), (3,), (2, 2), (2, 2, -2), (-5,), (2, -4)])
@pytest.mark.parametrize("start", ["identity", "zero"])
def test_what_starts_at_zero_stays_there(way, start):
    """B is exactly 0 until a step is taken, whatever d has become."""
    spec = planned("uni-lora" if start == "identity" else "gpart", d=20, start=start)
    theta_d = spec.init()
    for factor in way:
        spec, theta_d = grow(spec, theta_d, factor) if factor > 0 else shrink(spec, theta_d, -factor)
    assert theta_d.tobytes() == spec.init().tobytes()
    for name, factor in spec.layout.split(project(spec, theta_d)).items():
        assert not spec.shifted(name) or not factor.any()


def test_several_segments_are_split_alike(monkeypatch, spec_of):
    monkeypatch.setattr(impl, "WORD", 300)
    spec = spec_of(1000, 7, seed=3)
    larger, theta_d = grow(spec, theta := spec.init(), 6)
    groups = larger.groups()
    assert (groups % 7 == spec.groups()).all()
    assert (larger.counts() == np.bincount(groups, minlength=42)).all()
    assert larger.counts().min() > 0
    assert larger.counts().max() - larger.counts().min() <= 4, "one for each segment"
    near(project(larger, theta_d), project(spec, theta))


def test_the_counts_of_billions_are_a_closed_form(spec_of):
    spec = grown(spec_of(2**48, 2**20), 2**8)
    assert spec.counts().sum() == 2**48
    assert spec.groups(2**48 - 9).tolist() == [g % 2**28 for g in spec.groups(2**48 - 9).tolist()]


# ---- namespaces ------------------------------------------------------------------------------------------------------


def test_the_same_in_every_namespace(jax, torch):
    import array_api_strict

    spec = planned(d=12, seed=1, bound=0.3)
    theta_d = spec.init() + normal(12)
    _, wanted = grow(spec, theta_d, 5)
    _, less = shrink(spec, theta_d, 3)
    for xp in (torch, jax.numpy, array_api_strict):
        after, found = grow(spec, xp.asarray(theta_d), 5)
        assert np.asarray(found).tobytes() == wanted.tobytes()
        assert after == grown(spec, 5)
        near(np.asarray(shrink(spec, xp.asarray(theta_d), 3)[1]), less)
    compiled = jax.jit(lambda theta: grow(spec, theta, 5)[1])
    near(np.asarray(compiled(jax.numpy.asarray(theta_d))), wanted)
    narrow = grow(spec, torch.from_numpy(theta_d).double(), 5)[1]
    assert narrow.dtype == torch.float64


def test_moments():
    """One per entry: a mean square is copied and averaged, so that a step in θ_D stays the step."""
    spec = planned(d=10)
    larger, first, second = grown(spec, 3), normal(10), normal(10, 1) ** 2
    m, v = carried(spec, larger, first), carried(spec, larger, second, 2)
    assert v.tolist() == np.tile(second, 3).tolist()
    plain = dataclasses.replace(spec, start="paper"), dataclasses.replace(larger, start="paper")
    near(project(plain[1], m / np.sqrt(v)), project(plain[0], first / np.sqrt(second)), 10)
    near(carried(larger, spec, m), first, 10)
    near(carried(larger, spec, v, 2), second, 10)
    assert carried(spec, spec, first) is first


@pytest.mark.parametrize(("method", "power"), [("uni-lora", 0.75), ("vera", 0.75), ("gpart", 0)])
def test_the_rate_follows_the_rule(method, power):
    spec = planned(method, d=8)
    assert theta_rate(grown(spec, 4), 1.0) == pytest.approx(theta_rate(spec, 1.0) * 4**-power)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_says_where_it_began(tmp_path):
    spec, theta_d = grow(planned(d=10), planned(d=10).init(), 4)
    save_adapter(tmp_path / "a", spec, theta_d)
    read, theta = load_adapter(tmp_path / "a")
    assert (read, theta.tobytes()) == (spec, theta_d.tobytes())
    said = spec.to_json()
    assert (said["d"], said["grouping_version"], said["options"]) == (40, 2, {"first_d": 10})
    assert method_of(read) == "uni-lora"


def test_a_file_of_the_first_d_has_the_bytes_that_it_had(tmp_path):
    spec = planned(d=10)
    back, theta_d = shrink(*grow(spec, spec.init(), 4), 4)
    save_adapter(tmp_path / "a", spec, spec.init())
    save_adapter(tmp_path / "b", back, theta_d)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "first_d" not in json.dumps(back.to_json())


def test_an_older_reader_refuses_it_by_name(monkeypatch):
    said = grown(planned(d=10)).to_json()
    monkeypatch.setitem(MAPS, "balanced", dataclasses.replace(MAPS["balanced"], nests=None))
    with pytest.raises(UnknownVersionError, match=r"'balanced' version 2 is not known here .*a newer unilora"):
        ProjectionSpec.from_json(said)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        (
            {"grouping_version": 1},
            SpecError,
            "'balanced' has version 2 with these options, got 1; the option first_d belongs to version 2",
        ),
        (
            {"grouping_version": 3},
            UnknownVersionError,
            "version 3 is not known here .known: balanced version 1 or 2, iid",
        ),
        ({"options": {}}, SpecError, "'balanced' has version 1 with these options, got 2"),
        (
            {"options": {"first_d": 40}},
            SpecError,
            r"a divisor or multiple of d, not d itself, .*; got first_d = 40 with d = 40 and D = 672",
        ),
        ({"options": {"first_d": 7}}, SpecError, "got first_d = 7 with d = 40"),
        (
            {"options": {"first_d": 4000}},
            SpecError,
            "at most min.D, 2.31. and at most 4096 times d; got first_d = 4000",
        ),
        ({"options": {"first_d": 0}}, SpecError, "first_d must be a positive integer, got 0"),
        ({"options": {"first_d": 10.0}}, SpecError, "first_d must be a positive integer, got 10.0"),
        ({"grouping": "iid", "grouping_version": 1}, SpecError, r"has the options \[\], got \['first_d'\]"),
    ],
)
def test_a_spec_that_cannot_be(fields, error, text):
    said = grown(planned(d=10), 4).to_json() | fields
    with pytest.raises(error, match=text):
        ProjectionSpec.from_json(said)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 0, -2, 2.0, True, "2", None])
def test_a_factor_that_is_none(factor):
    for change, name in ((grow, "grow"), (shrink, "shrink")):
        with pytest.raises(SpecError, match=f"{name}: factor must be an integer of at least 2, got "):
            change(planned(d=10), normal(10), factor)


def test_a_d_past_D():
    spec = planned(d=10)
    largest = spec.D // 10
    assert grown(spec, largest).d <= spec.D
    text = (
        rf"^grow: {largest + 1} times d = 10 would be more than min\(D, 2\^31\) = {spec.D}; the largest .* is {largest}"
    )
    with pytest.raises(SpecError, match=text):
        grown(spec, largest + 1)
    with pytest.raises(SpecError, match="d cannot grow any more"):
        grown(planned(d=spec.D))


def test_a_file_of_few_numbers_cannot_ask_for_many(spec_of):
    """θ_d⁰ of the first d would have to be drawn."""
    assert spec_of(2**40, 2**19, options=(("first_d", 2**31),)).first.d == 2**31
    with pytest.raises(SpecError, match=r"and at most 4096 times d; got first_d = 2147483648 with d = 262144"):
        spec_of(2**40, 2**18, options=(("first_d", 2**31),))
    with pytest.raises(SpecError, match="at most 4096 times d"):
        shrunk(spec_of(2**20, 2**13), 2**13)


def test_a_d_that_does_not_divide():
    with pytest.raises(SpecError, match=r"^shrink: d = 12 is no multiple of 5; factors of it are 2, 3, 4, 6, 12\."):
        shrunk(planned(d=12), 5)
    with pytest.raises(SpecError, match=r"^shrink: d = 1 is no multiple of 2; it has no factor below 1000\."):
        shrunk(planned(d=1), 2)
    with pytest.raises(
        SpecError, match=r"expected a d that divides the d with which training began, 10, .* got d = 15"
    ):
        shrunk(grown(planned(d=10), 3), 2)
    with pytest.raises(SpecError, match="expected a d that divides the d with which training began, 10"):
        grown(shrunk(planned(d=10), 2), 3)


@pytest.mark.parametrize("grouping", [name for name, each in MAPS.items() if each.nests is None])
def test_maps_that_do_not_nest(grouping):
    method = "vb-lora" if grouping == "codebook" else "uni-lora"
    options = {"options": {"vectors": 4, "length": 1}} if grouping == "codebook" else {}
    spec = plan_spec(TARGETS, method=method, grouping=grouping, d="auto" if MAPS[grouping].fixed else 20, **options)
    why = "has one d only" if MAPS[grouping].fixed else "has another P for another d"
    for change, what in ((grow, "grow"), (shrink, "shrink")):
        with pytest.raises(
            SpecError, match=f"^{what}: the grouping '{grouping}' {why}.*or with the grouping 'balanced'"
        ):
            change(spec, spec.init())


@pytest.mark.parametrize("theta_d", [normal(9), normal(10).astype(np.float16), np.arange(10), normal(10)[:, None]])
def test_a_vector_that_does_not_fit(theta_d):
    for change in (lambda: grow(planned(d=10), theta_d), lambda: carried(planned(d=10), grown(planned(d=10)), theta_d)):
        with pytest.raises(ValuesError, match=r"resizing: expected shape \(10,\) and float32 or float64, got "):
            change()


def test_moved_to_the_same_d_is_itself():
    spec = ProjectionSpec(Layout([("q.A", (4, 5))]), 10)
    theta_d = normal(10)
    assert moved(spec, spec, theta_d) is theta_d
