"""Frames: each chain against its formula, written out entry by entry; what is frozen; where training starts."""

import contextlib
import functools
import math

import numpy as np
import pytest

from unilora_core import Layout, ProjectionSpec, SpecError, project
from unilora_core._namespace import standard
from unilora_core.frames import FRAMES, Sizes, frame_layout, piece_names
from unilora_core.methods import METHODS, plan_spec
from unilora_core.testing import definitions
from unilora_core.testing.reference import GROUPS, normal

OPTIONS = {"rank": 3, "initial": 0.1, "frequencies": 11, "scaling": 150.0}
SIZES = [Sizes(7, 5), Sizes(5, 7), Sizes(1, 4), Sizes(6, 6)]
TARGETS = [("q", Sizes(8, 6)), ("v", Sizes(8, 6)), ("o", Sizes(6, 8)), ("up", Sizes(4, 8, 3))]


def options_of(frame, sizes, **given):
    values = OPTIONS | given
    if frame == "core":
        values["rank"] = min(values["rank"], sizes.in_features, sizes.out_features)
    values["frequencies"] = min(values["frequencies"], sizes.in_features * sizes.out_features)
    return values


def shaped(shape, seed):
    return normal(math.prod(shape), seed, np.float64).reshape(shape)


def weight_of(sizes):
    return shaped((*sizes.stack, sizes.out_features, sizes.in_features), 9)


def arrays_of(frame, sizes, values):
    """Random pieces, and what is frozen beside them."""
    form = FRAMES[frame]
    pieces = {name: shaped(shape, seed) for seed, (name, shape) in enumerate(form.pieces(sizes, values).items())}
    weight = weight_of(sizes)
    frozen = form.of_weight(weight, values["rank"]) if form.of_weight else form.frozen(sizes, 5, values)
    return pieces, frozen, weight


def product(chain):
    """ΔW = F_k ⋯ F_1."""
    first, *rest = chain
    return functools.reduce(lambda made, factor: factor @ made, rest, first)


# ---- formulas --------------------------------------------------------------------------------------------------------


def pair(p, f, o, i, j):
    return sum(p["B"][i, k] * p["A"][k, j] for k in range(o["rank"]))


def rows(p, f, o, i, j):
    return sum(p["Bt"][k, i] * p["A"][k, j] for k in range(o["rank"]))


def scaled(p, f, o, i, j):
    return p["v"][i] * sum(f["B"][i, k] * (p["u"][k] + o["initial"]) * f["A"][k, j] for k in range(o["rank"]))


def tied(p, f, o, i, j):
    return (1 + p["v"][i]) * sum(p["B"][i, k] * (1 + p["u"][k]) * p["A"][k, j] for k in range(o["rank"]))


def core(p, f, o, i, j):
    r = range(o["rank"])
    return sum(f["U"][i, k] * p["R"][k, m] * f["V"][m, j] for k in r for m in r)


def dense(p, f, o, i, j):
    return p["W"][i, j]


def spectrum(p, f, o, i, j):
    """The real part of the inverse transform: a sum of waves."""
    height, width = f["places"].shape
    total = 0.0
    for k, coefficient in enumerate(p["c"]):
        ((u,), (v,)) = np.nonzero(f["places"] == k)
        total += coefficient * math.cos(2 * math.pi * (i * u / height + j * v / width))
    return o["scaling"] * total / (height * width)


FORMULAS = {f.__name__: f for f in (pair, rows, scaled, tied, core, dense, spectrum)}


def test_every_frame_has_a_formula_here():
    assert FORMULAS.keys() == FRAMES.keys()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_chain_multiplies_out_to_its_formula(frame, sizes):
    values = options_of(frame, sizes)
    pieces, frozen, _ = arrays_of(frame, sizes, values)
    chain = FRAMES[frame].chain(pieces, frozen, values)
    entry = functools.partial(FORMULAS[frame], pieces, frozen, values)
    expected = [[entry(i, j) for j in range(sizes.in_features)] for i in range(sizes.out_features)]
    np.testing.assert_allclose(product(chain), expected, rtol=1e-9, atol=1e-9)
    assert len(chain) == 1 if FRAMES[frame].dense else chain[0].shape == (values["rank"], sizes.in_features)
    x = normal(sizes.in_features, 3, np.float64)
    beside = functools.reduce(lambda x, factor: factor @ x, chain, x)
    np.testing.assert_allclose(beside, np.array(expected) @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frame", FRAMES)
def test_each_expert_is_a_chain_of_its_own(frame):
    """Those of tied pieces and what is frozen are common, unless it comes of each expert's weight."""
    sizes = Sizes(7, 5, experts=3)
    values, form = options_of(frame, sizes), FRAMES[frame]
    pieces, frozen, weight = arrays_of(frame, sizes, values)
    made = product(form.chain(pieces, frozen, values))
    assert made.shape == (3, 5, 7)
    for e in range(3):
        mine = {name: piece if name in form.shared else piece[e] for name, piece in pieces.items()}
        kept = form.of_weight(weight[e], values["rank"]) if form.of_weight else frozen
        alone = product(form.chain(mine, kept, values))
        if frame == "core":  # the signs of singular vectors are free
            kept = {name: array[e] for name, array in frozen.items()}
            alone = product(form.chain(mine, kept, values))
        np.testing.assert_allclose(made[e], alone, rtol=1e-9, atol=1e-9)


@contextlib.contextmanager
def extensions(namespace):
    """array-api-strict with its extensions, without which the tests of the core run."""
    if namespace.name != "STRICT":
        yield
        return
    with namespace.load().ArrayAPIStrictFlags(enabled_extensions=("fft", "linalg")):
        yield


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("frame", FRAMES)
def test_chains_in_any_namespace(namespace, frame, experts):
    """In float32, with the frozen arrays of the namespace."""
    sizes = Sizes(7, 5, experts)
    values, form = options_of(frame, sizes), FRAMES[frame]
    pieces, frozen, weight = arrays_of(frame, sizes, values)
    expected = product(form.chain(pieces, frozen, values))

    def there(array):
        return namespace.asarray(array.astype(np.float32) if array.dtype.kind == "f" else array)

    pieces, frozen = ({name: there(array) for name, array in arrays.items()} for arrays in (pieces, frozen))
    held = there(weight)
    with extensions(namespace):
        kept = form.of_weight(held, values["rank"]) if form.of_weight else frozen
        chain = form.chain(pieces, kept, values)
    assert all(factor.dtype == standard(namespace.load()).float32 for factor in chain)
    factors = [np.asarray(factor).astype(np.float64) for factor in chain]
    if frame == "core":  # the signs of singular vectors are free, but not those of their products
        V, _, U = factors
        expected, factors = best(weight, 3), [V, U]
    np.testing.assert_allclose(product(factors), expected, rtol=1e-4, atol=2e-5)


def best(weight, rank):
    """The nearest matrix of this rank."""
    U, S, V = np.linalg.svd(weight, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :]


# ---- what is frozen --------------------------------------------------------------------------------------------------


def test_the_frozen_pair_of_a_scaled_frame():
    """Kaiming-uniform, as PEFT's VeRA: bounds √(6/in) and √(6/rank); targets of one width have them in common."""
    values = {"rank": 4, "initial": 0.1}
    made = FRAMES["scaled"].frozen(Sizes(24, 10), 5, values)
    text = "unilora/scaled/1 seed=5 rank=4"
    assert (made["A"].reshape(-1) == definitions.uniform(f"{text} in=24", 96, 0.5)).all()
    assert (made["B"].reshape(-1) == definitions.uniform(f"{text} out=10", 40, 1.5**0.5)).all()
    assert (made["A"].shape, made["B"].shape) == ((4, 24), (10, 4))
    other = FRAMES["scaled"].frozen(Sizes(24, 11, experts=2), 5, values)
    assert (other["A"] == made["A"]).all()
    assert other["B"].shape == (11, 4)
    assert not (FRAMES["scaled"].frozen(Sizes(24, 10), 6, values)["A"] == made["A"]).any()


def test_the_places_of_a_spectrum():
    """Each coefficient has one place, those that a keyed permutation gives; the same in targets of one size."""
    made = FRAMES["spectrum"].frozen(Sizes(7, 5), 5, {"frequencies": 11, "scaling": 1.0})["places"]
    assert made.shape == (5, 7)
    assert made.dtype == np.int32
    flat = made.reshape(-1).tolist()
    assert [flat.index(k) for k in range(11)] == [GROUPS["balanced"](35, 35, 5, k) for k in range(11)]
    assert flat.count(11) == 24
    every = FRAMES["spectrum"].frozen(Sizes(7, 5), 5, {"frequencies": 35, "scaling": 1.0})["places"]
    assert sorted(every.reshape(-1).tolist()) == list(range(35))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("experts", [0, 3])
def test_what_a_core_keeps_of_a_weight(dtype, experts):
    sizes, form = Sizes(7, 5, experts), FRAMES["core"]
    weight = weight_of(sizes).astype(dtype)
    kept = form.of_weight(weight, 3)
    wide = np.float64 if dtype == "float64" else np.float32
    assert {name: array.shape for name, array in kept.items()} == form.kept(sizes, {"rank": 3})
    assert kept["V"].dtype == kept["U"].dtype == wide
    identity = np.broadcast_to(np.eye(3), (*sizes.stack, 3, 3))
    np.testing.assert_allclose(kept["V"] @ np.swapaxes(kept["V"], -1, -2), identity, atol=1e-5)
    lengths = np.linalg.norm(kept["U"], axis=-2)
    np.testing.assert_allclose(lengths, np.linalg.svd(weight.astype(wide), compute_uv=False)[..., :3], rtol=1e-5)


def test_the_frozen_arrays_of_others_are_none():
    for frame in ("pair", "rows", "tied", "dense"):
        assert FRAMES[frame].frozen(Sizes(7, 5), 5, OPTIONS) == {}
        assert FRAMES[frame].of_weight is None


# ---- pieces in a layout ----------------------------------------------------------------------------------------------


def test_the_layout_of_each_frame():
    values = OPTIONS | {"rank": 2, "frequencies": 5}
    shapes = {name: frame_layout(form, TARGETS, values).to_json() for name, form in FRAMES.items()}
    assert shapes["pair"][:2] == [["q.A", [2, 8]], ["q.B", [6, 2]]]
    assert shapes["pair"][-2:] == [["up.A", [3, 2, 4]], ["up.B", [3, 8, 2]]]
    assert shapes["rows"][-2:] == [["up.A", [3, 2, 4]], ["up.Bt", [3, 2, 8]]]
    assert shapes["scaled"][-2:] == [["up.u", [3, 2]], ["up.v", [3, 8]]]
    assert shapes["tied"] == [
        ["shared.8x6.A", [2, 8]],
        ["shared.8x6.B", [6, 2]],
        ["q.u", [2]],
        ["q.v", [6]],
        ["v.u", [2]],
        ["v.v", [6]],
        ["shared.6x8.A", [2, 6]],
        ["shared.6x8.B", [8, 2]],
        ["o.u", [2]],
        ["o.v", [8]],
        ["shared.4x8.A", [2, 4]],
        ["shared.4x8.B", [8, 2]],
        ["up.u", [3, 2]],
        ["up.v", [3, 8]],
    ]
    assert shapes["core"] == [["q.R", [2, 2]], ["v.R", [2, 2]], ["o.R", [2, 2]], ["up.R", [3, 2, 2]]]
    assert shapes["dense"][-1] == ["up.W", [3, 8, 4]]
    assert shapes["spectrum"][-1] == ["up.c", [3, 5]]


def test_the_names_of_pieces():
    names = piece_names(FRAMES["tied"], "a.b", Sizes(8, 6))
    assert names == {"A": "shared.8x6.A", "B": "shared.8x6.B", "u": "a.b.u", "v": "a.b.v"}
    assert piece_names(FRAMES["pair"], "a.b", Sizes(8, 6)) == {"A": "a.b.A", "B": "a.b.B"}


@pytest.mark.parametrize("frame", FRAMES)
def test_pieces_are_those_that_a_frame_names(frame):
    form = FRAMES[frame]
    assert tuple(form.pieces(Sizes(7, 5), OPTIONS)) == form.names
    assert form.zero <= set(form.names)
    assert form.shared <= set(form.names)


@pytest.mark.parametrize(
    ("frame", "sizes", "values", "message"),
    [
        ("pair", Sizes(8, 6), {"rank": 0}, "expected rank ≥ 1, got 0; LoRA ranks are usually 4 to 64"),
        ("core", Sizes(8, 6), {"rank": 7}, "q: expected rank ≤ 6, the singular vectors of a weight .* got 7"),
        ("spectrum", Sizes(8, 6), {"frequencies": 49}, "q: expected frequencies ≤ 48, the entries of a weight, got 49"),
        ("spectrum", Sizes(2**16, 2**16), {}, "q: expected a weight of at most 2.31 entries, got 4294967296; leave"),
        ("scaled", Sizes(0, 6), {}, "q: expected whole numbers of inputs and outputs ≥ 1, got Sizes.in_features=0"),
        ("scaled", Sizes(8, 6.0), {}, "q: expected whole numbers of inputs and outputs ≥ 1, got .*out_features=6.0"),
        ("scaled", Sizes(8, 6, -1), {}, "q: expected whole numbers of inputs and outputs ≥ 1, got .*experts=-1"),
        ("pair", Sizes(2**40, 2**40), {"rank": 2**40}, "'q.A' has more than 2.63 numbers"),
    ],
)
def test_what_a_frame_cannot_build(frame, sizes, values, message):
    with pytest.raises(SpecError, match=message):
        frame_layout(FRAMES[frame], [("q", sizes)], OPTIONS | values)


# ---- where training starts -------------------------------------------------------------------------------------------

SMALL = {"vb-lora": {"length": 2, "topk": 2, "vectors": 3}, "fourierft": {"frequencies": 5}}


def planned(method, **given):
    given = {"options": SMALL.get(method, {}), "rank": 2 if METHODS[method].rank else None} | given
    return plan_spec(TARGETS, method=method, **given)


def deltas(spec, theta_D):
    """Target → ΔW."""
    factors = spec.layout.split(theta_D)
    made = {}
    for name, sizes in TARGETS:
        frozen = spec.form.frozen(sizes, spec.seed, spec.chosen)
        if spec.form.of_weight:
            frozen = spec.form.of_weight(weight_of(sizes), spec.chosen["rank"])
        pieces = {piece: factors[factor] for piece, factor in piece_names(spec.form, name, sizes).items()}
        made[name] = product(spec.form.chain(pieces, frozen, spec.chosen))
    return made


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vb-lora"])
def test_the_adapted_model_starts_as_the_base_and_can_leave_it(method):
    """ΔW is zero at θ_d⁰, and not a small step from it, in every target: the gradient is not zero."""
    spec = planned(method)
    theta = spec.init()
    assert not any(delta.any() for delta in deltas(spec, project(spec, theta)).values())
    moved = deltas(spec, project(spec, theta + 1e-3 * normal(spec.d)))
    assert all(delta.any() for delta in moved.values())


def test_vb_lora_starts_beside_the_base():
    spec = planned("vb-lora")
    assert all(0 < abs(delta).max() < 0.02 for delta in deltas(spec, project(spec, spec.init())).values())


@pytest.mark.parametrize("frame", FRAMES)
def test_the_pieces_that_start_at_zero(frame):
    """`shifted` is the rule: of factors by their last name, and of nothing with the paper's start."""
    values = options_of(frame, Sizes(4, 6), rank=2, frequencies=5)
    layout = frame_layout(FRAMES[frame], TARGETS, values)
    held = {name: values[name] for name in FRAMES[frame].options}
    if FRAMES[frame].ranked and frame != "pair":
        held["rank"] = 2
    for start in ("paper", "identity"):
        spec = ProjectionSpec(layout, 5, start=start, frame=frame, options=tuple(held.items()))
        zero = {name for name in layout.shapes if spec.shifted(name)}
        named = {name for name in layout.shapes if name.rpartition(".")[2] in FRAMES[frame].zero}
        assert zero == (named if start == "identity" else set())
        theta_D = project(spec, spec.init())
        for name, at in layout.slices.items():
            assert theta_D[at].any() == (name not in zero)


def test_a_factor_without_a_dot_is_no_piece():
    with pytest.raises(
        SpecError, match="start='identity' knows by their names which factors begin at zero; 'B' ends in none"
    ):
        ProjectionSpec(Layout([("m.A", (3,)), ("B", (3,))]), 2, start="identity")
