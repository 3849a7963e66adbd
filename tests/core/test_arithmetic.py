"""Sums of adapters of one spec: known answers, what is exact, what is refused."""

import json

import numpy as np
import pytest

from unilora_core import (
    AdapterFile,
    Layout,
    MismatchError,
    ProjectionSpec,
    SpecError,
    ValuesError,
    combine,
    combine_files,
    project,
    read_adapter,
    save_adapter,
)
from unilora_core.frames import Sizes
from unilora_core.header import FROZEN, write_targets
from unilora_core.methods import plan_spec

LAYOUT = Layout([("a.A", (2, 8)), ("a.B", (6, 2)), ("b.A", (2, 6)), ("b.B", (5, 2))])
SPEC = ProjectionSpec(LAYOUT, d=11, seed=3, start="identity", bound=0.3)


def moved(seed, spec=SPEC):
    return spec.init() + np.random.default_rng(seed).standard_normal(spec.d).astype(np.float32)


def file_of(seed, spec=SPEC, tensors=None, **metadata):
    return AdapterFile(spec, moved(seed, spec), tensors or {}, metadata)


def head(seed):
    rng = np.random.default_rng(seed)
    return {"head.weight": rng.standard_normal((3, 5)).astype(np.float32), "head.seen": np.array(7)}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (-1, 0.5), (2, -1)])
@pytest.mark.parametrize("start", ["paper", "identity"])
def test_theta_is_the_start_and_the_weighted_changes(namespace, weights, start):
    spec = ProjectionSpec(LAYOUT, d=11, seed=3, start=start)
    a, b = moved(1, spec), moved(2, spec)
    origin = spec.init().astype(np.float64)
    wanted = origin + weights[0] * (a - origin) + weights[1] * (b - origin)
    found = combine(spec, [namespace.asarray(a), namespace.asarray(b)], weights)
    assert str(found.dtype).endswith("float32")
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-6)


def test_means_and_ends_are_exact():
    a, b = moved(1), moved(2)
    assert np.array_equal(combine(SPEC, [a, b], (1, 0)), a)
    assert np.array_equal(combine(SPEC, [a, b], (0, 1)), b)
    assert np.array_equal(combine(SPEC, [a, b]), (a + b) / 2)
    assert np.array_equal(combine(SPEC, [a], (0,)), SPEC.init())


def test_factors_follow_and_their_products_do_not():
    """θ_D is linear in θ_d; under the identity start B of a sum is the sum of the Bs, and nothing of B is the base."""
    a, b = moved(1).astype(np.float64), moved(2).astype(np.float64)
    for weights in ((0.25, 0.75), (0.7, 0.6)):
        made = LAYOUT.split(project(SPEC, combine(SPEC, [a, b], weights)))
        ones = [LAYOUT.split(project(SPEC, theta)) for theta in (a, b)]
        for name in ("a.B", "b.B"):
            wanted = sum(w * one[name] for w, one in zip(weights, ones, strict=True))
            np.testing.assert_allclose(made[name], wanted, rtol=1e-10, atol=1e-12)
        update = made["a.B"] @ made["a.A"]
        summed = sum(w * one["a.B"] @ one["a.A"] for w, one in zip(weights, ones, strict=True))
        assert np.abs(update - summed).max() > 0.05
    negated = LAYOUT.split(project(SPEC, combine(SPEC, [a], (-1,))))
    np.testing.assert_allclose(negated["a.B"], -LAYOUT.split(project(SPEC, a))["a.B"], rtol=1e-10, atol=1e-12)


def test_files_with_heads_are_averaged_and_round_trip(tmp_path):
    said = {"modules_to_save": json.dumps(["head"]), "labels": '["x", "y", "z"]', "base_model": "tiny"}
    files = {name: file_of(i, tensors=head(i), **said) for i, name in enumerate("ab")}
    made = combine_files(files, (0.25, 0.75))
    np.testing.assert_allclose(made.theta_d, 0.25 * files["a"].theta_d + 0.75 * files["b"].theta_d, rtol=1e-6)
    wanted = 0.25 * files["a"].tensors["head.weight"] + 0.75 * files["b"].tensors["head.weight"]
    np.testing.assert_allclose(made.tensors["head.weight"], wanted, rtol=1e-6)
    assert made.tensors["head.seen"] == 7
    assert made.metadata == said
    path = tmp_path / "ab.safetensors"
    save_adapter(path, made.spec, made.theta_d, tensors=made.tensors, metadata=made.metadata)
    assert np.array_equal(read_adapter(path).theta_d, made.theta_d)


OTHER = ProjectionSpec(LAYOUT, d=11, seed=4, start="identity", bound=0.3)
WIDER = ProjectionSpec(Layout([*LAYOUT.factors, ("c.A", (2, 4)), ("c.B", (4, 2))]), d=11, seed=3, start="identity")


def base(values="AAA=", name="org/base"):
    return json.dumps({"class": "Llama", "name": name, "embeddings": [[8, 4]], "values": values})


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (file_of(1, OTHER), "a and b have different specs: seed = 3 and 4; train both from one start"),
        (file_of(1, WIDER), "different specs: the layout, bound = "),
        (
            file_of(1, **write_targets([("a", "x", 0, False), ("b", "y", 0, False)])),
            "adapt other layers, or other rows of them",
        ),
        (file_of(1, tensors=head(0)), "hold other heads: head.seen, head.weight is missing in one"),
        (
            file_of(1, base=base("gD8=", "org/other")),
            r"made for other bases, 'org/base' \(Llama\) and 'org/other' \(Llama\): of the first, 1 of 1 values",
        ),
        (file_of(1, labels='["x"]'), r"heads for other labels, \(\) and \('x',\)"),
    ],
)
def test_what_does_not_add_up_is_named(other, match):
    with pytest.raises(MismatchError, match=match):
        combine_files({"a": file_of(0, base=base("AAA=")), "b": other})


def test_heads_are_averaged_only():
    files = {name: file_of(i, tensors=head(i)) for i, name in enumerate("ab")}
    match = (
        r"a holds a trained head \(head.weight, head.seen\), and weights that add up to 2; a head can only be averaged"
    )
    with pytest.raises(ValuesError, match=match):
        combine_files(files, (1, 1))


def test_heads_in_bfloat16_are_averaged():
    """NumPy knows their kind of dtype as no float."""
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    files = {name: file_of(i, tensors={"head": np.full(3, i, dtype=bfloat16)}) for i, name in enumerate("ab")}
    found = combine_files(files).tensors["head"]
    assert (found.dtype, found.astype(np.float32).tolist()) == (bfloat16, [0.5] * 3)


def test_whole_numbers_are_the_first_file_s():
    """A norm counts its batches: two trainings have seen other numbers of them."""
    files = {name: file_of(i, tensors=head(i) | {"head.seen": np.array(7 + i)}) for i, name in enumerate("ab")}
    made = combine_files(files, (0.25, 0.75))
    assert (made.tensors["head.seen"], made.tensors["head.seen"].dtype) == (7, files["a"].tensors["head.seen"].dtype)


def test_what_a_method_keeps_must_be_the_same():
    frozen = f"{FROZEN}a.U"
    files = {name: file_of(i, tensors={frozen: np.full((2, 3), 0.5, np.float32)}) for i, name in enumerate("ab")}
    assert np.array_equal(combine_files(files, (1, 1)).tensors[frozen], files["a"].tensors[frozen])
    files["b"].tensors[frozen] = np.full((2, 3), 0.25, np.float32)
    with pytest.raises(MismatchError, match=r"^combine: expected the same frozen\.a\.U in every file.* do not fit"):
        combine_files(files, (1, 1))


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, float("nan")), (1, "2")])
def test_weights_are_finite_and_one_for_each(weights):
    with pytest.raises(ValuesError, match="expected 2 finite weights, one for each adapter, got"):
        combine(SPEC, [moved(0), moved(1)], weights)


def test_nothing_and_other_shapes_are_refused():
    with pytest.raises(ValuesError, match="expected at least one adapter, got none"):
        combine_files({})
    with pytest.raises(ValuesError, match=r"theta_d 1: expected shape \(11,\) and a floating-point dtype, got \(4,\)"):
        combine(SPEC, [moved(0), np.ones(4, np.float32)])


def test_a_codebook_does_not_add_up():
    sizes = [("a", Sizes(8, 6)), ("b", Sizes(6, 4))]
    spec = plan_spec(sizes, method="vb-lora", options={"vectors": 4, "length": 2, "topk": 2})
    with pytest.raises(SpecError, match="is not linear, so a sum of θ_d means nothing"):
        combine(spec, [spec.init(), spec.init()])
