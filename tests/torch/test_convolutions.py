"""Convolutions: B·A as their weight has the shape, beside them or inside them; against the dense weight W + B·A."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    adapted,
    assert_same_run,
    assert_unchanged,
    hooks,
    naive_factors,
    run,
    snapshot,
)
from torch import nn
from versions import TRACES_ATTRIBUTES

import unilora_torch
from unilora_core import AdapterFileError, MismatchError, TargetError
from unilora_torch import Target, find_targets

IMAGES = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(7))


class Same(nn.Conv2d):
    """Pads as TensorFlow does, and takes no padding mode: linear in its weight."""

    def forward(self, x):
        pads = []
        for size, k, step in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            missing = max((-(size // -step) - 1) * step + k - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Its kernels have mean 0 and variance 1, so it is not linear in its weight."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (variance + 1e-3).sqrt(), self.bias)


class Gained(nn.Conv2d):
    """Linear in its weight, but with a number of outputs of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.linspace(1, 2, self.out_channels).view(-1, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain


BESIDE = {
    "3x3": (nn.Conv2d(4, 6, 3), (2, 4, 9, 7)),
    "stride and padding": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 4, 9, 7)),
    "dilation": (nn.Conv2d(4, 6, 2, dilation=(2, 3)), (2, 4, 9, 7)),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same"), (1, 4, 9, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9, 7)),
    "1x1 without bias": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 9, 7)),
    "1x3": (nn.Conv2d(4, 6, (1, 3)), (2, 4, 9, 7)),
    "patches": (nn.Conv2d(4, 6, 4, stride=4), (2, 4, 8, 12)),
    "no batch": (nn.Conv2d(4, 6, 3), (4, 9, 7)),
    "one channel": (nn.Conv2d(1, 1, 3), (1, 1, 9, 7)),
    "1-D": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "1-D causal": (nn.Conv1d(4, 6, 3, padding=2, dilation=2, bias=False), (1, 4, 9)),
    "3-D": (nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1)), (2, 4, 5, 4, 3)),
    "own padding": (Same(4, 6, 3, stride=2), (2, 4, 9, 7)),
}
INSIDE = {
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 9, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 9, 7)),
    "depthwise 1-D": (nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
    "standardised": (Standardised(4, 6, 3, stride=2), (2, 4, 9, 7)),
    "gained": (Gained(4, 6, 3), (2, 4, 9, 7)),
}
CASES = BESIDE | INSIDE


def case(kind):
    """(a convolution in a model, an input); the same each time."""
    layer, shape = CASES[kind]
    torch.manual_seed(0)
    layer.reset_parameters()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    return nn.Sequential(nn.Identity(), copy.deepcopy(layer)), x


def naive_run(base, adapter, x):
    """(outputs, gradient of Σ outputs² in θ_d) in float64, with W + (B·A).view_as(W)."""
    base = copy.deepcopy(base).double()
    theta_d = adapter.theta_d.detach().double().requires_grad_()
    factors, weights = naive_factors(adapter.spec, theta_d), {}
    for target in adapter.targets:
        name = f"{target.module}.weight"
        weight = weights.get(name, base.get_parameter(name).detach())
        full = torch.zeros(len(weight), target.in_features, dtype=torch.float64)
        rows = slice(target.first_row, target.first_row + target.out_features)
        full[rows] = factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
        weights[name] = weight + full.view_as(weight)
    output = torch.func.functional_call(base, weights, (x.double(),))
    return output.detach(), torch.autograd.grad(output.square().sum(), theta_d)[0]


@pytest.mark.parametrize("kind", CASES)
def test_a_convolution_is_its_dense_weight_plus_B_times_A(kind, start):
    base, x = case(kind)
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=["1"], d=15, rank=2)
    (target,) = adapter.targets
    assert target.parameter == (None if kind in BESIDE else "weight")
    assert adapter.spec.layout.shapes == {
        "1.A": (2, base[1].weight[0].numel()),
        "1.B": (base[1].out_channels, 2),
    }
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x), rtol=1e-4, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(model(x), base(x))
    adapter.verify(x)


@pytest.mark.parametrize("kind", ["stride and padding", "1-D", "3-D", "groups", "standardised"])
def test_blocks_of_the_output_channels(kind, start):
    """Such as q and v of a fused qkv that is made of 1×1 convolutions."""
    base, x = case(kind)
    layer = unilora_torch.find_targets(base, ["1"])[0]
    blocks = [Target(f"b{row}", "1", layer.in_features, 2, row, False, layer.parameter) for row in (4, 0)]
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=blocks, d=15, rank=2)
    found = run(model, adapter, x)
    assert_same_run(found, naive_run(base, adapter, x), rtol=1e-4, atol=1e-5)
    axis = 1 if x.dim() == 1 + base[1].weight.dim() - 1 else 0
    assert torch.equal(found[0].narrow(axis, 2, 2), base(x).detach().narrow(axis, 2, 2))


@pytest.mark.parametrize("kind", CASES)
def test_merge_unmerge_detach_save_load(kind, start, tmp_path):
    base, x = case(kind)
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=["1"], d=15)
    (target,), before, expected = adapter.targets, snapshot(model), model(x)
    weight = base[1].weight
    assert adapter.delta_weight(target).shape == weight.shape
    adapter.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].weight, weight + adapter.delta_weight(target))
    adapter.unmerge()
    assert_unchanged(model, before)
    adapter.save(tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    assert unilora_torch.load(other, tmp_path / "a.safetensors").targets == adapter.targets
    assert torch.equal(other(x), model(x))
    adapter.detach()
    assert torch.equal(model(x), base(x))
    assert hooks(model) == hooks(base)
    other.unilora.detach(merge=True)
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_on_one_convolution_add_up():
    base = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=3))
    model, first = adapted("paper", model=copy.deepcopy(base), targets=["0", "1"])
    second = unilora_torch.attach(model, ["0", "1"], d=30, seed=2, start="paper", bound=0.3, name="second")
    with torch.no_grad():
        for target in first.targets:
            base.get_parameter(f"{target.module}.weight").add_(first.delta_weight(target) + second.delta_weight(target))
        torch.testing.assert_close(model(IMAGES), base(IMAGES), rtol=1e-4, atol=1e-5)
        unilora_torch.switch(model, {"second": 0.5, "unilora": 1})
        for target in first.targets:
            base.get_parameter(f"{target.module}.weight").sub_(second.delta_weight(target))
        torch.testing.assert_close(model(IMAGES), base(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    base = nn.Sequential(nn.Conv2d(4, 6, 3), Standardised(6, 6, 3), nn.Conv2d(6, 6, 3, groups=3)).to(dtype)
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=["0", "1", "2"])
    assert [target.parameter for target in adapter.targets] == [None, "weight", "weight"]
    found = run(model, adapter, IMAGES.to(dtype))
    assert found[0].dtype == dtype
    assert_same_run(found, naive_run(base, adapter, IMAGES.to(dtype)), rtol=0.05, atol=0.05)
    adapter.merge()
    torch.testing.assert_close(model(IMAGES.to(dtype)), found[0], rtol=0.05, atol=0.05)


def test_autocast_and_channels_last():
    base = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=3)).to(memory_format=torch.channels_last)
    x = IMAGES.to(memory_format=torch.channels_last)
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=["0", "1"])
    expected = naive_run(base, adapter, IMAGES)
    found = run(model, adapter, x)
    assert_same_run(found, expected, rtol=1e-4, atol=1e-5)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model, adapter, x)
    assert half[0].dtype == torch.bfloat16
    assert_same_run(half, expected, rtol=0.05, atol=0.05)
    adapter.merge()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.traces
@TRACES_ATTRIBUTES
def test_under_torch_compile():
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), Standardised(6, 6, 3), nn.Conv2d(6, 6, 3, groups=3))
    model, adapter = adapted("paper", model=base, targets=["0", "1", "2"])
    wanted = run(model, adapter, IMAGES)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_run(run(compiled, adapter, IMAGES), wanted, rtol=1e-4)


def test_a_weight_that_another_module_reads():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(4, 6, 3)

        def forward(self, x):
            return F.conv2d(x, self.proj.weight, stride=2).flatten(2)

    base = nn.Sequential(Patches())
    target = Target("p", "0", 36, 6, parameter="proj.weight")
    assert unilora_torch.targets.parameter_target("0", "proj.weight", base[0].proj.weight).in_features == 36
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=[target], d=20)
    output, _ = run(model, adapter, IMAGES)
    with torch.no_grad():
        base[0].proj.weight += adapter.delta_weight(target)
    torch.testing.assert_close(output, base(IMAGES), rtol=1e-4, atol=1e-5)


# ---- names, and what is refused -------------------------------------------------------------------------------------


def test_convolutions_are_adapted_where_they_are_named():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    assert [target.name for target in find_targets(model, "all-linear")] == ["2"]
    assert find_targets(model, "0|2") == (Target("0", "0", 36, 6), Target("2", "2", 6, 2))
    assert find_targets(model, ["0"], exclude="2") == (Target("0", "0", 36, 6),)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_are_refused(kind):
    model = nn.Sequential(kind(2, 3, 2))
    before = snapshot(model)
    with pytest.raises(TargetError, match=f"^0: a {kind.__name__} is no linear layer; .*exclude it"):
        unilora_torch.attach(model, ["0"])
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", INSIDE)
def test_what_needs_its_weight_adapted_says_so(kind):
    model, _ = case(kind)
    beside = Target("x", "1", model[1].weight[0].numel(), model[1].out_channels)
    before = snapshot(model)
    with pytest.raises(TargetError, match=r'^1: this \w+ has groups, or is not linear .* parameter="weight"'):
        unilora_torch.attach(model, [beside])
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("x", "0", 35, 6), "expects .* of 35 inputs and at least 6 outputs, Conv2d has 36 and 6"),
        (Target("x", "0", 36, 4, 3), "expects .* of 36 inputs and at least 7 outputs, Conv2d has 36 and 6"),
        (Target("x", "0", 36, 6, transposed=True, parameter="weight"), "expected a parameter of 2 or 3 axes"),
        (Target("x", "0", 9, 4, parameter="weight"), "expects a weight of 1 × 9 inputs .* has 1 × 36 and 6"),
    ],
)
def test_targets_that_do_not_fit(target, message):
    with pytest.raises(TargetError, match=message):
        unilora_torch.attach(nn.Sequential(nn.Conv2d(4, 6, 3)), [target])


def test_a_file_for_a_kernel_of_another_size(tmp_path):
    _, adapter = adapted("paper", model=nn.Sequential(nn.Conv2d(4, 6, 3)), targets=["0"])
    adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match=r"0: expected a layer of 36 inputs .*, the model has 16 and 6"):
        unilora_torch.load(nn.Sequential(nn.Conv2d(4, 6, 2)), tmp_path / "a.safetensors")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_bank_refuses_convolutions(groups, tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups))
    _, adapter = adapted("paper", model=copy.deepcopy(base), targets=["0"])
    adapter.save(tmp_path / "a.safetensors")
    bank, before = unilora_torch.Bank(base), snapshot(base)
    message = "0 is a convolution, which a bank cannot adapt by row" if groups == 1 else "0 is added to a weight"
    with pytest.raises(TargetError, match=message):
        bank.add("a", tmp_path / "a.safetensors")
    assert_unchanged(base, before)


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stride and padding", "same", "1x1 without bias", "1-D", "3-D"])
@pytest.mark.parametrize("blocks", [False, True])
def test_peft_gives_the_same_outputs(kind, blocks, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base, x = case(kind)
    (whole,) = find_targets(base, ["1"])
    targets = [Target(f"b{row}", "1", whole.in_features, 2, row) for row in (4, 0)] if blocks else [whole]
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=targets, rank=2, d=15)
    adapter.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(x), model(x), atol=1e-2)
    torch.testing.assert_close(theirs.merge_and_unload()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dilation", "reflect", "own padding", *INSIDE])
def test_what_peft_does_not_adapt_alike_is_not_exported(kind, tmp_path):
    _, adapter = adapted("paper", model=case(kind)[0], targets=["1"])
    with pytest.raises(TargetError, match=r"export_lora: 1(\.weight)?: PEFT.*merge the adapter instead"):
        adapter.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lorax", "llama.cpp"])
def test_no_engine_serves_a_convolution(engine, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    _, adapter = adapted("paper", model=model, targets=["0"])
    with pytest.raises(AdapterFileError, match="0: the factors of a convolution, which none of the engines adapts"):
        adapter.export_lora(tmp_path / "lora", engine=engine)
