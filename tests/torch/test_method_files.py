"""Every method's files: saved, loaded, exported; and what is refused at attach and of files that lie."""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
from methods import METHODS, PLACES, attached, moved, run
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from small_models import assert_unchanged, snapshot
from test_merge import Linear4bit
from torch import nn

import unilora_torch
from unilora_core import (
    CorruptFileError,
    Layout,
    MismatchError,
    SpecError,
    TargetError,
    UnknownVersionError,
    ValuesError,
    read_adapter,
    serialisation,
)
from unilora_core.methods import method_of
from unilora_torch.targets import block_of

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


# ---- saved and loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [place for place in PLACES if "checkpointing" not in place])
@every_method
def test_a_loaded_adapter_computes_the_same_bits(path, method, place):
    base, model, adapter, x = moved(method, place)
    adapter.save(path)
    again = unilora_torch.load(base, path)
    assert (again.spec, again.targets) == (adapter.spec, adapter.targets)
    for found, wanted in zip(run(base, again, x), run(model, adapter, x), strict=True):
        assert torch.equal(found, wanted)


@every_method
def test_a_file_is_a_function_of_the_adapter(path, method):
    base, _, adapter, _ = moved(method)
    adapter.save(path)
    first = path.read_bytes()
    adapter.merge()  # what stands in the chains is not made of the weights again
    adapter.save(path)
    assert path.read_bytes() == first
    unilora_torch.load(base, path).save(path)
    assert path.read_bytes() == first


@every_method
def test_what_a_file_holds(path, method):
    """θ_d, and of LoRA-XS the singular vectors, which another machine would give other signs."""
    _, _, adapter, _ = moved(method)
    adapter.save(path)
    file = read_adapter(path)
    assert method_of(file.spec) == method
    kept = {f"frozen.{layer}.{name}" for layer in "02" for name in "UV"} if adapter.spec.frame == "core" else set()
    assert file.tensors.keys() == kept
    assert np.array_equal(file.theta_d, adapter.theta_d.detach().numpy())
    assert path.stat().st_size < 4 * adapter.spec.d + 3500 + sum(array.nbytes for array in file.tensors.values())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_what_lora_xs_keeps_are_the_singular_vectors(rank):
    base, _, adapter, _ = attached("lora-xs", rank=rank)
    for target in adapter.targets:
        weight = base.get_submodule(target.module).weight.detach()
        V, U = (adapter.chains.frozen[target.name][name] for name in "VU")
        torch.testing.assert_close(V @ V.T, torch.eye(rank), rtol=1e-5, atol=1e-5)
        S = torch.linalg.svdvals(weight)
        torch.testing.assert_close((U.T @ U).diag().sqrt(), S[:rank], rtol=1e-4, atol=1e-5)
        assert float((weight - U @ V).norm() ** 2) == pytest.approx(float((S[rank:] ** 2).sum()), abs=1e-5)


class Offloaded(nn.Linear):
    """As accelerate leaves a layer whose weights are elsewhere."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features)
        self.values, self._hf_hook = like.weight.detach().clone(), None
        self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)
        self.bias = nn.Parameter(like.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.values, self.bias)


def quantised(like):
    layer = Linear4bit(like.in_features)
    layer.dense, layer.bias = like.weight.detach().clone(), nn.Parameter(like.bias.detach().clone())
    return layer


@pytest.mark.parametrize("method", ["lora-xs", "tinylora"])
@pytest.mark.parametrize(("kind", "text"), [(quantised, "torch.uint8"), (Offloaded, "a weight on the meta device")])
def test_singular_vectors_of_a_weight_that_is_not_there(path, method, kind, text):
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    base = nn.Sequential(plain[0], plain[1], kind(plain[2]))
    before = list(base.state_dict()), base[2].weight.device
    match = rf"^2: the method is made of the singular vectors.*{text}.*attach to the base in float32.*load that file"
    with pytest.raises(TargetError, match=match):
        unilora_torch.attach(copy.deepcopy(base), method=method, rank=2)
    adapter = unilora_torch.attach(whole := copy.deepcopy(plain), method=method, rank=2)
    with torch.no_grad():
        adapter.theta_d.normal_()
    adapter.save(path)
    unilora_torch.load(base, path)
    x = torch.randn(3, 6)
    assert torch.equal(base(x), whole(x))
    assert (list(base.state_dict())[:-1], base[2].weight.device) == before


def test_singular_vectors_of_no_numbers():
    model = PLACES["linear"].model()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(TargetError, match=r"^2: its weight holds NaN or infinity, and has no singular vectors"):
        unilora_torch.attach(model, method="lora-xs", rank=2)


# ---- exported -------------------------------------------------------------------------------------------------------

FACTORS = [method for method in METHODS if method not in ("fourierft", "gpart", "intrinsic-dimension")]


@pytest.mark.parametrize("place", ["linear", "blocks of a linear", "transposed, beside", "embedding", "convolution"])
@pytest.mark.parametrize("method", FACTORS)
def test_an_exported_lora_is_the_update(tmp_path, method, place):
    _, model, adapter, _ = moved(method, place)
    adapter.export_lora(tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    for module in {target.module for target in adapter.targets}:
        mine = [target for target in adapter.targets if target.module == module]
        A, B = sorted((key, tensor) for key, tensor in state.items() if f".{module}.lora_" in key)
        assert len(A[1]) == config["r"]
        found = B[1].flatten(1) @ A[1].flatten(1)
        weight = model.get_submodule(module).weight
        wanted = torch.zeros_like(weight)
        for target in mine:
            block_of(wanted, target).copy_(adapter.delta_weight(target))
        wanted = wanted.T if mine[0].transposed else wanted.flatten(1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", FACTORS)
def test_exported_experts(tmp_path, method):
    _, _, adapter, _ = moved(method, "experts")
    adapter.export_lora(tmp_path / "lora")
    A, B = (
        load_file(tmp_path / "lora" / "adapter_model.safetensors")[f"base_model.model.0.lora_{n}.weight"] for n in "AB"
    )
    found = B.unflatten(1, (-1, 3)).permute(2, 0, 1) @ A.unflatten(0, (3, -1))
    torch.testing.assert_close(found, adapter.delta_weight(adapter.targets[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in FACTORS])
def test_what_makes_whole_weights_is_not_exported(tmp_path, method):
    _, _, adapter, _ = moved(method)
    with pytest.raises(TargetError, match=r"export_lora: the frame '\w+' makes whole weights.*merge the adapter into"):
        adapter.export_lora(tmp_path / "lora")
    assert not list(tmp_path.iterdir())


# ---- refused at attach ----------------------------------------------------------------------------------------------

REFUSED = [
    ({"method": "vora"}, r"unknown method 'vora'; the nearest are .*vera.*; known: uni-lora, lora"),
    ({"method": "Vera"}, r"unknown method 'Vera'; the nearest are vera"),
    ({"method": None}, "unknown method None; known: uni-lora"),
    ({"grouping": "fastfod"}, r"unknown grouping 'fastfod'; the nearest are fastfood; known: balanced"),
    ({"method": "vera", "grouping": "balance"}, "the nearest are balanced"),
    ({"method": "lora", "vectors": 8}, r"the method 'lora' has no option 'vectors'; it has none"),
    ({"method": "vb-lora", "lenght": 8}, r"the method 'vb-lora' has no option 'lenght'; known: vectors, length, topk"),
    ({"method": "vera", "initial": 0}, "initial must be a positive number, got 0"),
    ({"method": "vera", "initial": math.inf}, "initial must be a positive number, got inf"),
    ({"method": "vb-lora", "vectors": 1.5}, "vectors must be a positive integer, got 1.5"),
    ({"method": "vb-lora", "topk": True}, "topk must be a positive integer, got True"),
    ({"method": "vb-lora", "vectors": 2**70, "length": 2}, "vectors must be a positive integer"),
    ({"method": "vb-lora", "vectors": 2**40, "length": 2}, r"d is \d+, more than 2\^31; take fewer vectors"),
    ({"method": "vb-lora", "length": 5}, r"length = 5 does not divide the 16 columns of '0.A'; take .* such as 8"),
    ({"method": "vb-lora", "length": 2, "vectors": 3, "topk": 4}, "expected topk ≤ vectors = 3, got 4"),
    ({"method": "vb-lora", "length": 2, "start": "identity"}, "'codebook' is not linear, so it has start='paper' only"),
    ({"method": "lora", "start": "zero"}, "start='zero' with the frame 'pair' would leave every factor at zero"),
    ({"method": "gpart", "rank": 4}, "the method 'gpart' has no rank, got rank = 4; leave it out"),
    ({"method": "fourierft", "rank": 4}, "has no rank"),
    ({"method": "fourierft", "frequencies": 200}, r"2: expected frequencies ≤ 192, the entries of a weight, got 200"),
    ({"method": "lora", "d": 7}, r"the method 'lora' trains d = 288 numbers here, got d = 7; leave d out, or take a"),
    ({"method": "vb-lora", "length": 2, "vectors": 4, "d": 7}, "the method 'vb-lora' trains d = "),
    ({"method": "gpart", "d": 577}, r"expected 1 ≤ d ≤ min\(D, 2\^31\), got d = 577 with D = 576"),
    ({"method": "fastfood", "rank": 4, "d": 289}, "expected 1 ≤ d ≤ D, got d = 289 with D = 288"),
    ({"method": "lora-xs", "rank": 9}, "2: expected rank ≤ 8, the singular vectors of a weight of that side, got 9"),
    ({"method": "vera", "rank": 0}, "expected rank ≥ 1, got 0"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refused_at_attach(options, text):
    model = PLACES["linear"].model()
    before = snapshot(model)
    with pytest.raises(SpecError, match=text):
        unilora_torch.attach(model, **options)
    assert_unchanged(model, before)


# ---- files that lie -------------------------------------------------------------------------------------------------


def rewritten(path, spec=None, rows=None, tensors=None):
    """The file with other entries in its spec, other entries in its first target, and other tensors (None: gone)."""
    with safe_open(path, "numpy") as file:
        header, arrays = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said, targets = json.loads(header["spec"]) | (spec or {}), json.loads(header["targets"])
    for place, value in (rows or {}).items():
        targets[0][place] = value
    arrays = {name: array for name, array in (arrays | (tensors or {})).items() if array is not None}
    header |= {"spec": json.dumps(said), "targets": json.dumps(targets)}
    header["fingerprint"] = Layout(said["layout"]).fingerprint
    del header["checksum"]
    save_file(arrays, path, header | {"checksum": serialisation._checksum(arrays, header)})


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


NAN = np.full((3, 16), np.nan, np.float32)
HUGE = 2**40
SCALED = {"rank": 4, "initial": 0.1}
CODEBOOK = {"rank": 4, "vectors": 6, "length": 2, "topk": 2}
LIES = [
    # what the frame made of a weight
    (
        "lora-xs",
        {"tensors": {"frozen.0.V": None}},
        MismatchError,
        r"expected the tensor frozen.0.V \(3, 16\).*got none",
    ),
    ("lora-xs", {"tensors": {"frozen.0.V": zeros(3, 15)}}, MismatchError, r"frozen.0.V.*got \(3, 15\) float32"),
    ("lora-xs", {"tensors": {"frozen.0.U": zeros(24, 3, dtype=np.float64)}}, MismatchError, r"got \(24, 3\) float64"),
    ("lora-xs", {"tensors": {"frozen.0.V": NAN}}, ValuesError, "48 of the 48 values of frozen.0.V are NaN"),
    # sizes
    ("lora-xs", {"spec": {"options": {"rank": 9}}}, CorruptFileError, "expected rank ≤ 8"),
    ("vera", {"spec": {"options": SCALED | {"rank": HUGE}}}, CorruptFileError, "frame 'scaled' makes other"),
    ("vera", {"spec": {"options": {"rank": 5}}}, CorruptFileError, "has the options .'initial', 'rank'"),
    (
        "vera",
        {"spec": {"options": {"rank": 5, "initial": -1.0}}},
        CorruptFileError,
        "initial must be a positive number",
    ),
    ("fourierft", {"spec": {"options": {"frequencies": HUGE, "scaling": 1.0}}}, CorruptFileError, "frequencies ≤ 384"),
    ("vb-lora", {"spec": {"options": CODEBOOK | {"vectors": HUGE}}}, CorruptFileError, "d is"),
    ("vb-lora", {"spec": {"options": CODEBOOK | {"length": HUGE}}}, CorruptFileError, "does not divide"),
    ("vb-lora", {"spec": {"options": CODEBOOK | {"topk": 7}}}, CorruptFileError, "topk ≤ vectors = 6"),
    ("lora", {"spec": {"d": 7}}, CorruptFileError, "with the grouping 'identity' d is D = 288, got d = 7"),
    ("lora", {"tensors": {"theta_d": zeros(7)}}, ValuesError, r"expected theta_d \(288,\) float32, got \(7,\)"),
    # what is not known, or not so
    ("vera", {"spec": {"frame": "ring"}}, UnknownVersionError, "frame 'ring' version 1 is not known here.*a newer"),
    ("vera", {"spec": {"frame_version": 2}}, UnknownVersionError, "frame 'scaled' version 2 is not known here"),
    (
        "fastfood",
        {"spec": {"grouping": "spiral"}},
        UnknownVersionError,
        "grouping 'spiral' version 1 is not known here",
    ),
    (
        "tied-lora",
        {"spec": {"frame": "scaled", "options": SCALED}},
        CorruptFileError,
        "'shared.16x24.A' ends in none of",
    ),
    ("gpart", {"spec": {"layout": [["0.W", [24, 16]], ["2.W", [8, 23]]]}}, CorruptFileError, "'dense' makes other"),
    ("gpart", {"spec": {"start": "zero", "frame": "pair", "frame_version": 1}}, CorruptFileError, "ends in none of"),
    # a target: name, module, first row, transposed, parameter, in, out, experts
    (
        "gpart",
        {"rows": {7: 3}},
        CorruptFileError,
        "expected 0 experts for the layer '0', got 3; only a parameter has them",
    ),
    ("gpart", {"rows": {4: "weight", 7: -1}}, CorruptFileError, "expected whole numbers of inputs and outputs ≥ 1"),
    ("gpart", {"rows": {0: "2"}}, CorruptFileError, "a target occurs twice"),
    ("vera", {"rows": {1: "1"}}, MismatchError, "1 should be a linear layer, the model has ReLU"),
    ("vera", {"rows": {1: "9"}}, MismatchError, "the model has no module '9'"),
    ("vera", {"rows": {5: 15}}, MismatchError, "0: expected a layer of 15 inputs .* the model has 16"),
    ("vera", {"rows": {2: 1}}, MismatchError, "0: expected a layer of 16 inputs and at least 25 outputs"),
    ("vera", {"rows": {5: HUGE}}, MismatchError, "0: expected a layer of 1099511627776 inputs"),
    ("vera", {"rows": {4: "weight", 7: 1}}, CorruptFileError, "makes other factors"),
    ("vera", {"rows": {4: "weigth"}}, MismatchError, "0: no parameter 'weigth'; the nearest are .*weight"),
]


@pytest.mark.parametrize(("method", "lie", "error", "text"), LIES, ids=[f"{m} {text}" for m, _, _, text in LIES])
def test_a_file_that_lies(path, method, lie, error, text):
    base, _, adapter, _ = moved(method)
    adapter.save(path)
    rewritten(path, **lie)
    before, start = snapshot(base), time.perf_counter()
    with pytest.raises(error, match=text) as caught:
        unilora_torch.load(base, path)
    assert time.perf_counter() - start < 5
    assert str(path) in str(caught.value)
    assert_unchanged(base, before)
    _, other, attached_one, x = moved(method)
    wanted = other(x)
    with pytest.raises(error, match=text):
        attached_one.swap(path)
    assert torch.equal(other(x), wanted)


def test_a_rank_that_a_layer_gives_no_reason_for(path):
    """VeRA is used with ranks up to 1024 in narrow layers, too; what is frozen is as large as the rank."""
    base = nn.Sequential(nn.Linear(16, 8), nn.Linear(1025, 1025))
    unilora_torch.attach(copy.deepcopy(base), method="vera", rank=1024).save(path)
    unilora_torch.load(copy.deepcopy(base), path)
    unilora_torch.attach(copy.deepcopy(base), method="vera", rank=1025).save(path)  # which the second gives reason for
    with pytest.raises(MismatchError, match=r"0: expected a rank of at most 1024 .* has 1025.*any_rank"):
        unilora_torch.load(copy.deepcopy(base), path)
    unilora_torch.load(base, path, any_rank=True)


@every_method
def test_a_file_of_another_base(path, method):
    moved(method)[2].save(path)
    other = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    with torch.no_grad():
        other[0].bias.add_(1)
    before = snapshot(other)
    with pytest.raises(MismatchError, match="it was made for a Sequential, the model is a Sequential, and"):
        unilora_torch.load(other, path)
    assert_unchanged(other, before)
