"""Gradient checkpointing: the gradient is that without it, in both modes, or there is an error before training."""

import copy
import functools
from collections import UserDict

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import unilora_torch
import unilora_transformers
from unilora_core import TargetError
from unilora_transformers.checkpointing import tracked

CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
"""transformers 5.23 renamed it."""
REENTRANT = functools.partial(checkpoint, use_reentrant=True)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
STAGES = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "image_size": 32, "patch_size": 4}
SPEECH = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "input_feat_per_channel": 8}
SPEECH |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
MODELS = {  # class: config
    "SwinForImageClassification": STAGES | {"window_size": 4},
    "Swinv2ForImageClassification": STAGES | {"window_size": 4},
    "DonutSwinModel": STAGES | {"window_size": 4},
    "Data2VecVisionForImageClassification": TINY | {"image_size": 32, "patch_size": 8},
    "BeitForImageClassification": TINY | {"image_size": 32, "patch_size": 8},
    "HieraForImageClassification": {
        "image_size": [64, 64],
        "embed_dim": 16,
        "depths": [1] * 4,
        "num_heads": [1, 1, 2, 2],
    },
    "TimesformerForVideoClassification": TINY | {"image_size": 16, "patch_size": 8, "num_frames": 2},
    "SegformerForImageClassification": {"depths": [1] * 4, "hidden_sizes": [8, 16, 40, 64], "decoder_hidden_size": 16},
    "PvtV2ForImageClassification": {"depths": [1] * 4, "hidden_sizes": [8, 16, 40, 64], "image_size": 64},
    "Speech2TextForConditionalGeneration": SPEECH | {"conv_channels": 16, "max_source_positions": 32},
}
IMAGE = (torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64) / 7).sin()


def enable(model, reentrant):
    getattr(model, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": reentrant})


def disable(model):
    getattr(model, f"{CHECKPOINTING}_checkpointing_disable")()


def build(name, **changes):
    """A tiny model without dropout, training."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**MODELS[name] | changes)).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():  # what is handed to functions
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    return model


def inputs_of(model):
    if type(model).__name__.startswith("Speech2Text"):
        ids = torch.tensor([[5, 6, 7]])
        return {"input_features": IMAGE[0, 0, :32, :8][None], "decoder_input_ids": ids, "use_cache": False}
    if type(model).__name__.startswith("Timesformer"):
        return {"pixel_values": IMAGE[:, :, :16, :16][None]}
    size = model.config.image_size if hasattr(model.config, "image_size") else 64
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": IMAGE[:, :, :size, :size]}


def gradient(model, **inputs):
    """That of θ_d."""
    theta_d = model.unilora.theta_d
    theta_d.grad = None
    output = model(**inputs)[0].float()
    (output * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
    assert theta_d.grad is not None, "no gradient came to θ_d"
    return theta_d.grad.clone()


def agree(model, inputs, rtol=1e-4):
    """Without checkpointing, with it in both modes, and again without."""
    expected = gradient(model, **inputs)
    assert expected.any()
    close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=rtol * expected.abs().max().item())
    for reentrant in (True, False, True):
        enable(model, reentrant)
        close(gradient(model, **inputs), expected)
    disable(model)
    close(gradient(model, **inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_same(name, train):
    """Swin's embeddings give a tuple; SegFormer has them in each stage; Speech2Text's first layer got no gradient."""
    model = build(name)
    train(unilora_transformers.attach(model, "all-linear", modules_to_save=(), example=inputs_of(model)))
    agree(model, inputs_of(model))


@pytest.mark.parametrize("name", ["SegformerForImageClassification", "Speech2TextForConditionalGeneration"])
def test_the_gradient_is_the_same_in_half_precision(name, train):
    model = build(name).to(torch.bfloat16)
    inputs = {key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
              for key, value in inputs_of(model).items()}  # fmt: skip
    train(unilora_transformers.attach(model, modules_to_save=(), example=inputs))
    agree(model, inputs, rtol=0.05)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration", "CLIPModel"])
def test_an_encoder_that_a_decoder_reads_by_keyword(tiny, ids, train, name):
    model = tiny(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(vars(module).get(key), float):
                setattr(module, key, 0.0)
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    if name == "CLIPModel":
        inputs = {"input_ids": ids, "pixel_values": IMAGE[:, :, :16, :16]}
    train(unilora_transformers.attach(model, example=inputs))
    agree(model, inputs)


def test_layers_below_the_first_target_and_above_the_last(tiny, ids, train):
    """Nothing in them is trained; PyTorch refuses a backward pass through such a checkpoint."""
    model = tiny("LlamaForCausalLM", num_hidden_layers=3).train()
    train(unilora_transformers.attach(model, ["layers.1.self_attn.q_proj"]))
    agree(model, {"input_ids": ids, "use_cache": False})


def test_an_inner_model_called_alone(tiny, ids):
    """As trainers do that compute logits of a few positions themselves."""
    model = tiny("LlamaForCausalLM").train()
    adapter = unilora_transformers.attach(model)
    enable(model, reentrant=True)
    model.model(input_ids=ids, use_cache=False)[0].sum().backward()
    assert adapter.theta_d.grad.any()


def test_only_a_head_trains_while_the_adapter_is_off(tiny, ids):
    model = tiny("LlamaForCausalLM").train()
    adapter = unilora_transformers.attach(model)
    enable(model, reentrant=True)
    model.lm_head.weight.requires_grad_(True)
    unilora_torch.switch(model, ())
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert model.lm_head.weight.grad.any()
    assert adapter.theta_d.grad is None


def functions(model):
    return {
        name: vars(each).get("_gradient_checkpointing_func")
        for name, each in model.named_modules()
        if "unilora" not in name
    }


def test_non_reentrant_checkpointing_is_left_alone_and_detach_leaves_no_trace(tiny, ids):
    model = tiny("LlamaForCausalLM").train()
    adapter = unilora_transformers.attach(model)
    enable(model, reentrant=False)
    before = functions(model)
    gradient(model, input_ids=ids)
    assert functions(model) == before
    enable(model, reentrant=True)
    before = functions(model)
    gradient(model, input_ids=ids)
    assert functions(model) != before
    adapter.detach()
    assert functions(model) == before


def test_a_copy_trains_by_itself(tiny, ids):
    model = tiny("LlamaForCausalLM").train()
    unilora_transformers.attach(model)
    enable(model, reentrant=True)
    expected = gradient(model, input_ids=ids, use_cache=False)
    twin = copy.deepcopy(model)
    model.unilora.theta_d.grad = None
    torch.testing.assert_close(gradient(twin, input_ids=ids, use_cache=False), expected)
    assert model.unilora.theta_d.grad is None


# ---- the function itself -------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """What reentrant checkpointing loses: tensors in keywords, in tuples, in dicts, and outputs inside of others."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x, pair, state=None, sizes=None):
        y = (x * self.weight + pair[0] * state["scale"]).tanh()
        return {"y": y, "inner": (y * pair[1], sizes)}


def passes(run):
    """Outputs and gradients of a pass through two layers, with leaves that no positional argument holds."""
    layer, x = Layer(), torch.tensor([1.0, 2.0, 3.0])
    scale, first, second = (torch.tensor([value, 0.3, 0.7], requires_grad=True) for value in (0.2, 0.5, 0.9))
    output = run(functools.partial(layer.forward, state={"scale": scale * 2}, sizes=[3]), x, (first * 1, second * 1))
    output = run(functools.partial(layer.forward, state={"scale": scale * 2}), output["y"], output["inner"][:1] * 2)
    assert output["inner"][1] is None
    (output["y"] * output["inner"][0]).sum().backward()
    return [each.grad for each in (layer.weight, scale, first, second)]


def test_every_tensor_counts():
    expected = passes(lambda function, *args: function(*args))
    assert all(grad.any() for grad in expected)
    for grad, plain in zip(passes(functools.partial(tracked, "here", REENTRANT)), expected, strict=True):
        torch.testing.assert_close(grad, plain)


def test_a_tensor_given_twice_stays_one():
    seen = []

    def layer(query, key):
        seen.append(query is key)
        return query * key

    x = torch.ones(3, requires_grad=True)
    doubled = x * 2
    tracked("here", REENTRANT, functools.partial(layer, key=doubled), doubled).sum().backward()
    assert seen == [True, True]
    torch.testing.assert_close(x.grad, torch.full((3,), 8.0))


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_layer_that_writes_into_an_argument_is_refused(kind):
    """As Gemma 4's layers hand on their keys and values: what they write has no gradient in this mode."""

    def layer(x, shared):
        shared["keys"] = x * 2
        return x + 1

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(TargetError, match=r"Model\.layers\.0.*hands tensors on.*\{'use_reentrant': False\}"):
        tracked("Model.layers.0", REENTRANT, functools.partial(layer, shared=kind()), x)


def test_in_place_changes_of_an_output_are_possible():
    x = torch.ones(3)
    weight = torch.ones(3, requires_grad=True)
    out = tracked("here", REENTRANT, lambda given: given * weight, x)
    out += 1
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x)
