"""What is adapted and what trains in full, by default and on request; what is refused."""

import pytest
import torch
import transformers
from torch import nn

import unilora_transformers
from unilora_core import SpecError, TargetError
from unilora_torch import Target

Q_PROJ, QUERY = {"q_proj", "v_proj"}, {"query", "value"}
FAMILIES = [
    ("BartForConditionalGeneration", Q_PROJ, ()),
    ("BartForSequenceClassification", Q_PROJ, ("classification_head",)),
    ("BertForMaskedLM", QUERY, ()),
    ("BertForQuestionAnswering", QUERY, ("qa_outputs",)),
    ("BertForSequenceClassification", QUERY, ("classifier",)),
    ("BertForTokenClassification", QUERY, ("classifier",)),
    ("BertModel", QUERY, ()),
    ("BloomForCausalLM", {"query_key_value"}, ()),
    ("CLIPModel", Q_PROJ, ()),
    ("DebertaV2ForSequenceClassification", {"query_proj", "value_proj"}, ("pooler", "classifier")),
    ("DistilBertForSequenceClassification", {"q_lin", "v_lin"}, ("pre_classifier", "classifier")),
    ("GPT2ForSequenceClassification", {"q", "v"}, ("score",)),
    ("GPT2LMHeadModel", {"q", "v"}, ()),
    ("GPTNeoXForCausalLM", {"query_key_value"}, ()),
    ("LlamaForCausalLM", Q_PROJ, ()),
    ("LlamaForSequenceClassification", Q_PROJ, ("score",)),
    ("MistralForCausalLM", Q_PROJ, ()),
    ("MixtralForCausalLM", Q_PROJ, ()),
    ("OPTForCausalLM", Q_PROJ, ()),
    ("Phi3ForCausalLM", {"qkv_proj"}, ()),
    ("Qwen2ForCausalLM", Q_PROJ, ()),
    ("RobertaForSequenceClassification", QUERY, ("classifier",)),
    ("T5ForConditionalGeneration", {"q", "v"}, ()),
    ("ViTForImageClassification", (Q_PROJ, QUERY), ("classifier",)),
    ("WhisperForConditionalGeneration", Q_PROJ, ()),
]


@pytest.mark.parametrize(("name", "ends", "heads"), FAMILIES)
def test_defaults_of_each_family(tiny, name, ends, heads):
    """Every target is checked by a forward and a backward pass on made-up inputs (a warning would be an error)."""
    adapter = unilora_transformers.attach(tiny(name))
    found = {target.name.rsplit(".", 1)[-1] for target in adapter.targets}
    assert found in ends if isinstance(ends, tuple) else found == ends
    assert adapter.modules_to_save == heads
    assert not adapter.live.reached.never


@pytest.mark.parametrize("name", [row[0] for row in FAMILIES])
def test_all_linear_leaves_out_heads_and_output_embeddings(tiny, name):
    model = tiny(name)
    adapter = unilora_transformers.attach(model, "all-linear", modules_to_save=())
    output = model.get_output_embeddings()
    for target in adapter.targets:
        module = model.get_submodule(target.module)
        assert module is not output
        assert isinstance(module, nn.Linear) or target.transposed
        assert target.module.split(".")[0] not in {"classifier", "score", "qa_outputs", "lm_head", "pre_classifier"}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(adapter.targets) >= len(linear) - 3


def test_regex_list_exclude_and_targets(tiny):
    model = tiny("LlamaForCausalLM")

    def names(*args, **kwargs):
        adapter = unilora_transformers.attach(model, *args, **kwargs)
        adapter.detach()
        return [target.name.removeprefix("model.layers.") for target in adapter.targets]

    assert names(r"model\.layers\.1\..*\.[qk]_proj") == ["1.self_attn.q_proj", "1.self_attn.k_proj"]
    assert names(["o_proj"]) == ["0.self_attn.o_proj", "1.self_attn.o_proj"]
    assert names(exclude=r".*\.1\..*") == ["0.self_attn.q_proj", "0.self_attn.v_proj"]
    assert (
        names("all-linear", exclude=["mlp.up_proj", "self_attn.k_proj", "down_proj", "gate_proj", "o_proj"]) == names()
    )
    assert names([Target("x", "model.layers.0.mlp.up_proj", 32, 48)]) == ["x"]
    assert "lm_head" in names(["lm_head"])


def test_the_query_and_value_blocks_of_gpt2(tiny, ids, train):
    """The k block of the fused layer is as before."""
    model = tiny("GPT2LMHeadModel")
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 3, 32)
    before = layer(x)
    adapter = unilora_transformers.attach(model)
    train(adapter)
    changed = (layer(x) - before).abs().amax((0, 1)) > 0
    assert changed[:32].all()
    assert not changed[32:64].any()
    assert changed[64:].all()
    expected = model(ids).logits
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [None, "all-linear", ["c_attn", "mlp.c_proj"]])
def test_merged_conv1d(tiny, ids, train, targets):
    model = tiny("GPT2LMHeadModel")
    weight = model.transformer.h[1].attn.c_attn.weight.clone()
    adapter = unilora_transformers.attach(model, targets)
    train(adapter)
    expected = model(ids).logits
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    adapter.detach()
    assert torch.equal(model.transformer.h[1].attn.c_attn.weight, weight)


def test_no_head_on_request(tiny):
    model = tiny("BertForSequenceClassification")
    adapter = unilora_transformers.attach(model, modules_to_save=())
    assert adapter.modules_to_save == ()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["unilora.theta_d"]


def test_a_dead_target_is_an_error_and_the_model_is_as_before(tiny):
    """A layer that nothing calls, and whose weight nothing reads."""
    model = tiny("LlamaForCausalLM").train()
    model.model.layers[0].self_attn.spare = nn.Linear(32, 32)
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TargetError, match=r"spare.*never calls this module"):
        unilora_transformers.attach(model, "all-linear")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == state
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    unilora_transformers.attach(model, "all-linear", exclude=["spare"])


def test_a_target_without_gradient_is_an_error(tiny):
    model = tiny("LlamaForCausalLM")
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _module, _args, output: (output[0].detach(), *output[1:]))
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.o_proj: no gradient"):
        unilora_transformers.attach(model, ["o_proj"], example={"input_ids": torch.tensor([[5, 6, 7]])})
    assert not hasattr(model, "unilora")


def test_a_model_that_cannot_take_made_up_inputs_warns(tiny):
    def pairs_only(_module, _args, kwargs):
        if len(kwargs["input_ids"]) != 2:
            raise ValueError("pairs only")

    model = tiny("BertForSequenceClassification")
    model.register_forward_pre_hook(pairs_only, with_kwargs=True)
    with pytest.warns(UserWarning, match=r"ValueError\('pairs only'\).*unchecked; give attach a batch: example="):
        unilora_transformers.attach(model).detach()
    adapter = unilora_transformers.attach(model, example={"input_ids": torch.randint(3, 60, (2, 5))})
    assert not adapter.live.reached.never


def test_a_part_that_made_up_inputs_do_not_run_is_unchecked_and_named():
    """LLaVA-NeXT's vision tower wants tiles that fit its grids; text alone trains the model without it."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **small)
    text = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=4, **small)
    config = transformers.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=90)
    model = transformers.LlavaNextForConditionalGeneration(config)
    with pytest.warns(UserWarning, match=r"vision_tower.*do not run this part of the model \(2 such targets\)"):
        unilora_transformers.attach(model).detach()
    with pytest.raises(TargetError, match=r"vision_tower.*no gradient reaches θ_d through this target \(2 such\)"):
        unilora_transformers.attach(model, example={"input_ids": torch.tensor([[5, 6, 7]])})
    unilora_transformers.attach(model, exclude=".*vision_tower.*")


def test_tied_output_embeddings_are_refused(tiny):
    with pytest.raises(TargetError, match="lm_head: its weight is tied"):
        unilora_transformers.attach(tiny("LlamaForCausalLM", tie_word_embeddings=True), ["lm_head"])


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (TargetError, "nearest linear layers end in.*q_proj", {"targets": ["p_proj"]}),
        (TargetError, "LlamaRMSNorm is no linear layer", {"targets": ["input_layernorm"]}),
        (TargetError, "not a regular expression", {"targets": "("}),
        (TargetError, "excluded by", {"exclude": ["q_proj", "v_proj"]}),
        (TargetError, "no module 'clasifier'", {"modules_to_save": ["clasifier"]}),
        (SpecError, "rank ≥ 1, got 0", {"rank": 0}),
        (SpecError, "got d = 0", {"d": 0}),
        (SpecError, "got d = 10000000", {"d": 10**7}),
        (SpecError, r"'uni-lora' has no option 'rnak'; it has none. Is rank meant\?", {"rnak": 4}),
    ],
)
def test_bad_requests(tiny, error, message, kwargs):
    model = tiny("LlamaForCausalLM")
    names = list(model.state_dict())
    with pytest.raises(error, match=message):
        unilora_transformers.attach(model, **kwargs)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_projections_are_listed(tiny):
    model = tiny("LlamaForCausalLM")
    for layer in model.model.layers:
        layer.self_attn.first, layer.self_attn.second = layer.self_attn.q_proj, layer.self_attn.v_proj
        del layer.self_attn.q_proj, layer.self_attn.v_proj
    with pytest.raises(TargetError, match=r"choose targets.*'first', .*'second'"):
        unilora_transformers.attach(model)


def test_only_transformers_models(tiny):
    for other in (nn.Linear(3, 3), torch.compile(tiny("BertModel"), backend="eager")):
        with pytest.raises(TargetError, match="expected a transformers model"):
            unilora_transformers.attach(other)


def test_meta_weights_are_refused(tiny):
    with pytest.raises(TargetError, match="on the meta device"):
        unilora_transformers.attach(tiny("LlamaForCausalLM").to("meta"))


def test_attached_twice(tiny):
    model = tiny("LlamaForCausalLM")
    unilora_transformers.attach(model)
    with pytest.raises(TargetError, match="already has an adapter"):
        unilora_transformers.attach(model)
