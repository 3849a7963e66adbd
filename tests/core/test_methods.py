"""Methods: the table, plans and what they refuse; files of each method; specs and headers of strangers."""

import base64
import copy
import functools
import json
import pickle
import time
import tracemalloc

import numpy as np
import pytest

from unilora_core import (
    CorruptFileError,
    Layout,
    MismatchError,
    ProjectionSpec,
    SpecError,
    UnknownVersionError,
    project,
    read_adapter,
    save_adapter,
    serialisation,
)
from unilora_core.frames import FRAMES, Sizes, frame_layout, piece_names
from unilora_core.header import FROZEN, TargetRow, read_header, write_targets
from unilora_core.lora import check_rank, largest_rank, lora_layout
from unilora_core.maps import MAPS
from unilora_core.methods import METHODS, method_of, plan_spec
from unilora_core.rates import default_bound, theta_rate
from unilora_core.spec import PAPER_BOUND
from unilora_core.testing.frozen import FOLDER, vectors

TARGETS = [("q", Sizes(64, 64)), ("v", Sizes(64, 32)), ("up", Sizes(16, 48, 3))]
PLAIN = [("q", 64, 64), ("v", 64, 32), ("up", 16, 48, 3)]
SMALL = {"vb-lora": {"length": 16, "vectors": 8}, "fourierft": {"frequencies": 50}}


def planned(method, **given):
    return plan_spec(TARGETS, **{"method": method, "options": SMALL.get(method)} | given)


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_the_plan_of_uni_lora_is_that_of_always():
    spec = planned("uni-lora", seed=7)
    layout = lora_layout(PLAIN, rank=16)
    old = ProjectionSpec(layout, round(layout.size / 64), seed=7, start="identity")
    assert spec == ProjectionSpec(layout, old.d, 7, "balanced", "identity", default_bound(old))
    assert spec == plan_spec(TARGETS, seed=7)


@pytest.mark.parametrize("method", ["uni-lora", "fastfood", "gaussian"])
@pytest.mark.parametrize("rank", [1, 3, 4, 16, 40])
def test_d_is_a_sixteenth_of_loras_numbers_at_rank_4_whatever_the_rank(method, rank):
    spec = planned(method, rank=rank)
    assert (spec.D, spec.d) == (lora_layout(PLAIN, rank=rank).size, round(lora_layout(PLAIN, rank=4).size / 16))


def test_d_is_at_most_D():
    narrow = [("a", Sizes(1000, 2))]
    assert plan_spec(narrow, method="lora-xs", rank=1, grouping="balanced").d == 1
    assert plan_spec([("a", Sizes(2, 1))], rank=1).d == 1


PLANS = {  # frame, map, start, d, D
    "uni-lora": ("pair", "balanced", "identity", 104, 6656),
    "lora": ("pair", "identity", "identity", 1664, 1664),
    "tied-lora": ("tied", "identity", "identity", 1412, 1412),
    "vera": ("scaled", "identity", "zero", 1520, 1520),
    "lora-xs": ("core", "identity", "zero", 1280, 1280),
    "tinylora": ("core", "gaussian", "zero", 20, 20),
    "vb-lora": ("rows", "codebook", "paper", 8 * 16 + 104 * 8, 1664),
    "fourierft": ("spectrum", "identity", "zero", 250, 250),
    "fastfood": ("pair", "fastfood", "identity", 104, 6656),
    "gaussian": ("pair", "gaussian", "identity", 104, 1664),
    "gpart": ("dense", "balanced", "zero", 104, 8448),
    "intrinsic-dimension": ("dense", "fastfood", "zero", 104, 8448),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_of_a_method(method):
    spec = planned(method)
    assert (spec.frame, spec.grouping, spec.start, spec.d, spec.D) == PLANS[method]
    assert spec.chosen.get("rank") == (None if spec.frame == "pair" else METHODS[method].rank)
    assert spec.bound == (default_bound(spec) if spec.start == "identity" else 0.02)
    assert method_of(spec) == method


def test_a_plan_takes_another_map_start_bound_and_d():
    spec = planned("vera", grouping="balanced", d=40, start="paper", bound=0.5, options={"initial": 0.2}, rank=3)
    assert (spec.grouping, spec.d, spec.start, spec.bound) == ("balanced", 40, "paper", 0.5)
    assert spec.options == (("initial", 0.2), ("rank", 3))
    assert method_of(spec) is None
    assert planned("vera", grouping="balanced").d == round(1520 / 16)
    assert planned("tinylora", d=5).d == 5
    assert planned("gpart", grouping="identity").d == 8448
    mixed = planned("lora", grouping="codebook", options={"length": 1, "vectors": 4})
    assert (mixed.start, mixed.d) == ("paper", 4 + 1664 * 4), "the codebook has no other start"


def test_numbers_of_any_library_are_numbers():
    spec = planned("vera", rank=np.int64(3), options={"initial": np.float32(0.5)})
    assert spec.options == (("initial", 0.5), ("rank", 3))
    assert [type(value) for _, value in spec.options] == [float, int]
    assert json.loads(json.dumps(spec.to_json())) == spec.to_json()


RATES = {
    "uni-lora": 64**0.75 / 2,
    "fastfood": 64**0.75 / 2,
    "gaussian": 8.0,
    "lora": 1.0,
    "tied-lora": 1.0,
    "vb-lora": 2.5,
}
RATES |= {
    "vera": 10.0,
    "lora-xs": 10.0,
    "fourierft": 10.0,
    "tinylora": 10.0,
    "gpart": 10.0,
    "intrinsic-dimension": 10.0,
}


@pytest.mark.parametrize("method", RATES)
def test_the_rate_of_a_method(method):
    assert theta_rate(planned(method), 1e-3) == pytest.approx(RATES[method] * 1e-3)


def test_the_rate_at_a_fixed_d_grows_like_the_fourth_root_of_the_rank():
    """η·(D/d)^¾·√(4/r), and D grows like r."""
    at_4 = theta_rate(planned("uni-lora", rank=4), 1.0)
    assert at_4 == pytest.approx(8)
    for rank in (1, 16, 64):
        assert theta_rate(planned("uni-lora", rank=rank), 1.0) == pytest.approx(at_4 * (rank / 4) ** 0.25)
        assert theta_rate(planned("lora", rank=rank), 1.0) == 1, "LoRA's is what it is"


ISSUE = [
    ({"method": "veraa"}, r"unknown method 'veraa'; the nearest are vera; known: uni-lora, .*, intrinsic-dimension\."),
    ({"method": None}, "unknown method None; known: uni-lora, "),
    ({"method": "x" * 10**6}, "unknown method 'xxx.*xxx'; known: uni-lora, "),
    ({"grouping": "fast-food"}, "unknown grouping 'fast-food'; the nearest are fastfood; known: balanced, iid, "),
    ({"start": "warm"}, "unknown start 'warm'; known: paper, identity, zero"),
    ({"method": "vera", "options": {"alpha": 3}}, "the method 'vera' has no option 'alpha'; known: initial"),
    ({"method": "lora", "options": {"initial": 3}}, "the method 'lora' has no option 'initial'; it has none"),
    ({"method": "vera", "options": {"rank": 3}}, "the method 'vera' has no option 'rank'; known: initial"),
    ({"method": "gpart", "rank": 4}, "the method 'gpart' has no rank, got rank = 4; leave it out"),
    ({"method": "fourierft", "rank": 4}, "the method 'fourierft' has no rank, got rank = 4; leave it out"),
    ({"method": "lora", "d": 100}, "the method 'lora' trains d = 1664 numbers here, got d = 100; leave d out, or"),
    ({"method": "vera", "d": 5}, "'vera' trains d = 1520 numbers here, got d = 5; .* grouping that has a d, such as"),
    ({"method": "vb-lora", "d": 77}, "'vb-lora' trains d = 960 numbers here, got d = 77; leave d out"),
    ({"method": "vb-lora", "options": {}}, "length = 256 does not divide the 64 columns of 'v.A'; .* such as 16"),
    ({"method": "vb-lora", "options": {"length": 16, "vectors": 4, "topk": 5}}, "expected topk ≤ vectors = 4, got 5"),
    ({"method": "vb-lora", "start": "identity"}, "'codebook' is not linear, so it has start='paper' only"),
    ({"method": "lora-xs", "rank": 17}, "up: expected rank ≤ 16, the singular vectors .* got 17"),
    ({"method": "fourierft", "options": {}}, "up: expected frequencies ≤ 768, the entries of a weight, got 1000"),
    ({"start": "zero"}, "start='zero' with the frame 'pair' would leave every factor at zero, .*; take start="),
    ({"rank": 10**9}, "a rank of at most 64, .*, got rank = 1000000000: D would be 416,000,000,000, 1,664"),
    ({"method": "vera", "rank": 10**9}, "a rank of at most 1024, .*: D would be 5,000,000,240, 20,000,000,960 by"),
    ({"d": 10**5000}, "got d = an? int"),
]


@pytest.mark.parametrize(("given", "message"), ISSUE, ids=[str(i) for i in range(len(ISSUE))])
def test_a_plan_that_cannot_be_says_what_to_do(given, message):
    with pytest.raises(SpecError, match=message) as caught:
        planned(**{"method": "uni-lora"} | given)
    assert len(str(caught.value)) < 600


STRANGE = [0, -1, 1.5, "4", True, float("nan"), float("inf"), 10**400, [1], {}, 2**63, None]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    ("method", "option"),
    [("vb-lora", "length"), ("vb-lora", "vectors"), ("vb-lora", "topk"), ("fourierft", "frequencies")],
)
def test_a_count_that_is_none(method, option, value):
    with pytest.raises(SpecError, match=f"{option} must be a positive integer, got "):
        planned(method, options=SMALL[method] | {option: value})


@pytest.mark.parametrize("value", [v for v in STRANGE if v != 1.5], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(("method", "option"), [("fourierft", "scaling"), ("vera", "initial")])
def test_a_size_that_is_none(method, option, value):
    with pytest.raises(SpecError, match=f"{option} must be a positive number, got "):
        planned(method, options=SMALL.get(method, {}) | {option: value})


@pytest.mark.parametrize("value", [v for v in STRANGE if v not in (None, {})], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("method", ["uni-lora", "vera", "tied-lora"])
def test_a_rank_that_is_none(method, value):
    message = "expected rank ≥ 1, got .*; LoRA ranks are usually 4 to 64|has more than 2.63 numbers"
    with pytest.raises(SpecError, match=message):
        planned(method, rank=value)


@pytest.mark.parametrize(("method", "usual"), [("uni-lora", 64), ("vb-lora", 64), ("vera", 1024), ("tied-lora", 1024)])
def test_a_rank_that_no_target_gives_reason_for(method, usual):
    """The bound is that of files, for the widest target; D and what it takes are said, and nothing of it is made."""
    options = {"length": 1} if method == "vb-lora" else {}
    narrow, wide = [("a", Sizes(8, 6))], [("a", Sizes(8, 6)), ("b", Sizes(2000, 1500))]
    for targets, most in ((narrow, usual), (wide, 1500)):
        assert plan_spec(targets, method=method, rank=most, options=options).D
        with pytest.raises(SpecError, match=f"at most {most}, .* got rank = {most + 1}: D would be "):
            plan_spec(targets, method=method, rank=most + 1, options=options)
    with pytest.raises(SpecError, match="got rank = 1000000000: D would be 14,000,000,000, 56,000,000,000 bytes of "):
        plan_spec(narrow, rank=10**9)
    with pytest.raises(SpecError, match=r"got rank = 1000000000: D would be .* take a lower rank"):
        plan_spec(wide, rank=np.int64(10**9), grouping="numpy-shuffle")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "expected at least one factor, got none"),
        ([("q", Sizes(0, 4))], "q: expected whole numbers of inputs and outputs ≥ 1"),
        ([("q", Sizes(4, 4, -1))], "q: expected whole numbers of inputs and outputs ≥ 1"),
        ([("q", Sizes(4, 4)), ("q", Sizes(4, 4))], "the name 'q.u' occurs twice"),
    ],
)
def test_targets_that_cannot_be(targets, message):
    with pytest.raises(SpecError, match=message):
        plan_spec(targets, method="vera")


# ---- ranks of each target's own --------------------------------------------------------------------------------------

NAMED = [(f"layers.{i}.{name}", Sizes(64, 32)) for i in range(2) for name in ("q_proj", "k_proj", "gate_proj")]


@pytest.mark.parametrize("method", ["uni-lora", "lora", "fastfood", "gaussian"])
def test_each_target_has_the_rank_that_is_said_for_it(method):
    """By name or ending; the longest fits best."""
    ranks = {"gate_proj": 2, "q_proj": np.int64(8), "layers.1.q_proj": 5, "k_proj": 8}
    spec = plan_spec(NAMED, method=method, rank=ranks, start="paper")
    found = {name.removesuffix(".A"): shape[0] for name, shape in spec.layout.factors if name.endswith(".A")}
    assert list(found.values()) == [8, 8, 2, 5, 8, 2]
    assert list(found) == [name for name, _ in NAMED]
    assert spec.layout.shapes["layers.1.q_proj.B"] == (32, 5)
    assert spec.d == (spec.D if method == "lora" else round(6 * 4 * 96 / 16))
    assert ProjectionSpec.from_json(spec.to_json()) == spec
    assert plan_spec(NAMED, method=method, rank={"q_proj": 3, "k_proj": 3, "gate_proj": 3}) == plan_spec(
        NAMED, method=method, rank=3
    )


def test_the_rate_of_several_ranks_is_that_of_their_mean():
    ranks = {"q_proj": 8, "k_proj": 8, "gate_proj": 2}
    spec, even = (plan_spec(NAMED, rank=rank, d=100) for rank in (ranks, 6))
    assert spec.D == even.D
    assert theta_rate(spec, 1.0) == pytest.approx(theta_rate(even, 1.0), rel=1e-12)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({}, r"rank: expected a rank for each target, there is none for 'layers.0.q_proj' in \{\}; add"),
        ({"q_proj": 8, "k_proj": 4}, "expected a rank for each target, there is none for 'layers.0.gate_proj'"),
        ({"proj": 8}, "there is none for 'layers.0.q_proj' in"),
        (
            {"q_proj": 8, "k_proj": 4, "gate_proj": 2, "v_proj": 1},
            "rank: no target is called 'v_proj'; their names end in .*'q_proj'",
        ),
        ({"q_proj": 8, "k_proj": 4, "gate_proj": 0}, "expected rank ≥ 1, got 0"),
        ({"q_proj": 8, "k_proj": 4.0, "gate_proj": 2}, "expected rank ≥ 1, got 4.0"),
        (
            {"q_proj": 8, "k_proj": 4, "gate_proj": 65},
            "at most 64, as of 'layers.0.gate_proj' .*64 inputs.* got rank = 65",
        ),
        ({"q_proj": 8, "k_proj": 4, "gate_proj": 2, 3: 1}, "rank: no target is called 3"),
    ],
)
def test_ranks_that_do_not_fit_the_targets(rank, message):
    with pytest.raises(SpecError, match=message):
        plan_spec(NAMED, rank=rank)


@pytest.mark.parametrize("method", ["vera", "tied-lora", "lora-xs", "tinylora", "vb-lora"])
def test_methods_of_one_rank(method):
    with pytest.raises(SpecError, match=f"the method '{method}' has one rank for all targets, got .*; say a number"):
        plan_spec(NAMED, method=method, rank={"q_proj": 2, "k_proj": 2, "gate_proj": 2})


# ---- specs as JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_specs_are_values_and_come_back(method):
    spec = planned(method, seed=2**64 - 1)
    assert ProjectionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec
    assert hash(copy.deepcopy(spec)) == hash(spec)


@pytest.mark.parametrize("case", vectors(), ids=lambda case: f"{case['spec']['grouping']}-{case['spec']['seed']}")
def test_the_bytes_of_todays_specs_stay(case):
    assert json.dumps(ProjectionSpec.from_json(case["spec"]).to_json()) == json.dumps(case["spec"])
    assert list(case["spec"]) == ["layout", "d", "seed", "grouping", "grouping_version", "start", "bound"]


def test_frame_and_options_are_written_where_there_are_any():
    assert list(planned("lora").to_json())[7:] == []
    assert list(planned("gpart").to_json())[7:] == ["frame", "frame_version"]
    assert planned("vera", rank=3).to_json()["options"] == {"initial": 0.1, "rank": 3}
    assert planned("lora", grouping="codebook", options={"length": 1}).to_json()["options"] == {
        "length": 1,
        "topk": 2,
        "vectors": 256,
    }


def test_options_have_one_order():
    a, b = (("initial", 0.1), ("rank", 3)), (("rank", 3), ("initial", 0.1))
    layout = frame_layout(FRAMES["scaled"], TARGETS, {"rank": 3})
    made = [ProjectionSpec(layout, 9, frame="scaled", options=options) for options in (a, b)]
    assert made[0] == made[1]
    assert made[0].options == a


FUTURE = [
    ({"grouping": "spiral"}, "'spiral' version 1 is not known here .known: balanced version 1 or 2, .*codebook"),
    ({"grouping_version": 2}, "grouping 'identity' version 2 is not known here"),
    ({"frame": "ring"}, "frame 'ring' version 1 is not known here .known: pair version 1, .*; a newer unilora may"),
    ({"frame_version": 2}, "frame 'scaled' version 2 is not known here"),
    ({"frame_version": "1"}, "frame 'scaled' version '1' is not known here"),
    ({"frame": ["scaled"]}, r"frame \['scaled'\] version 1 is not known here"),
    ({"start": "warm"}, "start 'warm' is not known here"),
]


@pytest.mark.parametrize(("change", "message"), FUTURE, ids=[str(i) for i in range(len(FUTURE))])
@pytest.mark.parametrize("more", [{}, {"colour": 1, "options": "none"}], ids=["same fields", "other fields"])
def test_what_is_of_the_future_is_named_before_the_fields(change, message, more):
    with pytest.raises(UnknownVersionError, match=message):
        ProjectionSpec.from_json(planned("vera").to_json() | change | more)


BROKEN = [
    ({"options": {"rank": 3}}, r"has the options \['initial', 'rank'\], got"),
    ({"options": {"rank": 256, "initial": 0.1, "alpha": 1}}, r"has the options .* got \['alpha', 'initial', 'rank'\]"),
    ({"options": {"rank": 256.0, "initial": 0.1}}, "rank must be a positive integer, got 256.0"),
    ({"options": {"rank": 10**19, "initial": 0.1}}, "rank must be a positive integer, got 1000"),
    ({"options": {"rank": 10**400, "initial": 0.1}}, "options.rank: expected an integer or a finite number, got 1000"),
    ({"options": {"rank": 256, "initial": float("nan")}}, "options.initial: expected .* got nan"),
    ({"options": {"rank": 256, "initial": None}}, "options.initial: expected an integer or a finite number, got None"),
    ({"options": {"rank": True, "initial": 0.1}}, "options.rank: expected an integer or a finite number, got True"),
    ({"options": [["rank", 3]]}, "options: expected an object of an integer or a finite number"),
    ({"options": None}, "options: expected an object"),
    ({"d": 5}, "with the grouping 'identity' d is D = 1520, got d = 5"),
    ({"frame": "pair"}, r"the frame 'pair' with the grouping 'identity' has the options \[\]"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_options_of_strangers(change, message):
    with pytest.raises(SpecError, match=message) as caught:
        ProjectionSpec.from_json(planned("vera").to_json() | change)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("missing", ["frame", "frame_version"])
def test_half_a_frame(missing):
    data = planned("gpart").to_json()
    del data[missing]
    with pytest.raises(SpecError, match="a frame and its frame_version belong together"):
        ProjectionSpec.from_json(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frame": "scald"}, "unknown frame 'scald'; the nearest are scaled; known: pair, rows, scaled, "),
        ({"frame": None}, "unknown frame None; known: "),
        ({"options": (("rank", 3),)}, r"has the options \[\], got \['rank'\]"),
        ({"options": "rank"}, "options must be pairs of name and value, got 'rank'"),
        ({"options": (("a",),)}, "options must be pairs of name and value"),
        ({"options": 3}, "options must be pairs of name and value, got 3"),
        ({"frame": "dense", "start": "identity"}, "'m.A' ends in none of .W"),
    ],
)
def test_frames_and_options_that_cannot_be(fields, message):
    with pytest.raises(SpecError, match=message):
        ProjectionSpec(Layout([("m.A", (3,)), ("m.B", (3,))]), 2, **fields)


# ---- files -----------------------------------------------------------------------------------------------------------

FILES = json.loads((FOLDER / "methods.json").read_text("utf-8"))
ROWS = [
    TargetRow("q", "attn.qkv", 2, 8, 6),
    TargetRow("v", "attn.qkv", 2, 8, 6, 12),
    TargetRow("up", "experts", 2, 4, 8, 0, True, "up", 2),
]


def test_there_is_a_file_of_each_method():
    assert {case["method"] for case in FILES} >= METHODS.keys()


@pytest.mark.parametrize("case", FILES, ids=lambda case: case["method"])
def test_the_file_of_a_method_still_reads(tmp_path, case):
    """Spec, targets, θ_D, and ΔW of each target."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(base64.b64decode(case["file"]))
    file = read_adapter(path)
    spec = file.spec
    assert spec.to_json() == case["spec"]
    assert method_of(spec) == case["method"]
    ranked = [row if spec.form.ranked else TargetRow(**vars(row) | {"rank": 0}) for row in ROWS]
    assert read_header(path, file).targets == tuple(ranked)
    theta_D = project(spec, file.theta_d)
    np.testing.assert_allclose(theta_D, case["theta_D"], rtol=2e-6, atol=2e-7)
    factors = spec.layout.split(theta_D)
    for row in ROWS:
        sizes = Sizes(row.in_features, row.out_features, row.experts)
        kept = {name: file.tensors[f"{FROZEN}{row.name}.{name}"] for name in spec.form.kept(sizes, spec.chosen)}
        frozen = kept or spec.form.frozen(sizes, spec.seed, spec.chosen)
        pieces = {piece: factors[name] for piece, name in piece_names(spec.form, row.name, sizes).items()}
        first, *rest = spec.form.chain(pieces, frozen, spec.chosen)
        made = functools.reduce(lambda product, factor: factor @ product, rest, first)
        np.testing.assert_allclose(made.reshape(-1), case["deltas"][row.name], rtol=1e-4, atol=2e-5)


@pytest.fixture
def said(tmp_path):
    """said(rows, method): the header of a file of this method that says these targets."""

    def read(rows, method="vera"):
        spec, path = planned(method), tmp_path / "a.safetensors"
        save_adapter(path, spec, np.zeros(spec.d, np.float32), metadata={"targets": json.dumps(rows)})
        return read_header(path, read_adapter(path))

    return read


SIZED = [
    ["q", "attn.q", 0, False, None, 64, 64, 0],
    ["v", "attn.qkv", 3, True, None, 64, 32, 0],
    ["up", "experts", 0, False, "up_proj", 16, 48, 3],
]


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].frame != "pair"])
def test_rows_with_sizes_come_back(said, method):
    rank = METHODS[method].rank or 0
    header = said(json.loads(write_targets(map(tuple, SIZED))["targets"]), method)
    assert header.targets == (
        TargetRow("q", "attn.q", rank, 64, 64),
        TargetRow("v", "attn.qkv", rank, 64, 32, 3, True),
        TargetRow("up", "experts", rank, 16, 48, 0, False, "up_proj", 3),
    )


def changed(row, place, value):
    rows = copy.deepcopy(SIZED)
    rows[row][place] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "expected a list of"),
        ([], "expected at least one factor, got none"),
        (SIZED[:2], "the frame 'scaled' makes other factors of them, or in another order"),
        (SIZED[::-1], "makes other factors of them, or in another order"),
        ([*SIZED, SIZED[0]], "a target occurs twice"),
        (changed(0, 0, "k"), "makes other factors of them"),
        (changed(0, 6, 65), "makes other factors of them"),
        (changed(2, 7, 2), "makes other factors of them"),
        (changed(2, 7, 0), "makes other factors of them"),
        (changed(0, 5, 0), "q: expected whole numbers of inputs and outputs ≥ 1"),
        (changed(0, 6, -64), "q: expected whole numbers of inputs and outputs ≥ 1"),
        (changed(2, 7, -1), "up: expected whole numbers of inputs and outputs ≥ 1"),
        (changed(0, 7, 3), "expected 0 experts for the layer 'q', got 3; only a parameter has them"),
        (changed(0, 6, 2**62), "'q.v' has more than|makes other factors of them"),
        (changed(0, 6, 2**70), r"targets.*\[0\]\[6\]: expected an integer below 2\^64"),
        (changed(0, 6, 64.0), r"\[0\]\[6\]: expected an integer, got 64.0"),
        (changed(0, 2, True), r"\[0\]\[2\]: expected an integer, got True"),
        (changed(0, 4, 7), r"\[0\]\[4\]: expected a string or null, got 7"),
        ([row[:4] for row in SIZED], r"expected \[a string, a string, .* got \['q', 'attn.q'"),
        ([[*row, 1] for row in SIZED], "expected "),
        ("q", "expected a list of"),
    ],
    ids=str,
)
def test_rows_with_sizes_that_do_not_fit(said, rows, message):
    with pytest.raises(CorruptFileError, match=message) as caught:
        said(rows)
    assert "a.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_rows_of_pairs_are_not_rows_with_sizes(said):
    with pytest.raises(CorruptFileError, match="its targets do not fit its layout"):
        said(SIZED, "lora")


def test_a_core_larger_than_its_layer_is_refused(said):
    with pytest.raises(CorruptFileError, match=r"q: expected rank ≤ 8, the singular vectors .* got 16"):
        said(changed(0, 5, 8), "lora-xs")


def sealed(path, spec, theta_d=None):
    """A file whose spec says this, with the checksum that belongs to it."""
    from safetensors.numpy import save_file

    tensors = {"theta_d": np.zeros(4, np.float32) if theta_d is None else theta_d}
    fingerprint = ProjectionSpec(Layout(spec["layout"]), 1).layout.fingerprint
    header = {"format": "unilora", "format_version": "1", "spec": json.dumps(spec), "fingerprint": fingerprint}
    save_file(tensors, path, header | {"checksum": serialisation._checksum(tensors, header)})
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frame": "ring"}, UnknownVersionError, "a: ProjectionSpec: frame 'ring' version 1 is not known here"),
        ({"grouping": "spiral", "new": 1}, UnknownVersionError, "a: ProjectionSpec: grouping 'spiral' version 1"),
        ({"options": {}}, CorruptFileError, "a: the header's spec cannot be read: .* has the options"),
        ({"options": {"rank": 0, "initial": 0.1}}, CorruptFileError, "rank must be a positive integer, got 0"),
        ({"options": {"rank": 10**9, "initial": 0.1}}, None, ""),
        ({"d": 2**31}, CorruptFileError, "d is D = 1520, got d = 2147483648"),
    ],
    ids=str,
)
def test_specs_of_strangers_in_files_cost_nothing(tmp_path, change, error, message):
    """Neither time nor memory: a rank of 10^9 is a number in a header, until something is made of it."""
    data = planned("vera").to_json() | change
    path = sealed(tmp_path / "a", data, np.zeros(1520, np.float32))
    tracemalloc.start()
    before = time.perf_counter()
    try:
        if error is None:
            rows = write_targets(map(tuple, SIZED))
            file = read_adapter(path)
            file.metadata.update(rows)
            with pytest.raises(CorruptFileError, match="makes other factors of them"):
                read_header(path, file)
        else:
            with pytest.raises(error, match=message):
                read_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - before < 20


def test_a_layout_of_another_frame_is_a_mismatch(tmp_path):
    spec, path = planned("vera"), tmp_path / "a"
    sealed(path, spec.to_json() | {"layout": planned("vera", rank=255).layout.to_json()}, np.zeros(1520, np.float32))
    with pytest.raises((CorruptFileError, MismatchError)):
        read_adapter(path)


def test_every_frame_and_map_is_in_a_method_or_is_an_ablation():
    assert {method.frame for method in METHODS.values()} == set(FRAMES)
    ablations = {"iid", "numpy-shuffle", "local", "by-factor", "unnormalised"}
    assert {method.grouping for method in METHODS.values()} | ablations == set(MAPS)


def test_the_largest_rank_is_taken_and_no_larger_one():
    most = largest_rank(100, 80)
    assert most == 80
    check_rank("a", "q", most, 100, 80)
    with pytest.raises(MismatchError, match=r"a: q: expected a rank of at most 80 .* the file has 81"):
        check_rank("a", "q", most + 1, 100, 80)


def test_the_bound_of_theta_is_that_of_lora_times_the_root_of_a_group():
    """Entries θ_d/√n of A lie within ±1/√in: n = 16, in = 25."""
    spec = ProjectionSpec(Layout([("q.A", (4, 25)), ("q.B", (15, 4))]), 10, start="identity")
    assert default_bound(spec) == pytest.approx(4 / 5)


@pytest.mark.parametrize("method", ["lora-xs", "gpart"])
def test_the_bound_where_all_factors_are_measured_from_the_start(method):
    assert planned(method, start="identity").bound == PAPER_BOUND
