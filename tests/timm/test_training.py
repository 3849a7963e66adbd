"""Adapted timm models: the numbers are right, files come back, and timm's own tools do not choke."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import unilora_timm
from unilora_core import MismatchError, project, read_adapter


@pytest.fixture
def model(tiny):
    return tiny()


def dense(base, adapter, factors):
    """The adapted model by hand: weights W + B·A for the q and v rows, through `functional_call`."""
    weights = dict(base.named_parameters())
    for target in adapter.targets:
        name = f"{target.module}.weight"
        update = factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
        above = target.first_row
        below = weights[name].shape[0] - above - target.out_features
        weights[name] = weights[name] + F.pad(update, (0, 0, above, below))
    return weights


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_outputs_and_gradients_equal_a_handwritten_reference(tiny, images, move, start):
    model, base = tiny(), tiny()
    adapter = move(unilora_timm.attach(model, start=start))
    factors = adapter.factors()
    expected = torch.func.functional_call(base, dense(base, adapter, factors), images)
    output = model(images)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output, base(images), atol=1e-3)
    loss = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * loss).sum(), adapter.theta_d)
    found = torch.autograd.grad((output * loss).sum(), adapter.theta_d)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_only_query_and_value_rows_change(tiny, images, move):
    model, base = tiny(), tiny()
    move(unilora_timm.attach(model, targets=["q", "v"]))
    seen = {}
    for each in (model, base):
        each.blocks[0].attn.qkv.register_forward_hook(lambda _m, _a, out, each=each: seen.update({each: out}))
        each(images)
    q, k, v = (seen[model] - seen[base]).chunk(3, dim=-1)
    assert q.any()
    assert not k.any()
    assert v.any()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0"])
def test_a_new_adapter_is_the_base_model(tiny, images, name):
    model = tiny(name)
    expected = model(images)
    adapter = unilora_timm.attach(model)
    assert adapter.spec.start == "identity"
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_merge_and_unmerge(tiny, images, move, name):
    model = tiny(name)
    adapter = move(unilora_timm.attach(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images)
    for _ in range(3):
        adapter.merge()
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        adapter.unmerge()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(images), expected)


def test_save_and_load_bring_the_head_back(tiny, images, move, tmp_path):
    model, fresh = tiny(), tiny()
    adapter = move(unilora_timm.attach(model))
    torch.nn.init.normal_(model.head.weight)
    adapter.save(tmp_path / "adapter.safetensors")
    loaded = unilora_timm.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(images), model(images))
    assert loaded.targets == adapter.targets
    assert loaded.modules_to_save == ("head",)
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter.safetensors"]


def test_numpy_reads_the_same_numbers(model, move, tmp_path):
    adapter = move(unilora_timm.attach(model))
    adapter.save(tmp_path / "adapter.safetensors")
    file = read_adapter(tmp_path / "adapter.safetensors")
    theta_D = torch.cat([factor.flatten() for factor in adapter.factors().values()])
    assert project(file.spec, file.theta_d).tobytes() == theta_D.detach().numpy().tobytes()
    assert set(file.tensors) == {"head.weight", "head.bias"}


def test_another_number_of_classes_is_refused_by_name(tiny, move, tmp_path):
    move(unilora_timm.attach(tiny())).save(tmp_path / "adapter.safetensors")
    other = tiny(num_classes=5)
    before = other.head.weight.clone()
    with pytest.raises(
        MismatchError, match=r"head: the file holds .*\(3, 32\).*expects .*\(5, 32\).*number of classes"
    ):
        unilora_timm.load(other, tmp_path / "adapter.safetensors")
    assert torch.equal(other.head.weight, before)
    assert not hasattr(other, "unilora")


def test_another_model_is_refused_by_name(tiny, move, tmp_path):
    move(unilora_timm.attach(tiny())).save(tmp_path / "adapter.safetensors")
    with pytest.raises(MismatchError, match=r"blocks.0.attn.qkv: expected a layer of 32 inputs"):
        unilora_timm.load(tiny(embed_dim=48), tmp_path / "adapter.safetensors")
    with pytest.raises(MismatchError, match=r"no module 'blocks.0.attn.qkv'"):
        unilora_timm.load(tiny("resnet18"), tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_gradient_checkpointing(tiny, images, move, name):
    grads = []
    for checkpointing in (False, True):
        model = tiny(name)
        model.set_grad_checkpointing(checkpointing)
        adapter = move(unilora_timm.attach(model))
        model.train()
        model(images).square().sum().backward()
        grads.append((adapter.theta_d.grad, model.get_classifier().weight.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.traces
def test_compile_without_a_graph_break(model, images, move):  # the warnings are torch's own, raised while it traces
    torch.compiler.reset()
    adapter = move(unilora_timm.attach(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    compiled(images).sum().backward()
    assert adapter.theta_d.grad.any()


def test_forward_features_and_intermediates_are_adapted_too(tiny, images, move):
    model, base = tiny(), tiny()
    adapter = move(unilora_timm.attach(model))
    adapter.merge()
    expected = model.forward_features(images), model.forward_intermediates(images, intermediates_only=True)
    adapter.unmerge()
    found = model.forward_features(images), model.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], base.forward_features(images), atol=1e-3)


def test_it_learns(model, images):
    adapter = unilora_timm.attach(model)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = create_optimizer_v2(adapter.parameter_groups(lora_rate=2e-3, head_rate=1e-2), opt="adamw")
    labels = torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timms_optimizer_gives_theta_d_no_weight_decay(model, layer_decay):
    adapter = unilora_timm.attach(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=layer_decay)
    groups = [group for group in optimizer.param_groups if any(p is adapter.theta_d for p in group["params"])]
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3  # theta_d, head.weight, head.bias


def test_timms_optimizer_keeps_the_rates_of_parameter_groups(model):
    adapter = unilora_timm.attach(model)
    groups = adapter.parameter_groups(lora_rate=1e-3, head_rate=5e-4)
    theta, head = create_optimizer_v2(groups, opt="adamw", lr=1.0, weight_decay=0.1).param_groups
    assert (theta["lr"], theta["weight_decay"]) == (adapter.learning_rate(1e-3), 0.0)
    assert (head["lr"], head["weight_decay"]) == (5e-4, 0.1)


def test_model_ema(model, images, move):
    adapter = unilora_timm.attach(model)
    ema = ModelEmaV3(model, decay=0.5)
    start = adapter.theta_d.detach().clone()
    end = move(adapter).theta_d.detach().clone()
    ema.update(model)
    torch.testing.assert_close(ema.module.unilora.theta_d.detach(), (start + end) / 2)
    with torch.no_grad():  # the averaged model computes with its own θ_d, not with the model's
        adapter.theta_d.copy_((start + end) / 2)
        expected = model(images)
        adapter.theta_d.zero_()
        torch.testing.assert_close(ema.module(images), expected)


def test_a_copy_is_independent(model, images, move):
    adapter = unilora_timm.attach(model)
    twin = copy.deepcopy(model)
    before = twin(images)
    move(adapter)
    assert torch.equal(twin(images), before)
    assert not torch.equal(model(images), before)


def test_reset_classifier_after_attach(tiny, images, move, tmp_path):
    model = tiny()
    adapter = move(unilora_timm.attach(model))
    model.reset_classifier(7)
    groups = adapter.parameter_groups(1e-3)
    assert [tuple(p.shape) for p in groups[1]["params"]] == [(7, 32), (7,)]
    assert model.head.weight.requires_grad
    adapter.save(tmp_path / "adapter.safetensors")
    fresh = tiny()
    fresh.reset_classifier(7)
    unilora_timm.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(images), model(images))


def test_detach_gives_the_base_model_back(model, images, move):
    expected = model(images)
    names = list(model.state_dict())
    move(unilora_timm.attach(model)).detach()
    assert torch.equal(model(images), expected)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_base_weights_load_before_attach_or_not_strictly(tiny, images, move):
    """A checkpoint of the base model lacks θ_d: strict loading says so, loading with strict=False leaves θ_d alone."""
    checkpoint = tiny().state_dict()
    model = tiny()
    adapter = move(unilora_timm.attach(model))
    expected = model(images)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "unilora.theta_d"'):
        model.load_state_dict(checkpoint)
    theta_d = adapter.theta_d.detach().clone()
    missing = model.load_state_dict(checkpoint, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["unilora.theta_d"], [])
    assert torch.equal(adapter.theta_d, theta_d)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("name", "targets"), [("vit_tiny_patch16_224", None), ("swin_tiny_patch4_window7_224", "all-linear")]
)
def test_an_exported_folder_gives_the_same_logits_in_peft(tiny, images, move, tmp_path, name, targets):
    peft = pytest.importorskip("peft")
    model = tiny(name)
    adapter = move(unilora_timm.attach(model, targets))
    torch.nn.init.normal_(model.get_classifier().weight)
    adapter.export_lora(tmp_path)
    lora = peft.PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert (lora(images) - model(images)).abs().max() <= 1e-5


def test_a_bfloat16_model(model, images, move):
    model.bfloat16()
    adapter = move(unilora_timm.attach(model))
    output = model(images.bfloat16())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert adapter.theta_d.dtype == adapter.theta_d.grad.dtype == torch.float32
    assert adapter.theta_d.grad.any()
