"""merge, unmerge, disabled: the same outputs, and every bit of the base back."""

import copy

import pytest
import torch
from small_models import Conv1D, adapted, assert_unchanged, mlp, move, naive_weights, snapshot
from torch import nn

import unilora_torch
from unilora_core import TargetError, ValuesError
from unilora_torch import Target

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ten_cycles_leave_every_bit(dtype, start, device):
    model, adapter = adapted(start, model=mlp().to(dtype).to(device))
    before = bits(model)
    for cycle in range(10):
        move(adapter, seed=cycle)
        before["unilora.theta_d"] = adapter.theta_d.detach().clone()
        adapter.merge()
        assert not torch.equal(model.head.weight, before["head.weight"])
        adapter.unmerge()
        assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)],
)
def test_merged_outputs_equal_unmerged_ones(dtype, tolerance, start, device):
    model, adapter = adapted(start, model=mlp().to(dtype).to(device))
    x = X.to(dtype).to(device)
    output, base = model(x), mlp().to(dtype).to(device)(x)
    adapter.merge()
    torch.testing.assert_close(model(x), output, rtol=tolerance, atol=tolerance)
    assert (output - base).abs().max() > tolerance


def test_merged_weights_are_the_naive_ones(start):
    model, adapter = adapted(start)
    wanted = naive_weights(mlp(), adapter, adapter.theta_d.detach().double())
    adapter.merge()
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).double(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("conv", [False, True])
def test_blocks_merge_into_their_rows(conv):
    layer = Conv1D(4, 12) if conv else nn.Linear(4, 12)
    blocks = [Target("q", "0", 4, 4, 0, conv), Target("v", "0", 4, 4, 8, conv)]
    model, adapter = adapted(model=nn.Sequential(layer), targets=blocks, d=7)
    x, before = torch.randn(3, 4), layer.weight.detach().clone()
    output = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), output)
    change = (layer.weight - before).T if conv else layer.weight - before
    assert not change[4:8].any()
    adapter.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(model(x), output)


def test_delta_weight_has_the_orientation_of_the_weight():
    blocks = [Target("q", "0", 4, 6, 0, True)]
    model, adapter = adapted(model=nn.Sequential(Conv1D(4, 12)), targets=blocks, d=7)
    assert adapter.delta_weight(blocks[0]).shape == (4, 6)
    assert not adapter.delta_weight(blocks[0]).requires_grad
    assert model[0].weight.shape == (4, 12)


def test_merging_twice_is_merging_once():
    model, adapter = adapted()
    adapter.merge()
    once = bits(model)
    adapter.merge()
    assert_same_bits(model, once)
    adapter.unmerge()
    adapter.unmerge()
    assert not adapter.merged
    assert torch.equal(model.head.weight, mlp().head.weight)


def test_a_merged_model_runs_no_low_rank_path_and_trains_nothing():
    model, adapter = adapted()
    adapter.merge()
    assert torch.equal(model(X), model.head(model.blocks[1](model.blocks[0](X))))
    assert not model(X).requires_grad


def test_disabled_gives_the_base_merged_or_not(start):
    model, adapter = adapted(start)
    output, base = model(X), mlp()(X)
    with adapter.disabled():
        assert torch.equal(model(X), base)
        with adapter.disabled():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), output)
    adapter.merge()
    merged = model(X)
    with adapter.disabled():
        assert torch.equal(model(X), base)
        assert not adapter.merged
    assert adapter.merged
    assert torch.equal(model(X), merged)


def test_disabled_ends_with_an_exception():
    model, adapter = adapted()
    output = model(X)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        raise ZeroDivisionError
    assert torch.equal(model(X), output)


def test_optimiser_steps_after_unmerge():
    model, adapter = adapted()
    opt = torch.optim.AdamW(adapter.parameter_groups(1e-4))
    adapter.merge()
    adapter.unmerge()
    losses = []
    for _ in range(10):
        loss = model(X).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_theta_d_changed_while_merged_counts_after_unmerge():
    model, adapter = adapted()
    adapter.merge()
    merged = model(X)
    move(adapter, seed=9)
    assert torch.equal(model(X), merged)
    adapter.unmerge()
    assert not torch.allclose(model(X), merged)


def test_weights_changed_while_merged_are_lost_by_unmerge():
    """unmerge puts back the weights that merge found, whatever happened to them in between."""
    model, adapter = adapted()
    adapter.merge()
    with torch.no_grad():
        model.head.weight.zero_()
    adapter.unmerge()
    assert torch.equal(model.head.weight, mlp().head.weight)


def test_a_merged_model_that_was_cast_unmerges_into_the_new_dtype():
    model, adapter = adapted()
    adapter.merge()
    model.bfloat16()
    adapter.unmerge()
    assert torch.equal(model.head.weight, mlp().head.weight.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merge_refuses_a_theta_d_that_is_not_finite(bad):
    model, adapter = adapted()
    with torch.no_grad():
        adapter.theta_d[3] = bad
    before = bits(model)
    with pytest.raises(ValuesError, match=r"merge: theta_d holds NaN or infinity.*Nothing was changed"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(model.head.weight, before["head.weight"])


class Linear4bit(nn.Linear):
    """Looks like bitsandbytes' layer: packed integers, and a forward pass of its own."""

    def __init__(self, width):
        super().__init__(width, width)
        self.dense = self.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(width * width // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.dense, self.bias)


def test_a_quantised_layer_is_adapted_but_not_merged(monkeypatch):
    monkeypatch.setattr(Linear4bit, "__module__", "bitsandbytes.nn.modules")
    base = nn.Sequential(nn.Linear(6, 6), Linear4bit(6))
    model, adapter = adapted(model=copy.deepcopy(base), d=9)
    adapter.verify(X)
    before = bits(model)
    with pytest.raises(TargetError, match=r"^1: a weight of torch.uint8 cannot take the update.*unquantised copy"):
        adapter.merge()
    assert_same_bits(model, before)
    assert not adapter.merged
    with adapter.disabled():
        assert torch.equal(model(X), base(X))


def test_detach_after_a_merge_and_a_second_adapter():
    model, first = adapted()
    first.merge()
    first.detach()
    second = unilora_torch.attach(model, d=11, start="paper", bound=0.5)
    second.merge()
    second.detach()
    assert torch.equal(model(X), mlp()(X))


@pytest.mark.parametrize("take_off", [False, True])
def test_a_sum_that_the_dtype_cannot_hold(take_off):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).half()
    adapter = unilora_torch.attach(model, d=20, start="paper")
    with torch.no_grad():
        adapter.theta_d.fill_(2000)
    before = snapshot(model)
    with pytest.raises(ValuesError, match=r"merge: 0: 256 of its 256 values would be infinite or NaN in torch.float16"):
        adapter.detach(merge=True) if take_off else adapter.merge()
    assert_unchanged(model, before)
    assert not adapter.merged
    model.float()
    adapter.merge()
    assert model[0].weight.isfinite().all()


def test_weights_that_were_infinite_before_are_no_reason_to_refuse():
    model = nn.Sequential(nn.Linear(16, 16)).half()
    adapter = unilora_torch.attach(model, d=20)
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    adapter.merge()
    assert adapter.merged
