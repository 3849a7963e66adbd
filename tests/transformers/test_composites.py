"""Models with several parts: default targets reach each, or the part is named."""

import pytest
import transformers

from unilora_transformers.targets import select_targets

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT = TEXT | {"image_size": 16, "patch_size": 8}


def speech_translator(tiny):
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 48, "conv_dim": [16], "conv_kernel": [3], "conv_stride": [2]}
    config |= {"num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    encoder = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**config))
    decoder = tiny("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    return transformers.SpeechEncoderDecoderModel(encoder=encoder, decoder=decoder)


def painter(tiny):
    decoder = tiny("GPT2LMHeadModel", add_cross_attention=True)
    return transformers.VisionEncoderDecoderModel(encoder=tiny("ViTModel"), decoder=decoder)


PARTS = {
    "an image's caption": (
        painter,
        {
            "encoder.layers.#.attention": "q_proj v_proj",
            "decoder.transformer.h.#.attn.c_attn": "q v",
            "decoder.transformer.h.#.crossattention": "q_attn c_attn.v",
        },
    ),
    "two towers": (
        lambda tiny: transformers.VisionTextDualEncoderModel(
            vision_model=transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
            text_model=tiny("BertModel"),
        ),
        {
            "vision_model.encoder.layers.#.self_attn": "q_proj v_proj",
            "text_model.encoder.layer.#.attention.self": "query value",
        },
    ),
    "speech and text": (
        speech_translator,
        {
            "encoder.encoder.layers.#.attention": "q_proj v_proj",
            "decoder.bert.encoder.layer.#.attention.self": "query value",
            "decoder.bert.encoder.layer.#.crossattention.self": "query value",
        },
    ),
    "GIT": (
        lambda tiny: transformers.GitForCausalLM(transformers.GitConfig(vision_config=VIT, vocab_size=64, **TEXT)),
        {
            "git.image_encoder.vision_model.encoder.layers.#.self_attn": "q_proj v_proj",
            "git.encoder.layer.#.attention.self": "query value",
        },
    ),
}
"""A model, and where in each of its two layers which targets are."""


@pytest.mark.parametrize("name", PARTS)
def test_default_targets_reach_every_part(name, tiny):
    make, places = PARTS[name]
    found = {target.name for target in select_targets(make(tiny), None)}
    expected = {f"{place}.{end}" for place, ends in places.items() for end in ends.split()}
    assert found == {each.replace("#", str(i)) for each in expected for i in range(2)}


def test_a_part_without_known_names_is_named(tiny):
    model = transformers.VisionEncoderDecoderModel(encoder=tiny("ViTModel"), decoder=tiny("MambaForCausalLM"))
    with pytest.warns(UserWarning, match="unilora: decoder: no query and value projection under a known name"):
        found = select_targets(model, None)
    assert {target.module.partition(".")[0] for target in found} == {"encoder"}


def test_the_value_of_a_cross_attention_is_its_second_half(tiny):
    model = painter(tiny)
    first, *_ = (t for t in select_targets(model, None) if t.name.endswith("crossattention.c_attn.v"))
    assert (first.first_row, first.out_features, first.in_features) == (32, 32, 32)
