"""Which layers each family adapts, by default and by word; what is refused, and how."""

import pytest
import timm
import torch
from packaging.version import Version

import unilora_timm
from unilora_core import TargetError
from unilora_timm import classifier, find_targets

DEFAULT = {  # the targets of the first adapted layers, as (name, first_row, out_features)
    "vit_tiny_patch16_224": [("blocks.0.attn.qkv.q", 0, 32), ("blocks.0.attn.qkv.v", 64, 32)],
    "deit_tiny_distilled_patch16_224": [("blocks.0.attn.qkv.q", 0, 32), ("blocks.0.attn.qkv.v", 64, 32)],
    "swin_tiny_patch4_window7_224": [("layers.0.blocks.0.attn.qkv.q", 0, 16), ("layers.0.blocks.0.attn.qkv.v", 32, 16)],
    "eva02_base_patch14_224": [("blocks.0.attn.q_proj", 0, 32), ("blocks.0.attn.v_proj", 0, 32)],
    "pvt_v2_b0": [("stages.0.blocks.0.attn.q", 0, 8), ("stages.0.blocks.0.attn.kv.v", 8, 8)],
    "tnt_s_patch16_224": [("blocks.0.attn_in.qk.q", 0, 24), ("blocks.0.attn_in.v", 0, 24)],
    "mixer_s16_224": [("blocks.0.mlp_tokens.fc1", 0, 256), ("blocks.0.mlp_tokens.fc2", 0, 4)],
    "convnext_tiny": [("stages.0.blocks.0.mlp.fc1", 0, 32), ("stages.0.blocks.0.mlp.fc2", 0, 8)],
    "tiny_vit_5m_224": [("stages.1.blocks.0.attn.qkv", 0, 96), ("stages.2.blocks.0.attn.qkv", 0, 192)],
    "maxvit_tiny_rw_224": [("stages.0.blocks.0.attn_block.attn.qkv", 0, 96)],
}


@pytest.mark.parametrize("name", DEFAULT)
def test_default_targets_of_each_family(tiny, name):
    adapter = unilora_timm.attach(tiny(name))
    found = [(target.name, target.first_row, target.out_features) for target in adapter.targets]
    assert found[: len(DEFAULT[name])] == DEFAULT[name]
    assert all("head" not in target.module for target in adapter.targets)


def test_a_fused_layer_of_key_and_value_only(tiny):
    first, *_, last = find_targets(tiny("gcvit_xxtiny"))
    assert (first.name, first.first_row, first.out_features) == ("stages.0.blocks.0.attn.qkv.q", 0, 64)
    assert (last.name, last.first_row, last.out_features) == ("stages.3.blocks.1.attn.qkv.v", 512, 512)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("qkv", ["attn.qkv"]),
        ("q", ["attn.qkv.q"]),
        ("k", ["attn.qkv.k"]),
        (["v", "k"], ["attn.qkv.k", "attn.qkv.v"]),
        ("proj", ["attn.proj"]),
        ("fc1", ["mlp.fc1"]),
        ("fc2", ["mlp.fc2"]),
        ("mlp", ["mlp.fc1", "mlp.fc2"]),
        (["mlp", "fc1"], ["mlp.fc1", "mlp.fc2"]),
        ("all-linear", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
        (["attn.qkv", "fc2"], ["attn.qkv", "mlp.fc2"]),
        (r"blocks\.\d\.attn\.(qkv|proj)", ["attn.qkv", "attn.proj"]),
    ],
)
def test_words_patterns_and_endings(tiny, targets, expected):
    found = [target.name for target in find_targets(tiny(), targets)]
    assert found == [f"blocks.{block}.{name}" for block in (0, 1) for name in expected]


@pytest.mark.parametrize(
    ("name", "changes", "targets", "first", "count"),
    [
        ("vit_tiny_patch16_224", {}, "patch_embed", "patch_embed.proj", 1),
        ("vit_tiny_patch16_224", {}, "conv", "patch_embed.proj", 1),
        ("vit_base_patch16_siglip_224", {}, ["q"], "blocks.0.attn.qkv.q", 3),
        ("vit_base_patch16_siglip_224", {}, r"attn_pool\.(q|kv|proj)", "attn_pool.q", 3),
        ("resnet18", {}, None, "conv1", 20),
        ("resnet18", {}, "patch_embed", "conv1", 1),
        ("convnext_tiny", {}, "conv", "stem.0", 8),
        ("convnext_tiny", {}, "patch_embed", "stem.0", 1),
        ("levit_128s", {}, "qkv", "stages.0.blocks.0.attn.qkv.linear", 9),
        ("levit_128s", {}, "fc1", "stages.0.blocks.0.mlp.ln1.linear", 11),
        ("efficientvit_m0", {}, "v", "stages.0.blocks.0.mixer.m.attn.qkvs.0.conv.v", 24),
        ("poolformer_s12", {}, None, "stages.0.blocks.0.mlp.fc1", 24),
        ("vit_dpwee_patch16_reg1_gap_256", {}, "mlp", "blocks.0.in_proj.fc1", 16),
        ("resnet50_clip", {}, None, "stem.conv1.conv", 58),  # its attention only pools
        ("resnet50_clip", {}, "q", "head.q", 1),
    ],
)
def test_words_mean_the_same_in_other_families(tiny, name, changes, targets, first, count):
    if name == "resnet50_clip" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm's own get_classifier fails on this model before 1.0.31")
    model = tiny(name, **changes)
    found = find_targets(model, targets)
    assert (found[0].name, len(found)) == (first, count)


def test_squeeze_and_excitation_is_no_mlp():
    with pytest.raises(TargetError, match=r"'mlp' selects nothing in RegNet.*patch_embed, conv\."):
        find_targets(timm.create_model("regnety_002"), "mlp")


@pytest.mark.parametrize("targets", [None, "all-linear", ["q", "v", "mlp"], r".*(fc1|qkv)"])
def test_exclude(tiny, targets):
    found = find_targets(tiny(), targets, exclude=["blocks.0.attn.qkv", "fc1"])
    assert found
    assert not {"blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"} & {target.module for target in found}


def test_targets_made_by_hand_are_taken_as_they_are(tiny):
    by_hand = find_targets(tiny(), "k")
    assert unilora_timm.attach(tiny(), by_hand).targets == by_hand


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("vit_tiny_patch16_224", "qvk", r"no module matches 'qvk'.*this model has q, k, v, qkv, proj, fc1"),
        ("vit_tiny_patch16_224", ["q", "fc9"], r"no module matches .*'fc9'.*nearest.*fc2.*Known words: q, k, v"),
        ("vit_tiny_patch16_224", ["blocks.0.norm1"], r"blocks.0.norm1: a LayerNorm is no linear layer"),
        ("vit_tiny_patch16_224", ["qkv", "v"], r"adapt the same outputs of blocks.0.attn.qkv"),
        ("mixer_s16_224", "q", r"'q' selects nothing in MlpMixer.*this model has fc1, fc2, mlp, patch_embed"),
        ("maxvit_tiny_rw_224", "v", r"keeps each head's q, k and v together.*this model has qkv, proj"),
        (
            "resnet18",
            "mlp",
            r"'mlp' selects nothing in ResNet. Known words: .*this model has patch_embed, conv\.",
        ),
        ("resnet18", "all-linear", r"'all-linear' selects nothing in ResNet.*this model has patch_embed, conv\."),
    ],
)
def test_refused_targets(tiny, name, targets, message):
    model = tiny(name)
    with pytest.raises(TargetError, match=message):
        unilora_timm.attach(model, targets)
    assert not hasattr(model, "unilora")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("swin_tiny_patch4_window7_224", ("head.fc",)),
        ("convnext_tiny", ("head.fc",)),
        ("resnet18", ("fc",)),
    ],
)
def test_classifier(tiny, name, expected):
    assert classifier(tiny(name)) == expected
    assert classifier(tiny(name, num_classes=0)) == ()


def test_a_feature_extractor_has_no_module_to_save(tiny):
    adapter = unilora_timm.attach(tiny(num_classes=0))
    assert adapter.modules_to_save == ()
    assert [name for name, p in adapter.model.named_parameters() if p.requires_grad] == ["unilora.theta_d"]


def test_a_dead_layer_is_refused_and_what_is_zero_is_named(tiny):
    model = tiny()
    torch.nn.init.zeros_(model.blocks[1].attn.proj.weight)
    with pytest.raises(TargetError, match=r"blocks.1.attn.qkv.q: no gradient .*\(2 such") as caught:
        unilora_timm.attach(model)
    assert "blocks.1.attn.proj.weight is all zeros (1 such parameters)" in str(caught.value)
    assert "load its weights before attach" in str(caught.value)
    assert not hasattr(model, "unilora")


def test_a_classifier_of_zeros_is_no_dead_layer(tiny, images):
    model = tiny(weight_init="jax")
    assert not model.head.weight.any()
    unilora_timm.attach(model)
    assert not model.head.weight.any()
    assert not model.head._forward_hooks
    assert model(images).shape == (4, 3)


def test_the_check_leaves_modes_random_numbers_and_statistics_alone(tiny):
    model = tiny("tiny_vit_5m_224").train()
    model.stages[1].eval()
    before = [(module.training, getattr(module, "num_batches_tracked", None)) for module in model.modules()]
    torch.manual_seed(5)
    adapter = unilora_timm.attach(model)
    drawn = torch.rand(3)
    after = [
        (module.training, getattr(module, "num_batches_tracked", None))
        for module in model.modules()
        if module is not adapter
    ]
    assert before == after
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert adapter.theta_d.grad is None


@pytest.mark.parametrize("size", [{"in_chans": 1}, {"img_size": (32, 16), "in_chans": 4}, {"dynamic_img_size": True}])
def test_the_check_finds_an_input_that_fits(tiny, size):
    assert unilora_timm.attach(tiny(**size)).active


def test_a_model_that_needs_another_input_says_so(tiny):
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 2))
    with pytest.raises(TargetError, match=r"fails on an image of shape \(1, 3, 224, 224\).*example="):
        unilora_timm.attach(model)
    adapter = unilora_timm.attach(model, example=torch.randn(2, 5))
    assert [target.name for target in adapter.targets] == ["0", "1"]


def test_no_grad_around_attach(tiny, images):
    with torch.no_grad():
        model = tiny()
        adapter = unilora_timm.attach(model)
    model(images).sum().backward()
    assert adapter.theta_d.grad.any()


def test_every_layer_of_timms_default_vit_is_reached():
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    assert unilora_timm.attach(model).summary().startswith("θ_d: ")
