"""The path beside each target against the naive W + B·A; what attaching changes in a model, and what it does not."""

import copy
import io

import numpy as np
import pytest
import torch
from small_models import (
    Conv1D,
    adapted,
    assert_same_run,
    assert_unchanged,
    hooks,
    mlp,
    move,
    naive_run,
    run,
    snapshot,
)
from torch import nn

import unilora_torch
from unilora_core import ProjectionSpec, SpecError, TargetError
from unilora_torch import Target

# ---- outputs and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 2, 6)])
def test_outputs_and_gradients_match_the_naive_model(shape, start, device):
    base, x = mlp().to(device), torch.randn(shape).to(device)
    model, adapter = adapted(start, model=copy.deepcopy(base))
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))


@pytest.mark.parametrize("grouping", ["balanced", "iid", "numpy-shuffle"])
@pytest.mark.parametrize("d", [1, 7, 101, 324])
def test_every_grouping_and_awkward_d(d, grouping, start):
    x = torch.randn(4, 6)
    model, adapter = adapted(start, rank=4, d=d, grouping=grouping)
    assert adapter.spec.D == 324
    assert_same_run(run(model, adapter, x), naive_run(mlp(), adapter, x), rtol=1e-4)


def test_gradient_of_the_input(start):
    base, x = mlp(), torch.randn(4, 6)
    model, _ = adapted(start)
    merged, other = adapted(start)
    other.merge()
    gradients = []
    for net in (model, merged):
        y = x.clone().requires_grad_()
        net(y).square().sum().backward()
        gradients.append(y.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(x), model(x))


class Fused(nn.Module):
    """q, k and v from one layer, as timm's attention; ``conv`` stores the weight (in, out)."""

    def __init__(self, conv=False):
        super().__init__()
        self.qkv = Conv1D(4, 12) if conv else nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return q * k.tanh() + v


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("rows", [[0, 8], [8, 0], [4], [0, 4, 8]])
def test_blocks_of_a_fused_layer(rows, conv, start):
    base, x = Fused(conv), torch.randn(3, 5, 4)
    blocks = [Target(f"qkv.{row}", "qkv", 4, 4, row, conv) for row in rows]
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=blocks, rank=2, d=9)
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))


def test_blocks_leave_the_other_outputs_untouched():
    base, x = Fused(), torch.randn(3, 4)
    model, _ = adapted(model=copy.deepcopy(base), targets=[Target("k", "qkv", 4, 4, 4)], d=5)
    change = model.qkv(x) - base.qkv(x)
    assert change[:, 4:8].all()
    assert not change[:, :4].any()
    assert not change[:, 8:].any()


@pytest.mark.parametrize("bias", [False, True])
def test_with_and_without_bias(bias):
    base, x = nn.Sequential(nn.Linear(5, 4, bias=bias)), torch.randn(3, 5)
    model, adapter = adapted(model=copy.deepcopy(base), d=7)
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))


class Shared(nn.Module):
    """One layer, called several times, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


def test_a_layer_called_several_times(start):
    base, x = Shared(), torch.randn(3, 4)
    model, adapter = adapted(start, model=copy.deepcopy(base), d=5)
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))


class Keywords(nn.Module):
    """Layers called by keyword."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 4), Conv1D(4, 4)

    def forward(self, x):
        return self.conv(x=self.linear(input=x))


def test_layers_called_by_keyword():
    base, x = Keywords(), torch.randn(3, 4)
    targets = [Target("linear", "linear", 4, 4), Target("conv", "conv", 4, 4, transposed=True)]
    model, adapter = adapted(model=copy.deepcopy(base), targets=targets, d=5)
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))


def test_a_sequential_model_and_a_model_that_is_itself_the_layer():
    x = torch.randn(3, 4)
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model, adapter = adapted(model=copy.deepcopy(base), d=5)
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))
    layer = nn.Linear(4, 4)
    model, adapter = adapted(model=copy.deepcopy(layer), targets=[Target("layer", "", 4, 4)], d=5)
    adapter.verify(x)
    torch.testing.assert_close(model(x), layer(x) + x @ adapter.delta_weight(adapter.targets[0]).T)


# ---- one owner, little state ----------------------------------------------------------------------------------------


def test_one_parameter_and_one_entry_in_state_dict(start):
    base, (model, adapter) = mlp(), adapted(start)
    assert list(model.state_dict()) == [*base.state_dict(), "unilora.theta_d"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["unilora.theta_d"]
    assert model.unilora is adapter
    assert adapter.theta_d.shape == (40,)
    assert adapter.theta_d.dtype == torch.float32


def test_modules_keep_their_classes_names_and_weights():
    base, (model, _) = mlp(), adapted()
    after = dict(model.named_modules())
    del after["unilora"]
    assert {name: type(m) for name, m in base.named_modules()} == {name: type(m) for name, m in after.items()}
    for name, value in base.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_frozen_state_is_four_bytes_a_lora_parameter(start):
    _, adapter = adapted(start, d=40)
    tables = [value for value in vars(adapter.projection).values() if isinstance(value, torch.Tensor)]
    assert list(map(id, tables)) == list(map(id, adapter.projection.tensors))
    per_group = {"paper": 4, "identity": 8}[start]  # the scale, and the origin of what starts at zero
    assert sum(table.nbytes for table in tables) == 4 * adapter.spec.D + per_group * adapter.spec.d
    assert not adapter.chains.frozen
    assert [*adapter.buffers(), *(value for value in vars(adapter).values() if isinstance(value, torch.Tensor))] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_isometry_and_float32_survive_a_cast_of_the_model(dtype):
    model, adapter = adapted("paper", d=37)
    model.to(dtype)
    assert model.head.weight.dtype == dtype
    assert list(adapter.buffers()) == []  # nothing that DDP would broadcast, or a cast would reach
    assert adapter.theta_d.dtype == torch.float32
    P = torch.stack([torch.cat([f.flatten() for f in _factors_at(adapter, e).values()]) for e in torch.eye(37)], 1)
    assert (P.T.double() @ P.double() - torch.eye(37)).abs().max() <= 1e-6


def _factors_at(adapter, theta_d):
    with torch.no_grad():
        adapter.theta_d.copy_(theta_d)
        return adapter.factors()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attaching_to_a_narrow_base_gives_the_same_P(dtype, start):
    _, wide = adapted(start)
    _, narrow = adapted(start, model=mlp().to(dtype))
    tables = {"paper": [torch.int32, torch.float32], "identity": [torch.int32, torch.float32, torch.float32]}[start]
    assert [table.dtype for table in narrow.projection.tensors] == tables
    for a, b in zip(wide.projection.tensors, narrow.projection.tensors, strict=True):
        assert torch.equal(a, b)


def test_meta_and_back_gives_the_same_P(start):
    model, _ = adapted(start)
    x, state = torch.randn(3, 6), copy.deepcopy(model.state_dict())
    wanted = model(x)
    model.to("meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model(x.to("meta")).shape == (3, 3)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(x), wanted)


# ---- attach, detach, attach -----------------------------------------------------------------------------------------


def test_identity_start_is_the_base_and_the_papers_is_not():
    x = torch.randn(3, 6)
    for start, same in (("identity", True), ("paper", False)):
        model = mlp()
        unilora_torch.attach(model, d=40, start=start)
        assert torch.equal(model(x), mlp()(x)) is same


def test_detach_restores_everything_bit_for_bit(start):
    model = mlp()
    model.blocks[0].requires_grad_(False)
    x, before = torch.randn(3, 6), snapshot(model)
    wanted = model(x)
    model, adapter = adapted(start, model=model)
    assert not torch.equal(model(x), wanted)
    adapter.detach()
    assert not hasattr(model, "unilora")
    assert_unchanged(model, before)
    assert torch.equal(model(x), wanted)


def test_detach_while_merged_restores_the_weights():
    model = mlp()
    before = snapshot(model)
    _, adapter = adapted(model=model)
    adapter.merge()
    adapter.detach()
    assert_unchanged(model, before)


def test_second_attach_is_refused_and_fine_after_detach():
    model, adapter = adapted()
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"already has an adapter 'unilora'.*detach"):
        unilora_torch.attach(model)
    assert_unchanged(model, before)
    adapter.detach()
    again = unilora_torch.attach(model, d=3, start="paper")
    assert model.unilora is again


@pytest.mark.parametrize(
    "wrong",
    [{"d": 0}, {"d": 10**6}, {"rank": 0}, {"targets": ["nope"]}, {"modules_to_save": ["nope"]}, {"grouping": "x"}],
)
def test_a_failing_attach_leaves_the_model_unchanged(wrong):
    model = mlp()
    before = snapshot(model)
    with pytest.raises((SpecError, TargetError)):
        unilora_torch.attach(model, **wrong)
    assert_unchanged(model, before)


def test_attach_out_of_memory_leaves_the_model_unchanged(monkeypatch):
    model = mlp()
    before = snapshot(model)

    def full(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(unilora_torch.Adapter, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        unilora_torch.attach(model)
    assert_unchanged(model, before)


# ---- reproducible ---------------------------------------------------------------------------------------------------


def test_the_seed_alone_fixes_theta_D(start):
    found = []
    for state in (1, 2):
        model = mlp()
        torch.manual_seed(state)
        np.random.seed(state)
        adapter = unilora_torch.attach(model, d=40, seed=5, start=start)
        found.append(torch.cat([factor.flatten() for factor in adapter.factors().values()]))
    assert torch.equal(*found)
    other = unilora_torch.attach(mlp(), d=40, seed=6, start=start)
    assert not torch.equal(found[0], torch.cat([factor.flatten() for factor in other.factors().values()]))


@pytest.mark.parametrize("grouping", ["balanced", "numpy-shuffle"])
def test_attach_does_not_advance_the_global_generators(grouping):
    model = mlp()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    unilora_torch.attach(model, grouping=grouping)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))


# ---- copies ---------------------------------------------------------------------------------------------------------


def _saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _saved_and_loaded])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_independent(duplicate, merged, start):
    model, adapter = adapted(start)
    x = torch.randn(3, 6)
    wanted, base = model(x), mlp()(x)
    if merged:
        adapter.merge()
    twin = duplicate(model)
    assert hooks(twin) == hooks(model)
    if merged:
        twin.unilora.unmerge()
        adapter.unmerge()
    assert torch.equal(twin(x), wanted)
    move(twin.unilora)
    assert torch.equal(model(x), wanted)
    assert not torch.equal(twin(x), wanted)
    twin.unilora.detach()
    assert torch.equal(twin(x), base)
    assert torch.equal(model(x), wanted)


# ---- choosing targets, numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "exclude", "names"),
    [
        ("all-linear", (), ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]),
        ("all-linear", "head", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (r"blocks\.\d\.up", (), ["blocks.0.up", "blocks.1.up"]),
        (["up"], ["blocks.0.up"], ["blocks.1.up"]),
        (["0.down", "head"], (), ["blocks.0.down", "head"]),
    ],
)
def test_choosing_targets(targets, exclude, names):
    adapter = unilora_torch.attach(mlp(), targets, exclude=exclude)
    assert [target.module for target in adapter.targets] == names


def test_layout_has_A_then_B_of_each_target():
    adapter = unilora_torch.attach(mlp(), ["1.up", "head"], rank=2, d=5)
    factors = (("blocks.1.up.A", (2, 6)), ("blocks.1.up.B", (12, 2)), ("head.A", (2, 6)), ("head.B", (3, 2)))
    assert adapter.spec.layout.factors == factors
    assert isinstance(adapter.spec, ProjectionSpec)
    assert {name: tuple(factor.shape) for name, factor in adapter.factors().items()} == dict(factors)


def test_d_by_default_follows_from_D():
    adapter = unilora_torch.attach(mlp(width=16))
    assert 1 < adapter.spec.d < adapter.spec.D / 2


def test_learning_rate_grows_with_D_over_d_and_is_proportional():
    rates = [unilora_torch.attach(mlp(), d=d).learning_rate(1e-3) for d in (324, 111, 37, 4)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    adapter = unilora_torch.attach(mlp(), d=37)
    assert adapter.learning_rate(3e-3) == pytest.approx(3 * adapter.learning_rate(1e-3))


def test_parameter_groups_hold_every_trained_parameter_once():
    model = mlp()
    adapter = unilora_torch.attach(model, d=37, modules_to_save=["head"])
    theta, head = adapter.parameter_groups(1e-3, head_rate=5e-4)
    assert theta["params"] == [adapter.theta_d]
    assert (theta["lr"], theta["weight_decay"]) == (adapter.learning_rate(1e-3), 0.0)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert head["lr"] == 5e-4
    torch.optim.AdamW([theta, head])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for group in (theta, head) for p in group["params"]}


def test_summary_counts_what_trains():
    adapter = unilora_torch.attach(mlp(), d=37, modules_to_save="head")
    for words in ("37 numbers", "4 targets", "head: 21", "trained: 58 of"):
        assert words in adapter.summary()
    assert adapter.summary() in repr(adapter)


def test_public_names():
    assert unilora_torch.__all__ == sorted(unilora_torch.__all__)
    assert all(hasattr(unilora_torch, name) for name in unilora_torch.__all__)
