"""The blocks q, k and v of a fused layer are what they are called, in every kind of attention that timm has."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from unilora_core import TargetError
from unilora_timm import find_targets
from unilora_timm.attach import example_of

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
ONES = {"depths": (1, 1, 1, 1)}
MEMBERS = {  # name → changes, and a size of image where the model takes any
    "beit_base_patch16_224": VIT,
    "botnet26t_256": {"img_size": 64, "size": 64},
    "cait_xxs24_224": VIT,
    "caformer_s18": {"size": 64},
    "coat_lite_tiny": {"img_size": 64},
    "convit_tiny": {**VIT, "local_up_to_layer": 0},
    "crossvit_tiny_240": {},
    "davit_tiny": {**ONES, "embed_dims": (24, 24, 48, 96), "num_heads": (1, 2, 2, 2), "size": 64},
    "edgenext_xx_small": {"size": 64},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": VIT,
    "fastvit_sa12": {"layers": (1, 1, 1, 1), "size": 64},
    "gcvit_xxtiny": {"img_size": 64, "size": 64},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 24},
    "hieradet_small": {"stages": (1, 1, 2, 1), "embed_dim": 24, "global_att_blocks": (3,)},
    "lambda_resnet26t": {"size": 128},
    "mobilevit_xxs": {"size": 64},
    "mvitv2_tiny": {"img_size": 64, "size": 64},
    "naflexvit_base_patch16_map": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "nest_tiny": {},
    "pit_ti_224": {},
    "pvt_v2_b0": {**ONES, "size": 64},
    "samvit_base_patch16_224": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "shvit_s1": {"size": 128},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, **ONES},
    "swinv2_tiny_window8_256": {"embed_dim": 24, **ONES},
    "swinv2_cr_tiny_224": {"embed_dim": 24, **ONES},
    "tnt_s_patch16_224": {"depth": 1},
    "twins_svt_small": {**ONES, "size": 64},
    "visformer_tiny": {"img_size": 64, "size": 64},
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_base_patch16_xp_224": VIT,
    "vit_dwee_patch16_reg1_gap_256": VIT,
    "vit_dpwee_patch16_reg1_gap_256": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "volo_d1_224": {"img_size": 64, "size": 64},
    "xcit_nano_12_p16_224": {"depth": 1, "size": 64},
}
BY_HEAD = {  # every head's parts lie together: there are no such blocks
    "coatnet_nano_rw_224": {},
    "eca_halonext26ts": {},
    "efficientformer_l1": {},
    "efficientvit_b0": {},
    "levit_128s": {},
    "levit_conv_128s": {},
    "maxvit_pico_rw_256": {},
    "tiny_vit_5m_224": {},
}
OWN_NAMES = {"ChannelAttention", "MultiScaleAttention", "LinearSelfAttention"}
"""Attention whose output tells less: affine in q (DaViT), of a normalised v (MViTv2), with a ReLU (MobileViT v2)."""


def make(name, size=None, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **changes).eval()
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # so that it calls its layer
    shape = example_of(model).shape if size is None else (1, 3, size, size)
    return model, torch.randn(2, *shape[1:])


def fused(model):
    """Layer → attention, and its blocks by word; one layer of each class of attention."""
    found = {}
    for word in ("q", "k", "v"):
        for target in find_targets(model, word):
            if target.name == f"{target.module}.{word}":
                found.setdefault(target.module, {})[word] = target
    classes = {}
    for layer, blocks in found.items():
        inner = layer
        while inner.endswith((".conv", ".linear", ".c")) or inner.rpartition(".")[2].isdigit():
            inner = inner.rpartition(".")[0]
        attention = model.get_submodule(inner.rpartition(".")[0])
        classes.setdefault((type(attention), *blocks), (layer, attention, blocks))
    return classes.values()


class Watch(TorchFunctionMode):
    """Keeps the query, key and value of the first `scaled_dot_product_attention`."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and not self.arguments:
            self.arguments = [tensor.clone() for tensor in args[:3]]
        return func(*args, **(kwargs or {}))


def outcome(layer, attention, given, change):
    """What the attention gives (before its ``proj``), and what it attends with, when ``change`` acts on its layer."""
    seen = []
    handles = [layer.register_forward_hook(lambda _m, _a, output: change(output.clone()))]
    if isinstance(proj := getattr(attention, "proj", None), nn.Module):
        handles.append(proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
    with torch.no_grad(), Watch() as watch:
        output = attention(*given[0], **given[1])
    for handle in handles:
        handle.remove()
    output = seen[0] if seen else output
    return (output[0] if isinstance(output, tuple) else output), watch.arguments


def added(target, rows, size, single=False):
    """Adds to a block of outputs: noise, or much to one number of the first image."""

    def change(output):
        axis = 1 if output.dim() == 4 and output.shape[1] == rows else -1
        block = output.movedim(axis, -1)[..., target.first_row : target.first_row + target.out_features]
        if single:
            block[(0,) * block.dim()] += size
        else:
            block += size * torch.randn(block.shape, generator=torch.Generator().manual_seed(3))
        return output

    return change


@pytest.mark.parametrize("name", MEMBERS)
def test_blocks(name):
    model, images = make(name, **MEMBERS[name])
    found = list(fused(model))
    assert found
    for path, attention, blocks in found:
        layer, given = model.get_submodule(path), []
        handle = attention.register_forward_pre_hook(lambda _m, *both, to=given: to.append(both), with_kwargs=True)
        with torch.no_grad():
            model(images)
        handle.remove()
        rows = layer.weight.shape[0]
        plain, arguments = outcome(layer, attention, given[0], lambda output: output)
        if arguments:
            for word, target in blocks.items():
                _, changed = outcome(layer, attention, given[0], added(target, rows, 1.0))
                assert [not torch.equal(*pair) for pair in zip(arguments, changed, strict=True)] == [
                    word == which for which in "qkv"
                ], path
        elif type(attention).__name__ not in OWN_NAMES:
            prove_by_output(layer, attention, given[0], blocks, plain)


def prove_by_output(layer, attention, given, blocks, plain):
    """The output is affine in v and not in k; one number of q reaches fewer outputs than one of k."""
    rows, bent, reach = layer.weight.shape[0], {}, {}
    for word, target in blocks.items():
        once, twice = (outcome(layer, attention, given, added(target, rows, size))[0] - plain for size in (1.0, 2.0))
        bent[word] = ((twice - 2 * once).abs().max() / once.abs().max()).item()
        alone, _ = outcome(layer, attention, given, added(target, rows, 5.0, single=True))
        reach[word] = (alone != plain).float().mean().item()
    assert bent.get("v", 0) < 1e-4 < bent.get("k", 1), (type(attention), bent, reach)
    assert "q" not in reach or reach["q"] < reach["k"], (type(attention), bent, reach)


@pytest.mark.parametrize("name", BY_HEAD)
def test_heads_are_not_taken_for_blocks(name):
    model, _ = make(name, **BY_HEAD[name])
    layers = dict(model.named_modules())
    for word in ("q", "k", "v"):
        own = [name for name in layers if re.fullmatch(rf".*\.{word}(\.(conv|linear|ln|c|\d))*", name)]
        if own:  # a q of its own beside a fused kv
            assert all(target.name in layers for target in find_targets(model, word))
        else:
            with pytest.raises(TargetError, match="keeps each head's q, k and v together"):
                find_targets(model, word)
