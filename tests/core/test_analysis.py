"""`unilora_core.analysis`: every figure against P written out, small, by other means."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unilora_core import Layout, ProjectionSpec, SpecError, analysis
from unilora_core.analysis import Projection, analyze
from unilora_core.counting import operations
from unilora_core.frames import FRAMES, Sizes
from unilora_core.methods import plan_spec

TARGETS = [(f"layers.{i}.{m}", Sizes(8, 12)) for i in range(3) for m in "qv"]
GATHERS = ("balanced", "iid", "numpy-shuffle", "local", "by-factor", "unnormalised")
RANK = 2


def planned(method="uni-lora", **fields):
    return plan_spec(TARGETS, method=method, **{"rank": RANK, **fields})


def gathered(spec):
    """P of a map with groups: one entry in each row."""
    P = np.zeros((spec.D, spec.d))
    P[np.arange(spec.D), spec.groups()] = spec.scale(dtype=np.float64)[spec.groups()]
    return P


def reaches(P, layout, part):
    """For each column the names that its entries belong to; ``part``: 0 for targets, 2 for factors."""
    owners = np.concatenate(
        [np.full(math.prod(shape), name.rpartition(".")[part], dtype=object) for name, shape in layout.factors]
    )
    return [set(owners[P[:, j] != 0]) for j in range(P.shape[1])]


def share(sets):
    return sum(len(names) > 1 for names in sets) / len(sets)


def eigenvalues(P):
    values = np.linalg.eigvalsh(P.T @ P)
    return pytest.approx((values[0], values[-1]), rel=1e-6, abs=1e-9)


def matrix(spec, targets=None, frozen=None):
    P = Projection(spec, targets, frozen or {})
    return np.stack(list(P.columns(range(spec.d))), axis=1)


# ---- P of a pair -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["paper", "identity"])
@pytest.mark.parametrize("grouping", GATHERS)
def test_a_gather(grouping, start):
    spec = planned(grouping=grouping, start=start, d=36)
    P, found = gathered(spec), analyze(spec)
    counts = np.bincount(spec.groups(), minlength=36)
    np.testing.assert_allclose(matrix(spec), P, atol=1e-9)
    assert (found.d, found.D, found.numbers, found.exact, found.linear) == (36, spec.D, spec.D, True, True)
    assert found.across_targets == share(reaches(P, spec.layout, 0))
    assert found.across_factors == share(reaches(P, spec.layout, 2))
    assert found.rows == (counts.min(), counts.max())
    assert found.columns == {"A": (1, 1), "B": (1, 1)}
    assert found.gains == eigenvalues(P)


def test_what_the_paper_claims_of_uni_lora_and_what_its_ablations_lack():
    found = {name: analyze(planned(grouping=name, d=24)) for name in GATHERS}
    ours = found["balanced"]
    assert (ours.across_targets, ours.across_factors, ours.rows) == (1, 1, (10, 10))
    assert ours.gains == pytest.approx((1, 1), abs=1e-6)
    assert found["local"].across_targets == 0
    assert found["by-factor"].across_factors == 0
    assert found["by-factor"].rows == (9, 12)  # 144 numbers of B to 16 columns, 96 of A to 8
    assert found["unnormalised"].gains == pytest.approx((10, 10))


@given(D=st.integers(2, 60), share=st.floats(0.01, 1), seed=st.integers(0, 2**64 - 1))
def test_balanced_is_uniform_within_one_and_isometric(D, share, seed):
    d = max(1, int(D * share))
    spec = ProjectionSpec(Layout([("a.A", (D - 1,)), ("b.A", (1,))]), d, seed)
    found = analyze(spec)
    assert found.rows == (D // d, -(-D // d))
    assert found.gains == pytest.approx((1, 1), abs=1e-6)
    assert found.across_targets == share_of_two(spec)


def share_of_two(spec):
    last = spec.groups()[-1]
    return float(np.count_nonzero(spec.groups() == last) > 1) / spec.d


def hadamard(n):
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H / n**0.5


def test_fastfood_against_the_matrices_multiplied_out():
    spec = planned("fastfood", d=13)
    B, G, order, _ = spec.map.frozen(spec, np, None)
    H, blocks = hadamard(16), []
    for k in range(len(B)):
        Pi = np.eye(16)[order[16 * k : 16 * (k + 1)] - 16 * k]
        blocks.append(H @ np.diag(G[k].astype(float)) @ Pi @ H @ np.diag(B[k].astype(float)))
    P = np.concatenate(blocks)[: spec.D, :13] * (16 / spec.D) ** 0.5
    found = analyze(spec, TARGETS)
    np.testing.assert_allclose(matrix(spec, tuple(TARGETS)), P, atol=1e-9)
    assert (found.across_targets, found.across_factors) == (1, 1)
    assert found.rows == tuple(np.count_nonzero(np.abs(P) > 1e-9, axis=0)[[0, 0]])
    assert found.gains == eigenvalues(P)
    assert found.gains[0] < 0.99  # "isometric" holds on average only


def test_gaussian_against_its_rows():
    spec = planned("gaussian", d=7)
    P = np.stack([spec.map.project(spec, unit, (), 0, spec.D) for unit in np.eye(7)], axis=1)
    found = analyze(spec, TARGETS)
    assert found.columns == {"A": (7, 7), "B": (7, 7)}
    assert found.rows == (spec.D, spec.D)
    assert found.gains == eigenvalues(P)


def test_lora_is_the_identity():
    found = analyze(planned("lora"), TARGETS)
    assert (found.d, found.numbers, found.rows, found.across_targets, found.across_factors) == (240, 240, (1, 1), 0, 0)
    assert found.gains == pytest.approx((1, 1))


# ---- P of other frames -----------------------------------------------------------------------------------------------


def test_vera_reaches_a_row_of_one_factor():
    spec = planned("vera")
    frozen = spec.form.frozen(TARGETS[0][1], spec.seed, spec.chosen)
    blocks = []
    for _ in TARGETS:  # u scales the rows of A, v those of B: columns of A's and B's numbers
        A, B = np.zeros((RANK, 8, RANK)), np.zeros((12, RANK, 12))
        for i in range(RANK):
            A[i, :, i] = frozen["A"][i]
        for i in range(12):
            B[i, :, i] = frozen["B"][i]
        blocks.append(np.block([[A.reshape(-1, RANK), np.zeros((16, 12))], [np.zeros((24, RANK)), B.reshape(-1, 12)]]))
    P = np.zeros((240, 84))
    for k, block in enumerate(blocks):
        P[40 * k : 40 * (k + 1), 14 * k : 14 * (k + 1)] = block
    found = analyze(spec, TARGETS)
    np.testing.assert_allclose(matrix(spec, tuple(TARGETS)), P, atol=1e-9)
    assert (found.d, found.D, found.numbers, found.linear) == (84, 84, 240, True)
    assert (found.across_targets, found.across_factors, found.rows) == (0, 0, (RANK, 8))
    assert found.columns == {"A": (1, 1), "B": (1, 1)}
    assert found.gains == eigenvalues(P)


def test_without_targets_p_ends_at_the_numbers_that_the_frame_takes():
    found = analyze(planned("vera"))
    assert (found.numbers, found.rows) == (84, (1, 1))


def test_tied_lora_is_taken_at_its_start():
    """u = v = 0 and B = 0 there: A's numbers reach all targets of their size, v's reach nothing yet."""
    spec = planned("tied-lora")
    P = matrix(spec, tuple(TARGETS)).reshape(6, 40, spec.d)
    A = spec.layout.split(spec.init().astype(np.float64))["shared.8x12.A"]
    for k in range(6):
        np.testing.assert_allclose(P[k, :40, :40], np.eye(40), atol=1e-9)
        u = spec.layout.slices[f"{TARGETS[k][0]}.u"]
        np.testing.assert_allclose(P[k, :16, u.start].reshape(2, 8), [A[0], 0 * A[0]], atol=1e-9)
    found = analyze(spec, TARGETS)
    assert not found.linear
    assert (found.across_targets, found.across_factors) == (40 / spec.d, 0)
    assert found.rows == (0, 8)
    assert found.gains == eigenvalues(P.reshape(240, spec.d))


def of_weights(targets=TARGETS):
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(size=(sizes.out_features, sizes.in_features)) for name, sizes in targets}
    return {name: FRAMES["core"].of_weight(weight, RANK) for name, weight in weights.items()}


def test_lora_xs_reaches_b_only():
    spec, frozen = planned("lora-xs"), of_weights()
    found = analyze(spec, TARGETS, frozen)
    squares = [(frozen[name]["U"] ** 2).sum(axis=0) for name, _ in TARGETS]  # of a column of U·Σ: σ²
    assert found.gains == pytest.approx((np.min(squares), np.max(squares)), rel=1e-6)
    assert (found.numbers, found.across_targets, found.across_factors, found.rows) == (240, 0, 0, (12, 12))
    assert found.columns == {"A": (0, 0), "B": (RANK, RANK)}
    assert found.file_bytes == 4 * spec.d + 6 * 8 * (2 * 8 + 2 * 12)


def test_lora_xs_without_the_weights_is_refused():
    shapes = r"expected {'V': \(2, 8\), 'U': \(12, 2\)} for 'layers\.0\.q', .* got none: frozen={target: arrays}"
    with pytest.raises(SpecError, match=shapes):
        analyze(planned("lora-xs"), TARGETS)


def test_arrays_of_another_shape_are_refused():
    frozen = of_weights()
    frozen["layers.1.v"]["U"] = frozen["layers.1.v"]["U"][:5]
    with pytest.raises(SpecError, match=r"for 'layers\.1\.v', .* got {'V': \(2, 8\), 'U': \(5, 2\)}"):
        analyze(planned("lora-xs"), TARGETS, frozen)


def test_fourierft_reaches_one_target():
    spec = planned("fourierft", rank=None, options={"frequencies": 5})
    places = spec.form.frozen(TARGETS[0][1], spec.seed, spec.chosen)["places"]
    P = np.zeros((96, 5))
    for j in range(5):
        P[:, j] = np.fft.ifft2(places == j).real.reshape(-1) * 150
    found = analyze(spec, TARGETS)
    np.testing.assert_allclose(matrix(spec, tuple(TARGETS))[:96, :5], P, atol=1e-7)
    assert (found.across_targets, found.across_factors, found.numbers) == (0, None, 6 * 96)
    assert found.gains == eigenvalues(P)
    assert set(found.columns) == {"W"}


def test_vb_lora_is_taken_at_its_start():
    spec = planned("vb-lora", options={"vectors": 3, "length": 4, "topk": 2})
    found = analyze(spec, TARGETS)
    theta, bank = spec.init().astype(np.float64), np.zeros((spec.D // 4, 3))
    logits = theta[12:].reshape(-1, 3)
    for group, row in enumerate(logits):
        best = np.argsort(-row)[:2]
        bank[group, best] = np.exp(row[best]) / np.exp(row[best]).sum()
    P = matrix(spec)
    np.testing.assert_allclose(P[:, :12], np.kron(bank, np.eye(4)), atol=1e-7)
    assert not found.linear
    assert found.columns == {"A": (4, 4), "B": (4, 4)}  # an entry of each of two vectors, and their logits
    assert found.operations[1] is None
    assert found.seconds[1] is None


def test_experts_count_as_one_target():
    targets = [("mlp", Sizes(8, 4, 3)), ("out", Sizes(4, 8))]
    found = analyze(plan_spec(targets, rank=2, d=10), targets)
    assert found.numbers == 3 * 2 * (8 + 4) + 2 * (4 + 8)
    assert found.across_targets == 1


# ---- large ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uni-lora", "fastfood", "gaussian"])
def test_a_part_of_a_large_p_says_what_the_whole_says(monkeypatch, method):
    spec = planned(method, d=10)
    whole = analyze(spec, TARGETS)
    monkeypatch.setattr(analysis, "EXACT", 10 * 240 - 1)
    monkeypatch.setattr(analysis, "COLUMNS", 4)
    part = analyze(spec, TARGETS)
    assert (whole.exact, part.exact, part.columns) == (True, False, {})
    assert (part.across_targets, part.across_factors) == (whole.across_targets, whole.across_factors)
    assert whole.rows[0] <= part.rows[0] <= part.rows[1] <= whole.rows[1]
    assert whole.gains[0] - 1e-9 <= part.gains[0] <= part.gains[1] <= whole.gains[1] + 1e-9


def test_a_part_of_a_large_p_has_a_column_of_every_kind(monkeypatch):
    """Of VeRA's 1,036 columns 4 scale a row of A."""
    targets = [(name, Sizes(32, 512)) for name in "ab"]
    spec = plan_spec(targets, method="vera", rank=2)
    monkeypatch.setattr(analysis, "EXACT", 0)
    monkeypatch.setattr(analysis, "COLUMNS", 3)
    found = analyze(spec, targets)
    assert (found.rows, found.across_targets) == ((2, 32), 0)


def test_a_part_of_a_large_p_that_is_not_linear(monkeypatch):
    monkeypatch.setattr(analysis, "EXACT", 0)
    found = analyze(planned("vb-lora", options={"vectors": 3, "length": 4, "topk": 2}), TARGETS)
    assert (found.exact, found.linear) == (False, False)


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "x", "count"),
    [
        (lambda x: x + 1, np.ones(5), 5),
        (lambda x: 1 - x * x, np.ones(5), 10),
        (lambda x: x[:2] ^ 3, np.ones(5, np.int32), 2),
        (lambda x: np.ones((3, 5)) @ x, np.ones((5, 2)), 60),
        (lambda x: x @ np.ones((5, 3)), np.ones((2, 5)), 60),
        (lambda x: x.__array_namespace__().sum(x), np.ones(5), 5),
        (lambda x: x.__array_namespace__().take(x, np.zeros(7, np.int32)), np.ones(5), 7),
        (lambda x: x.__array_namespace__().reshape(x, (1, 5)), np.ones(5), 0),
        (lambda x: x.__array_namespace__().concat([x, x]), np.ones(5), 10),
        (np.asarray, np.ones(5), 5),
    ],
)
def test_operations_are_counted(function, x, count):
    assert operations(function, x) == count


def test_the_cost_of_each_p():
    D = 240
    cost = {method: analyze(planned(method, d=30)).operations for method in ("uni-lora", "fastfood", "gaussian")}
    assert cost["uni-lora"] == (D + 30, D + 30)
    rows, passes = 8 * 32, 2 * 5
    assert all(2 * rows * passes < n < 3 * rows * passes for n in cost["fastfood"])
    assert all(2 * D * 30 < n < 100 * D * 30 for n in cost["gaussian"])
    assert analyze(planned("lora")).operations == (0, 0)


def test_bytes():
    spec = planned(d=30)
    found = analyze(spec)
    assert found.file_bytes == 4 * 30
    assert found.memory_bytes == 4 * 30 + 4 * spec.D + 8 * 30  # g, and n_j as NumPy counts it
    assert analyze(planned("gaussian", d=30)).memory_bytes == 4 * 30
    assert min(found.seconds) > 0
