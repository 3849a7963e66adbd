"""The maps beyond the conformance suite: at any size, in slices, on average, and what each is there to show."""

import functools
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from unilora_core import Layout, ProjectionSpec, SpecError, project, project_transpose
from unilora_core._namespace import standard
from unilora_core.maps import MAPS, codebook, dense
from unilora_core.maps.gather import GATHERS
from unilora_core.testing import definitions
from unilora_core.testing.definitions import FURTHER, ROWS, by_definition, matrix
from unilora_core.testing.reference import normal, threefry

LINEAR = [name for name in FURTHER if MAPS[name].transpose is not None]
DENSE = ["fastfood", "gaussian"]


@st.composite
def layouts(draw):
    """One to five factors of one to three targets; what they hold together is at most 240."""
    every = [f"t{t}.{piece}" for t in range(3) for piece in "AB"]
    names = draw(st.lists(st.sampled_from(every), unique=True, min_size=1, max_size=5))
    return Layout([(name, (draw(st.integers(1, 4)), draw(st.integers(1, 12)))) for name in names])


@st.composite
def specs(draw, name):
    """Of any layout, with any d that fits it."""
    layout = draw(layouts())
    D = layout.size
    d = D if name == "identity" else draw(st.sampled_from([1, D, min(D, 17), max(1, D // 3)]) | st.integers(1, D))
    try:
        return ProjectionSpec(layout, d, draw(st.integers(0, 2**64 - 1)), name)
    except SpecError as error:
        assume("those like it, expected 1 to" not in str(error))  # a class without columns
        raise


# ---- P at any size: D that blocks do not divide, d = 1, d = D, d that is no power of two -----------------------------


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data())
def test_project_is_P_and_its_transpose_is_P_transposed(name, data):
    spec = data.draw(specs(name))
    P, theta, y = matrix(spec), normal(spec.d, dtype=np.float64), normal(spec.D, 1, np.float64)
    np.testing.assert_allclose(project(spec, theta), P @ theta, rtol=0, atol=2e-6 * abs(theta).sum())
    np.testing.assert_allclose(project_transpose(spec, y), P.T @ y, rtol=0, atol=2e-6 * abs(y).sum())


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data())
def test_the_two_are_adjoint(name, data):
    spec = data.draw(specs(name))
    theta, y = normal(spec.d, dtype=np.float64), normal(spec.D, 1, np.float64)
    np.testing.assert_allclose(project(spec, theta) @ y, theta @ project_transpose(spec, y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data())
def test_slices_are_those_of_the_whole(name, data):
    """Any start and stop, empty ones too, that cut factors and blocks where they like."""
    spec = data.draw(specs(name))
    start = data.draw(st.integers(0, spec.D))
    stop = data.draw(st.integers(start, spec.D))
    theta, y = normal(spec.d, dtype=np.float64), normal(spec.D, 1, np.float64)
    frozen = spec.map.frozen(spec, np, None)
    part = spec.map.project(spec, theta, frozen, start, stop)
    np.testing.assert_allclose(part, project(spec, theta)[start:stop], rtol=1e-9, atol=1e-12)
    elsewhere_zero = np.where((np.arange(spec.D) >= start) & (np.arange(spec.D) < stop), y, 0)
    part = spec.map.transpose(spec, y[start:stop], frozen, start)
    np.testing.assert_allclose(part, project_transpose(spec, elsewhere_zero), rtol=1e-9, atol=1e-12)


@given(data=st.data())
def test_a_codebook_of_any_size(data):
    length = data.draw(st.integers(1, 5))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    layout = Layout([(f"t{i}.A", (rows, length * parts)) for i, (rows, parts) in enumerate(shapes)])
    vectors = data.draw(st.integers(1, 9))
    topk = data.draw(st.integers(1, vectors))
    d = vectors * length + layout.size // length * vectors
    options = (("topk", topk), ("length", length), ("vectors", vectors))
    spec = ProjectionSpec(layout, d, grouping="codebook", options=options)
    theta = normal(d, dtype=np.float64)
    whole = project(spec, theta)
    np.testing.assert_allclose(whole, definitions.codebook(spec, theta), rtol=1e-9, atol=1e-12)
    start = data.draw(st.integers(0, spec.D))
    stop = data.draw(st.integers(start, spec.D))
    assert (spec.map.project(spec, theta, (), start, stop) == whole[start:stop]).all()


# ---- in any namespace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize(("start", "stop"), [(0, 408), (1, 1), (63, 65), (130, 408)])
def test_slices_in_any_namespace(namespace, name, start, stop):
    """float32, where it has no other: the frozen arrays are made in the namespace, on its device."""
    spec, xp = by_definition(name), standard(namespace.load())
    theta, y = normal(spec.d), normal(stop - start, 1)
    frozen = spec.map.frozen(spec, xp, None)
    found = spec.map.project(spec, namespace.asarray(theta), frozen, start, stop)
    expected = definitions.theta_D(spec, theta)[start:stop]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=4e-6)
    if spec.map.transpose is not None:
        found = spec.map.transpose(spec, namespace.asarray(y), frozen, start)
        np.testing.assert_allclose(np.asarray(found), matrix(spec)[start:stop].T @ y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FURTHER)
def test_gradients_of_slices_in_torch(torch, name):
    spec = by_definition(name)
    theta = torch.tensor(normal(spec.d, dtype=np.float64), requires_grad=True)
    y, frozen = torch.tensor(normal(100, 1, np.float64)), spec.map.frozen(spec, torch, None)
    (found,) = torch.autograd.grad(spec.map.project(spec, theta, frozen, 100, 200), theta, y)
    whole = np.zeros(spec.D)
    whole[100:200] = y.numpy()
    linear = spec.map.transpose is not None
    expected = matrix(spec).T @ whole if linear else definitions.codebook_pullback(spec, theta.detach().numpy(), whole)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FURTHER)
def test_second_derivatives_in_jax(jax, name):
    """Of a linear map there are none; of the codebook they are finite."""
    spec = by_definition(name)

    def size(theta):
        return (project(spec, theta) ** 2).sum() / 2

    direction = jax.numpy.asarray(normal(spec.d, 2))
    _, found = jax.jvp(jax.grad(size), (jax.numpy.asarray(normal(spec.d)),), (direction,))
    if spec.map.transpose is not None:
        P = matrix(spec)
        np.testing.assert_allclose(found, P.T @ (P @ normal(spec.d, 2)), rtol=1e-4, atol=1e-4)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", LINEAR)
def test_wide_floats_are_not_narrowed(name):
    """Linear to the last bits of float64, even if P itself has entries in float32."""
    spec = by_definition(name)
    a, b = normal(spec.d, dtype=np.float64), normal(spec.d, 1, np.float64) * 2**-30
    np.testing.assert_allclose(project(spec, a + b) - project(spec, a), project(spec, b), rtol=0, atol=1e-14)


def test_the_rows_of_a_gaussian_P_beyond_a_block(monkeypatch):
    spec, theta, y = by_definition("gaussian"), normal(50, dtype=np.float64), normal(411, 1, np.float64)
    whole = project(spec, theta), project_transpose(spec, y)
    for entries in (1, 50, 7 * 50 + 3):
        monkeypatch.setattr(dense, "ENTRIES", entries)
        np.testing.assert_allclose(project(spec, theta), whole[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(project_transpose(spec, y), whole[1], rtol=1e-12, atol=1e-12)


def test_the_last_rows_of_the_largest_gaussian_P(namespace):
    """The number of a row is an int32."""
    spec = ProjectionSpec(Layout([("m.A", (2**31,))]), 3, seed=1, grouping="gaussian")
    theta = normal(3)
    found = spec.map.project(spec, namespace.asarray(theta), (), 2**31 - 4, 2**31)
    k0, k1 = (key % 2**32 for key in dense.draws.keys(f"unilora/gaussian/1 seed=1 D={2**31} d=3")[:2])
    rows = [
        [x for j in range(2) for x in definitions._normal(*threefry(k0, k1, i, j))][:3] for i in range(2**31 - 4, 2**31)
    ]
    np.testing.assert_allclose(np.asarray(found) * 2**15.5, np.array(rows) @ theta, rtol=1e-4, atol=1e-5)


def test_as_many_vectors_as_a_file_has_logits_are_mixed_in_little_memory():
    """topk = vectors: the chosen vectors, all at once, are ``length`` times as large as the file."""
    layout = Layout([(f"m{i}.A", (4, 256)) for i in range(8)])
    options = (("length", 256), ("topk", 2048), ("vectors", 2048))
    spec = ProjectionSpec(layout, 2048 * 256 + 32 * 2048, grouping="codebook", options=options)
    theta = normal(spec.d, dtype=np.float32)
    tracemalloc.start()
    found = project(spec, theta)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20  # all at once: 64 MiB, and the product again
    np.testing.assert_allclose(found, definitions.theta_D(spec, theta), rtol=1e-4, atol=1e-5)


def test_equal_logits_choose_the_first_vectors(namespace):
    spec = ProjectionSpec(
        Layout([("m.A", (3, 2))]),
        5 * 2 + 3 * 5,
        grouping="codebook",
        options=(("length", 2), ("topk", 2), ("vectors", 5)),
    )
    theta = np.concatenate([np.arange(10), [0, 0, 0, 0, 0], [1, 2, 1, 2, 2], [-9, 3, 3, -9, 3]]).astype(np.float32)
    found = np.asarray(project(spec, namespace.asarray(theta)))
    assert found.tolist() == [1, 2, 4, 5, 3, 4]  # means of the vectors 0 and 1, 1 and 3, 1 and 2


def test_the_derivative_of_a_mixture_is_what_a_difference_says():
    """The reference itself, which the gradients are held to."""
    spec = by_definition("codebook")
    theta, y, step = normal(spec.d, dtype=np.float64), normal(spec.D, 1, np.float64), 1e-6
    found = definitions.codebook_pullback(spec, theta, y)
    for j in range(0, spec.d, 7):
        e = np.eye(spec.d)[j] * step
        difference = definitions.codebook(spec, theta + e) - definitions.codebook(spec, theta - e)
        np.testing.assert_allclose(found[j], difference @ y / (2 * step), rtol=1e-6, atol=1e-8)


# ---- on average ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("D", "d"), [(96, 5), (100, 16), (33, 33), (50, 1)])
def test_lengths_are_kept_on_average(name, D, d):
    theta = normal(d, dtype=np.float64)
    layout = Layout([("m.A", (D,))])
    ratios = [
        (project(ProjectionSpec(layout, d, seed, name), theta) ** 2).sum() / (theta**2).sum() for seed in range(400)
    ]
    deviation = np.std(ratios) / 20
    assert abs(np.mean(ratios) - 1) <= 5 * deviation + 1e-6
    if d > 1:
        assert deviation > 1e-3, "of a single seed they are not"


@pytest.mark.parametrize("name", DENSE)
def test_P_transposed_P_is_the_identity_on_average(name):
    layout = Layout([("m.A", (40,)), ("m.B", (24,))])
    products = [P.T @ P for P in (matrix(ProjectionSpec(layout, 8, seed, name)) for seed in range(100))]
    assert abs(np.mean(products, axis=0) - np.eye(8)).max() < 5 * np.std(products, axis=0).max() / 10


# ---- what each is there to show --------------------------------------------------------------------------------------


def columns_of(spec):
    """Factor → the columns that its rows have."""
    groups = spec.groups()
    return {name: set(groups[at].tolist()) for name, at in spec.layout.slices.items()}


def test_local_columns_are_those_of_one_target_and_uniform():
    spec = by_definition("local")
    columns = columns_of(spec)
    assert not (columns["v.A"] | columns["v.B"]) & (columns["q.A"] | columns["q.B"])
    assert columns["v.A"] & columns["v.B"], "A and B of a target share theirs"
    ratio = spec.D / spec.d
    assert max(abs(spec.counts() - ratio)) < 1.5
    np.testing.assert_allclose(matrix(spec).T @ matrix(spec), np.eye(50), atol=1e-12)


def test_by_factor_columns_are_those_of_one_kind_of_factor_and_not_uniform():
    spec = by_definition("by-factor")
    columns = columns_of(spec)
    assert not (columns["v.A"] | columns["q.A"]) & (columns["v.B"] | columns["q.B"])
    assert columns["v.A"] & columns["q.A"], "all targets share theirs"
    counts = spec.counts()
    assert counts.max() > 2 * counts.min()
    np.testing.assert_allclose(matrix(spec).T @ matrix(spec), np.eye(50), atol=1e-12)


def test_unnormalised_columns_are_those_of_balanced_and_not_isometric():
    spec, balanced = by_definition("unnormalised"), ProjectionSpec(by_definition("local").layout, 50, seed=3)
    assert (spec.groups() == balanced.groups()).all()
    assert (spec.scale() == 1).all()
    assert (project(spec, normal(50)) == normal(50)[spec.groups()]).all()
    np.testing.assert_array_equal(matrix(spec).T @ matrix(spec), np.diag(balanced.counts()))


@pytest.mark.parametrize("name", ["local", "by-factor"])
def test_classes_far_beyond_int32(name):
    """Slices that cross targets near 2^40, against the definition of `balanced` in each class."""
    half = 2**39 + 5
    spec = ProjectionSpec(Layout([("a.A", (half,)), ("b.B", (half,)), ("b.A", (3,))]), 1000, seed=9, grouping=name)
    found = spec.groups(half - 3, half + 3)
    by_class = [["a.A"], ["b.B", "b.A"]] if name == "local" else [["a.A", "b.A"], ["b.B"]]
    sizes = [sum(spec.layout.shapes[factor][0] for factor in names) for names in by_class]
    ends = [0, 500, 1000] if name == "local" else [0, 333, 1000]
    expected = []
    for k, positions in enumerate([range(half - 3, half), range(3)]):
        seed = definitions.hashlib.sha256(f"unilora/class/1 seed=9 class={k}".encode()).digest()
        problem = sizes[k], ends[k + 1] - ends[k], int.from_bytes(seed[:8], "little")
        expected += [ends[k] + definitions.GROUPS["balanced"](*problem, p) for p in positions]
    assert found.tolist() == expected
    assert spec.counts().sum() == spec.D


@pytest.mark.parametrize("name", GATHERS)
@given(data=st.data())
def test_counts_are_those_of_the_groups(name, data):
    spec = data.draw(specs(name))
    groups = spec.groups()
    assert groups.dtype == np.int32
    assert (spec.counts() == np.bincount(groups, minlength=spec.d)).all()


def test_the_start_of_a_codebook():
    spec = by_definition("codebook", d=6 * 8 + 51 * 6)
    theta = spec.init()
    assert theta.dtype == np.float32
    assert 0.01 < abs(theta[:48]).max() < 0.02
    assert 0.08 < theta[48:].std() < 0.12
    text = f"unilora/codebook/1 seed=3 d={spec.d}"
    assert (theta[:48] == definitions.uniform(f"{text} codebook", 48, 0.02)).all()
    np.testing.assert_allclose(theta[48:], np.array(definitions.normals(f"{text} logits", 306)) * 0.1, rtol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------

PAIR = Layout([("q.A", (2, 8)), ("q.B", (8, 2)), ("v.A", (2, 8)), ("v.B", (8, 2))])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d": 5, "grouping": "identity"}, r"with the grouping 'identity' d is D = 64, got d = 5\."),
        ({"d": 65, "grouping": "gaussian"}, r"expected 1 ≤ d ≤ D, got d = 65 with D = 64\."),
        ({"d": 0, "grouping": "fastfood"}, r"expected 1 ≤ d ≤ D, got d = 0 with D = 64\."),
        ({"d": 10**5000, "grouping": "fastfood"}, "expected 1 ≤ d ≤ D, got d = an? int"),
        ({"d": 65, "grouping": "local"}, r"expected 1 ≤ d ≤ min\(D, 2\^31\), got d = 65 with D = 64"),
        ({"d": 1, "grouping": "local"}, "gives 0 of d = 1 columns to 'q.A' and those like it, expected 1 to 32"),
        (
            {"d": 1, "grouping": "by-factor"},
            "gives 0 of .* they have 32 numbers. Take another d, or the grouping",
        ),
        ({"d": 64, "grouping": "by-factor"}, "gives 43 of d = 64 columns to 'q.B' and those like it, expected 1 to 32"),
    ],
)
def test_a_d_that_a_map_cannot_have(fields, message):
    with pytest.raises(SpecError, match=message):
        ProjectionSpec(PAIR, **fields)


@pytest.mark.parametrize(
    ("options", "d", "message"),
    [
        ({"length": 8, "topk": 2, "vectors": 4}, 64, r"length = 8 does not divide the 2 columns of 'v.B'; .* as 2\."),
        ({"length": 3, "topk": 2, "vectors": 4}, 64, r"length = 3 does not divide the 8 columns of 'v.A'; .* as 2\."),
        ({"length": 2, "topk": 5, "vectors": 4}, 136, "expected topk ≤ vectors = 4, got 5"),
        ({"length": 2, "topk": 2, "vectors": 4}, 64, r"with this codebook d is 136, got 64\."),
        ({"length": 1, "topk": 1, "vectors": 2**26}, 65 * 2**26, "d is 4362076160, more than 2.31; take fewer vectors"),
    ],
)
def test_a_codebook_that_does_not_fit(options, d, message):
    with pytest.raises(SpecError, match=message):
        ProjectionSpec(PAIR, d, grouping="codebook", options=tuple(options.items()))


@pytest.mark.parametrize("name", DENSE)
def test_dense_maps_end_at_two_to_the_31(name):
    with pytest.raises(
        SpecError, match=r"a dense P is for D up to 2\^31, got 2147483649; take the grouping 'balanced'"
    ):
        ProjectionSpec(Layout([("m.A", (2**31 + 1,))]), 3, grouping=name)
    assert ProjectionSpec(Layout([("m.A", (2**31,))]), 2**31, grouping=name).d == 2**31


@pytest.mark.parametrize("name", [name for name in MAPS if MAPS[name].groups is None])
def test_a_map_without_groups_says_so(name):
    spec = by_definition(name)
    for asked in (spec.groups, spec.counts, spec.scale, functools.partial(spec.groups, 3, 5)):
        with pytest.raises(
            SpecError, match=f"the grouping '{name}' has no groups: .*; balanced, iid, .*unnormalised have"
        ):
            asked()


def test_a_start_that_is_not_linear():
    for start in ("identity", "zero"):
        with pytest.raises(SpecError, match="'codebook' is not linear, so it has start='paper' only"):
            by_definition("codebook", start=start)


def test_every_map_is_tried():
    assert {*FURTHER, "balanced", "iid", "numpy-shuffle"} == set(MAPS)
    assert ROWS.size == 408
    assert codebook.MOST == dense.MOST == 2**31
