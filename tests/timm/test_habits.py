"""What people do with timm models works on an adapted one: heads, features, memory, precision, optimisers, averages."""

import copy
import pickle

import pytest
import timm.data
import timm.loss
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torchvision.datasets import FakeData

import unilora_timm
from unilora_core import MismatchError, TargetError

LABELS = torch.tensor([0, 1, 2, 0])
VIT, BEIT, SWIN = "vit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"
"""Blocks of a fused qkv; a qkv that the model does not call, so that its weight is W + B·A; a pyramid."""


@pytest.fixture
def adapted(tiny, move):
    """adapted(name, **changes): a model with an adapter that has moved, and scales of layers that let it be heard."""

    def make(name=VIT, targets=None, **changes):
        model = tiny(name, **changes)
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                torch.nn.init.ones_(parameter)
        move(unilora_timm.attach(model, targets))
        for head in unilora_timm.classifier(model):
            torch.nn.init.normal_(model.get_submodule(head).weight, std=0.2)
        return model

    return make


def gradients(model, images, seed=3):
    """Loss, and the gradients of θ_d and the heads, of one step in training mode."""
    torch.manual_seed(seed)
    outputs = model.train()(images)
    loss = sum(F.cross_entropy(output, LABELS) for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss, torch.autograd.grad(loss, trained)


# ---- heads ------------------------------------------------------------------------------------------------------


def train(model, steps=3):
    optimizer = create_optimizer_v2(model.unilora.parameter_groups(1e-2), opt="adamw")
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        loss = F.cross_entropy(model(images), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", [VIT, SWIN, "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("before", [True, False])
def test_a_reset_classifier_trains_and_is_saved(tiny, images, tmp_path, name, before):
    model, fresh = tiny(name), tiny(name)
    if before:
        model.reset_classifier(5)
    adapter = unilora_timm.attach(model)
    if not before:
        model.reset_classifier(5)
    heads = [model.get_submodule(head) for head in adapter.modules_to_save]
    assert heads
    start = [head.weight.detach().clone() for head in heads]
    assert all(head.weight.shape[0] == 5 for head in heads)
    assert all(parameter.requires_grad for head in heads for parameter in head.parameters())
    train(model)
    assert not any(torch.equal(head.weight, weight) for head, weight in zip(heads, start, strict=True))
    adapter.save(tmp_path / "adapter.safetensors")
    with pytest.raises(MismatchError, match=r"head.*\(5, 32\).*expects .*\(3, 32\).*number of classes"):
        unilora_timm.load(fresh, tmp_path / "adapter.safetensors")
    fresh.reset_classifier(5)
    unilora_timm.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(images), model(images))


def test_an_adapter_of_features_without_a_classifier(tiny, images, move, tmp_path):
    for early in (True, False):
        model, fresh = tiny(), tiny()
        fresh.reset_classifier(0)
        if early:
            model.reset_classifier(0)
        adapter = move(unilora_timm.attach(model))
        if not early:
            model.reset_classifier(0)
        assert len(adapter.parameter_groups(1e-3)) == 1
        assert model(images).shape == (4, 32)
        adapter.save(tmp_path / "adapter.safetensors")
        unilora_timm.load(fresh, tmp_path / "adapter.safetensors")
        assert torch.equal(fresh(images), model(images))


def test_a_classifier_that_comes_later_is_saved_when_it_is_named(tiny, images, tmp_path):
    model, fresh = tiny(), tiny()
    for each in (model, fresh):
        each.reset_classifier(0)
    adapter = unilora_timm.attach(model, modules_to_save=["head"])
    for each in (model, fresh):
        each.reset_classifier(3)
    train(model)
    adapter.save(tmp_path / "adapter.safetensors")
    unilora_timm.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(images), model(images))


def test_both_heads_of_a_distilled_model_train(adapted, images):
    model = adapted("deit_tiny_distilled_patch16_224")
    model.set_distilled_training(True)
    _, (of_head, _, of_other, _, of_theta) = gradients(model, images)
    assert of_head.any()
    assert of_other.any()
    assert of_theta.any()
    assert model.get_classifier() == (model.head, model.head_dist)


# ---- features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, BEIT, SWIN])
def test_forward_features_and_forward_head_are_the_forward_pass(adapted, images, name):
    """They do not go through the model's own `__call__`, so each target projects its factors alone."""
    model = adapted(name)
    theta_d = model.unilora.theta_d
    expected = model(images)
    found = model.forward_head(model.forward_features(images))
    assert torch.equal(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), theta_d)[0]
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), theta_d)[0], wanted, rtol=1e-4, atol=1e-6)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(features), expected)


@pytest.mark.parametrize("name", [VIT, BEIT, SWIN])
def test_intermediate_features_are_those_of_the_merged_model(adapted, images, name):
    model = adapted(name)
    found = model.forward_intermediates(images, indices=1)
    with model.unilora.disabled():
        base = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert not torch.allclose(found[1][0], base[0], rtol=1e-2)
    assert torch.autograd.grad(found[1][0].sum(), model.unilora.theta_d)[0].any()
    model.unilora.merge()
    torch.testing.assert_close(found, model.forward_intermediates(images, indices=1), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_model_alone(adapted):
    model = adapted()
    tokens = torch.randn(2, 17, 32)
    found = model.blocks[1](tokens)
    model.unilora.merge()
    torch.testing.assert_close(found, model.blocks[1](tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_a_backbone_of_features_only(tiny, images, move, name):
    model = tiny(name, num_classes=None, features_only=True, out_indices=(0, 1))
    adapter = move(unilora_timm.attach(model))
    found = model(images)
    assert torch.autograd.grad(sum(part.sum() for part in found), adapter.theta_d)[0].any()
    adapter.merge()
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)


# ---- training: memory, chance, precision ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, BEIT, SWIN])
def test_gradient_checkpointing_with_dropped_paths(adapted, images, name):
    """The recomputed forward pass draws what the first one drew."""
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2}
    plain, saving = adapted(name, **rates), adapted(name, **rates)
    saving.set_grad_checkpointing()
    torch.testing.assert_close(gradients(saving, images), gradients(plain, images), rtol=1e-5, atol=1e-6)
    assert any(gradient.any() for gradient in gradients(saving, images)[1])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpoints_are_refused(tiny, images, tmp_path):
    """Their inputs need no gradient in a frozen model, so θ_d would get none, and the head alone would train."""
    model = tiny().train()
    adapter = unilora_timm.attach(model)
    adapter.save(tmp_path / "a.safetensors")
    model.set_grad_checkpointing()
    loaded = tiny().train()
    loaded.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "unilora" not in name})
    unilora_timm.load(loaded, tmp_path / "a.safetensors")
    loaded.set_grad_checkpointing()
    timm.layers.set_reentrant_ckpt(True)
    try:
        for each in (model, loaded):
            with pytest.raises(TargetError, match=r"reentrant.*timm.layers.set_reentrant_ckpt\(False\)"):
                each(images)
        with torch.no_grad():
            assert torch.equal(model(images), loaded(images))
    finally:
        timm.layers.set_reentrant_ckpt(False)
    model(images).sum().backward()
    assert adapter.theta_d.grad.any()
    adapter.detach()
    timm.layers.set_reentrant_ckpt(True)
    try:
        model(images)
    finally:
        timm.layers.set_reentrant_ckpt(False)


def test_an_adapter_draws_no_random_number(tiny, images):
    """A new adapter changes nothing, also where paths and values are dropped at random."""
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_rate": 0.1}
    found = []
    for adapt in (False, True):
        model = tiny(**rates).train()
        if adapt:
            unilora_timm.attach(model)
        torch.manual_seed(3)
        found.append((model(images), torch.rand(3)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.traces
def test_a_compiled_model_has_the_same_gradients(adapted, images):
    """As train.py's --torchcompile does it: attach, then compile the whole model."""
    torch.compiler.reset()
    model = adapted(BEIT, depth=1)
    compiled = torch.compile(model, backend="eager")
    expected = gradients(model, images)
    torch.testing.assert_close(gradients(compiled, images), expected, rtol=1e-4, atol=1e-5)
    assert timm.utils.unwrap_model(compiled) is model
    assert list(timm.utils.get_state_dict(compiled)) == list(model.state_dict())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", [VIT, BEIT])
def test_mixed_precision(adapted, images, name, dtype, tolerance):
    """The steps of timm's NativeScaler: autocast, a scaled loss, clipped gradients; θ_d stays float32."""
    model = adapted(name)
    theta_d = model.unilora.theta_d
    wanted = torch.autograd.grad(F.cross_entropy(model(images), LABELS), theta_d)[0]
    scaler, optimizer = (
        torch.amp.GradScaler("cpu", init_scale=64.0),
        torch.optim.SGD(model.unilora.parameter_groups(1e-2)),
    )
    start = theta_d.detach().clone()
    with torch.autocast("cpu", dtype):
        logits = model(images)
        loss = F.cross_entropy(logits, LABELS)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = theta_d.grad.clone()
    timm.utils.dispatch_clip_grad([theta_d], value=1.0)
    scaler.step(optimizer)
    scaler.update()
    assert logits.dtype == dtype
    assert found.dtype == theta_d.dtype == torch.float32
    assert (found - wanted).norm() < tolerance * wanted.norm()
    assert not torch.equal(theta_d, start)


@pytest.mark.parametrize(("name", "targets"), [(VIT, None), ("convnext_tiny", "mlp"), ("pvt_v2_b0", None)])
def test_channels_last(adapted, images, name, targets):
    model = adapted(name, targets)
    expected = model(images)
    formats = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _a, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    model.to(memory_format=torch.channels_last)
    found = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert formats
    assert all(formats)


# ---- optimisers and schedules -----------------------------------------------------------------------------------

OPTIMIZERS = ["sgd", "adamw", "nadamw", "lamb", "lars", "lion", "adafactor", "adopt", "muon", "lookahead_adamw"]


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_timms_optimizers_take_the_two_groups(adapted, images, opt):
    model = adapted()
    adapter = model.unilora
    start = adapter.theta_d.detach().clone(), model.head.weight.detach().clone()
    optimizer = create_optimizer_v2(adapter.parameter_groups(1e-3, 5e-4), opt=opt, lr=1.0, weight_decay=0.05)
    theta, head = optimizer.param_groups
    assert (theta["lr"], theta["weight_decay"]) == (adapter.learning_rate(1e-3), 0.0)
    assert (head["lr"], head["weight_decay"]) == (5e-4, 0.05)
    for _ in range(2):  # the first step of ADOPT moves nothing
        F.cross_entropy(model(images), LABELS).backward()
        optimizer.step()
    assert not torch.equal(adapter.theta_d, start[0])
    assert not torch.equal(model.head.weight, start[1])
    assert torch.isfinite(adapter.theta_d).all()


def test_a_head_whose_bias_does_not_decay(adapted):
    """timm's own rule for the head: `param_groups_weight_decay` on the classifier, beside θ_d's group."""
    model = adapted()
    theta, _ = model.unilora.parameter_groups(1e-3)
    head = param_groups_weight_decay(model.get_classifier(), weight_decay=0.05)
    groups = create_optimizer_v2([theta, *head], opt="adamw", lr=5e-4).param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (model.unilora.learning_rate(1e-3), 0.0, 1),
        (5e-4, 0.0, 1),
        (5e-4, 0.05, 1),
    ]


@pytest.mark.parametrize("name", [VIT, BEIT, SWIN, "cait_xxs24_224", "pvt_v2_b0"])
def test_layer_decay_of_the_whole_model_gives_theta_d_the_rate_of_the_head(adapted, name):
    """`create_optimizer_v2(model, …)` knows one rate: θ_d is in the last layer, undecayed, at the head's rate."""
    model = adapted(name)
    for groups in (
        param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=()),
        create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups,
    ):
        of_theta = [group for group in groups if any(p is model.unilora.theta_d for p in group["params"])]
        assert [(group["lr_scale"], group["weight_decay"]) for group in of_theta] == [(1.0, 0.0)]
        assert {group["lr_scale"] for group in groups} == {1.0}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for group in groups for p in group["params"]} == trained


def test_a_schedule_keeps_the_ratio_of_the_rates(adapted):
    """timm's warm-up and its end are absolute rates: at zero they keep the ratio, elsewhere they are both groups'."""
    adapter = adapted().unilora
    ratio = adapter.learning_rate(1e-3) / 5e-4

    def rates(**schedule):
        optimizer = create_optimizer_v2(adapter.parameter_groups(1e-3, 5e-4), opt="adamw")
        cosine = timm.scheduler.CosineLRScheduler(optimizer, t_initial=10, warmup_t=3, **schedule)
        for epoch in range(11):
            cosine.step(epoch)
            yield tuple(group["lr"] for group in optimizer.param_groups)

    first, *others = rates(warmup_lr_init=0.0)
    assert first == (0.0, 0.0)
    assert [theta / head for theta, head in others[:-1]] == pytest.approx([ratio] * 9)
    assert max(theta for theta, _ in others) == pytest.approx(0.79 * adapter.learning_rate(1e-3), rel=0.01)
    first, *_, last = rates(warmup_lr_init=1e-5, lr_min=1e-6)
    assert (first, last) == ((1e-5, 1e-5), (1e-6, 1e-6))


def test_create_scheduler_v2(adapted):
    adapter = adapted().unilora
    optimizer = create_optimizer_v2(adapter.parameter_groups(1e-3, 5e-4), opt="adamw")
    schedule, epochs = timm.scheduler.create_scheduler_v2(
        optimizer, "cosine", num_epochs=4, warmup_epochs=1, warmup_lr=0.0, warmup_prefix=True
    )
    seen = []
    for epoch in range(epochs):
        schedule.step(epoch)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen[0] == [0.0, 0.0]
    assert seen[1] == pytest.approx([adapter.learning_rate(1e-3), 5e-4])
    assert all(theta / head == pytest.approx(seen[1][0] / seen[1][1]) for theta, head in seen[1:])


# ---- copies and averages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [timm.utils.ModelEmaV2, timm.utils.ModelEmaV3])
@pytest.mark.parametrize("name", [VIT, BEIT])
def test_an_average_has_a_theta_d_and_a_head_of_its_own(adapted, tiny, images, tmp_path, average, name):
    model = adapted(name)
    adapter = model.unilora
    theta_d, head = adapter.theta_d.detach().clone(), model.head.weight.detach().clone()
    ema = average(model, decay=0.5)
    with torch.no_grad():
        adapter.theta_d.add_(1.0)
        model.head.weight.add_(1.0)
    ema.update(model)
    averaged = ema.module.unilora
    assert averaged is not adapter
    torch.testing.assert_close(averaged.theta_d.detach(), theta_d + 0.5)
    torch.testing.assert_close(ema.module.head.weight.detach(), head + 0.5)

    expected = model(images)
    averaged.save(tmp_path / "ema.safetensors")
    with torch.no_grad():  # a model made from the file computes with the average; the trained one keeps its own
        fresh = tiny(name)
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if k in fresh.state_dict()})
        unilora_timm.load(fresh, tmp_path / "ema.safetensors")
        assert torch.equal(fresh(images), ema.module(images))
        assert not torch.allclose(ema.module(images), expected, rtol=1e-2)
        averaged.theta_d.zero_()
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", [VIT, BEIT])
def test_a_copy_comes_off_without_the_original(adapted, images, name, twin):
    model = adapted(name)
    expected, gradient = gradients(model, images)
    other = twin(model)
    torch.testing.assert_close(gradients(other, images), (expected, gradient), rtol=0, atol=0)
    other.unilora.detach(merge=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
    assert torch.equal(gradients(model, images)[0], expected)
    torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)


# ---- data, metrics, checkpoints ---------------------------------------------------------------------------------


def test_timms_loader_mixup_and_accuracy(adapted):
    model = adapted()
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == model.pretrained_cfg["mean"]
    config["input_size"] = (3, 32, 32)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
    for training in (True, False):
        ((images, labels),) = timm.data.create_loader(
            FakeData(size=6, image_size=(3, 40, 40), num_classes=3),
            batch_size=6,
            is_training=training,
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,
            **{key: config[key] for key in ("input_size", "interpolation", "mean", "std")},
        )
        if training:
            images, mixed = mixup(images, labels)
            timm.loss.SoftTargetCrossEntropy()(model(images), mixed).backward()
            assert model.unilora.theta_d.grad.any()
        else:
            logits = model(images)
            (top,) = timm.utils.accuracy(logits, labels)
            assert top.item() == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-3)


def test_checkpoints_of_timm(adapted, tiny, images, tmp_path):
    """timm's own saver writes the whole model with θ_d; it comes back into an equally adapted model, and only there."""
    model = adapted()
    optimizer = create_optimizer_v2(model.unilora.parameter_groups(1e-3), opt="adamw")
    ema = timm.utils.ModelEmaV3(model)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")

    again = tiny()
    unilora_timm.attach(again)
    timm.models.load_checkpoint(again, path)
    assert torch.equal(again(images), model(images))
    timm.models.resume_checkpoint(again, path, optimizer, log_info=False)

    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "unilora.theta_d"'):
        timm.models.load_checkpoint(tiny(), path)
    torch.save(tiny().state_dict(), tmp_path / "base.pth")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "unilora.theta_d"'):
        timm.models.load_checkpoint(again, str(tmp_path / "base.pth"))


def test_several_adapters_on_one_backbone(tiny, images, move, tmp_path):
    """A bank: each row of a batch runs through the adapter that it names, and through its head."""
    from unilora_torch import Bank

    alone = {}
    for seed, name in enumerate(("birds", "cars")):
        model = tiny()
        adapter = move(unilora_timm.attach(model, seed=seed))
        torch.nn.init.normal_(model.head.weight)
        adapter.save(tmp_path / name)
        alone[name] = model(images)
    base = tiny()
    alone[None] = base(images)
    bank = Bank(base)
    bank.add("birds", tmp_path / "birds")
    bank.add("cars", tmp_path / "cars")
    rows = ["cars", None, "birds", "cars"]
    with torch.no_grad(), bank.rows(rows):
        found = base(images)
    torch.testing.assert_close(found, torch.stack([alone[name][i] for i, name in enumerate(rows)]))
