"""Bypassed layers, convolutions and attention pooling, against a plain model whose weights are W + B·A."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unilora_timm
from unilora_core import TargetError
from unilora_torch.targets import weight_name

BYPASSING = ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"]


@pytest.fixture
def lively(tiny):
    """As `tiny`, without the zeros and the very small numbers that random models start with."""

    def make(name, **changes):
        model = tiny(name, **changes)
        torch.manual_seed(3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if not key.endswith("bias") and parameter.abs().max() < 1e-2:
                    parameter.uniform_(0.2, 0.5) if parameter.squeeze().dim() < 2 else parameter.normal_(std=0.2)
        return model

    return make


def dense(adapter, base, images):
    """Logits of the base with W + B·A in the place of each adapted weight W, differentiable in θ_d."""
    weights, factors = dict(base.named_parameters()), adapter.factors()
    for target in adapter.targets:
        W = weights[weight_name(target)]
        update = (factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]).view(-1, *W.shape[1:])
        above, below = target.first_row, W.shape[0] - target.first_row - target.out_features
        weights[weight_name(target)] = W + F.pad(update, (0, 0) * (W.dim() - 1) + (above, below))
    return torch.func.functional_call(base, weights, (images,))


def assert_like_dense(adapter, model, base, images):
    """The same logits and the same gradient of θ_d, relative to their size."""
    expected, output = dense(adapter, base, images), model(images)
    noise = torch.randn_like(expected)
    wanted, found = (torch.autograd.grad((o * noise).sum(), adapter.theta_d)[0] for o in (expected, output))
    assert not torch.allclose(output, base(images), atol=1e-3)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("targets", [None, "qkv", "all-linear", ["k", "mlp"]])
@pytest.mark.parametrize("name", BYPASSING)
def test_a_bypassed_layer_gets_the_right_update_and_gradient(lively, images, move, name, targets):
    model, base = lively(name), lively(name)
    adapter = move(unilora_timm.attach(model, targets))
    bypassed = [target for target in adapter.targets if target.parameter == "qkv.weight"]
    assert bypassed
    assert all(target.module.endswith(".attn") for target in bypassed)
    assert_like_dense(adapter, model, base, images)


@pytest.mark.parametrize("name", BYPASSING)
def test_a_bypassed_layer_is_found_also_where_the_model_trains(lively, images, name):
    model = lively(name).train()
    model.patch_embed.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = unilora_timm.attach(model)
    assert adapter.targets[0].parameter == "qkv.weight"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(module.training for module in model.modules() if module is not adapter)
    model(images).sum().backward()
    assert adapter.theta_d.grad.any()
    adapter.detach()
    assert model.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("weight" in module.__dict__ for module in model.modules())


def test_a_file_of_a_bypassed_layer_is_loaded_without_a_run(lively, images, move, tmp_path):
    adapter = move(unilora_timm.attach(model := lively("beit_base_patch16_224")))
    adapter.save(tmp_path / "a.safetensors")
    fresh = lively("beit_base_patch16_224")
    handle = fresh.register_forward_pre_hook(lambda *_: pytest.fail("load ran the model"))
    loaded = unilora_timm.load(fresh, tmp_path / "a.safetensors", name="second")
    handle.remove()
    assert (loaded.targets, loaded.name) == (adapter.targets, "second")
    assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize("name", BYPASSING[:1])
def test_a_bypassed_layer_merges_and_lives_beside_another_adapter(lively, images, move, name):
    model = lively(name)
    plain, first = model(images), move(unilora_timm.attach(model))
    once = model(images)
    second = move(unilora_timm.attach(model, ["k", "proj"], modules_to_save=(), name="second", seed=1))
    both = model(images)
    assert not torch.allclose(both, once, atol=1e-3)
    second.detach()
    assert torch.equal(model(images), once)
    first.merge()
    torch.testing.assert_close(model(images), once, rtol=1e-4, atol=1e-5)
    first.unmerge()
    with first.disabled():
        assert torch.equal(model(images), plain)
    first.detach(merge=True)
    torch.testing.assert_close(model(images), once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BYPASSING[:2])
def test_checkpointing_recomputes_with_the_update(lively, images, move, name):
    model = lively(name).train()
    adapter = move(unilora_timm.attach(model))
    model(images).square().sum().backward()
    wanted, adapter.theta_d.grad = adapter.theta_d.grad, None
    model.set_grad_checkpointing()
    model(images).square().sum().backward()
    torch.testing.assert_close(adapter.theta_d.grad, wanted)


def test_autocast(lively, images, move):
    model, base = lively("beit_base_patch16_224"), lively("beit_base_patch16_224")
    adapter = move(unilora_timm.attach(model))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    low.float().square().sum().backward()
    torch.testing.assert_close(low.float(), dense(adapter, base, images), rtol=0.1, atol=0.1)
    assert adapter.theta_d.grad.isfinite().all()
    assert adapter.theta_d.grad.any()


@pytest.mark.traces
def test_compiled(lively, images, move):
    model = lively("beit_base_patch16_224", depth=1)
    adapter = move(unilora_timm.attach(model))
    plain = model(images)
    (wanted,) = torch.autograd.grad(plain.square().sum(), adapter.theta_d)
    compiled = torch.compile(model, backend="aot_eager")
    output = compiled(images)
    (found,) = torch.autograd.grad(output.square().sum(), adapter.theta_d)
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


class Odd(nn.Module):
    """A block that uses its layers in every way but the usual one."""

    def __init__(self, way):
        super().__init__()
        self.inner, self.way = nn.ModuleDict({"a": nn.Linear(4, 4)}), way
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.way == "usual" or (self.way == "trains" and self.training):
            x = x + self.fc1(x)
        if self.way == "bypassed in training":
            x = x + (F.linear(x, self.fc1.weight) if self.training else self.fc1(x))
        return x + self.fc2(x)


class Outer(nn.Module):
    def __init__(self, way="usual"):
        super().__init__()
        self.block, self.way, self.head = Odd(way), way, nn.Linear(4, 2)

    def forward(self, x):
        x = self.block(x)
        if self.way == "grandparent":
            x = x @ self.block.fc1.weight.T
        return self.head(x)


@pytest.mark.parametrize(
    ("way", "module", "parameter"),
    [
        ("usual", "block.fc1", None),
        ("grandparent", "", "block.fc1.weight"),
        ("bypassed in training", "block", "fc1.weight"),
    ],
)
def test_who_reads_a_weight_is_found_in_both_modes(move, way, module, parameter):
    torch.manual_seed(0)
    model, x = Outer(way), torch.randn(3, 4)
    base = copy.deepcopy(model)
    adapter = move(unilora_timm.attach(model, ["fc1", "fc2"], modules_to_save="head", example=x))
    assert {(t.module, t.parameter) for t in adapter.targets} == {(module, parameter), ("block.fc2", None)}
    for training in (False, True):
        assert_like_dense(adapter, model.train(training), base.train(training), x)


def test_a_layer_that_only_training_calls_is_no_bypassed_one():
    model = Outer("trains")
    with pytest.raises(TargetError, match=r"block.fc1: the model's forward pass never calls this module"):
        unilora_timm.attach(model, ["fc1", "fc2"], modules_to_save="head", example=torch.randn(3, 4))
    assert not model._forward_hooks
    assert "weight" not in model.block.fc1.__dict__


@pytest.mark.parametrize(
    ("name", "changes", "size", "targets"),
    [
        ("convnext_tiny", {}, 32, "conv"),
        ("vit_tiny_patch16_224", {}, 32, ["patch_embed", "q"]),
        ("test_resnet", {}, 32, None),
        ("test_nfnet", {}, 32, "conv"),  # standardised kernels
        ("vit_base_patch16_siglip_224", {}, 32, ["q", "k", "v", "proj"]),  # attention pooling
        ("test_vit4", {"img_size": 32}, 32, "all-linear"),
        ("naflexvit_base_patch16_map", {"embed_dim": 32, "depth": 1, "num_heads": 2}, 384, "all-linear"),
        ("mobilevitv2_050", {}, 128, ["q", "v", "proj"]),  # 1×1 convolutions of unequal blocks
        ("efficientvit_m0", {}, 224, None),
        ("levit_conv_128s", {}, 224, None),
    ],
)
def test_one_member_of_each_kind(lively, move, tmp_path, name, changes, size, targets):
    model = lively(name, **changes)
    base = copy.deepcopy(model)
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    adapter = move(unilora_timm.attach(model, targets, example=images))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=1e-3))
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    trained = copy.deepcopy(base)
    for head in adapter.modules_to_save:
        trained.get_submodule(head).load_state_dict(model.get_submodule(head).state_dict())
    expected, output = dense(adapter, trained, images), model(images)
    scale = expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3 * scale)
    wanted, found = (torch.autograd.grad(o.square().sum(), adapter.theta_d)[0] for o in (expected, output))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())
    adapter.save(tmp_path / "a.safetensors")
    unilora_timm.load(base, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(base(images), model(images))


class Attends(nn.Module):
    """`nn.MultiheadAttention`, which calls none of its layers, in a model of two blocks."""

    def __init__(self, **widths):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.mlp(self.attn(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize(
    ("widths", "targets", "names"),
    [
        ({}, None, ["in_proj_weight.q", "in_proj_weight.v"]),
        ({}, ["k", "proj"], ["out_proj", "in_proj_weight.k"]),
        ({}, "qkv", ["in_proj_weight"]),
        ({"kdim": 8, "vdim": 8}, ["q", "v"], ["in_proj_weight.q", "in_proj_weight.v"]),
    ],
)
def test_multihead_attention(move, widths, targets, names):
    torch.manual_seed(0)
    model, x = Attends(**widths), torch.randn(2, 5, 8)
    base = copy.deepcopy(model)
    adapter = move(unilora_timm.attach(model, targets, modules_to_save="head", example=x))
    assert [target.name for target in adapter.targets] == [f"attn.{name}" for name in names]
    for training in (False, True):
        assert_like_dense(adapter, model.train(training), base.train(training), x)
