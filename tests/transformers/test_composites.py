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
        tuple(f"encoder.layers.#.attention.{name}" for name in ("q_proj", "v_proj"))
        + tuple(f"decoder.transformer.h.#.attn.c_attn.{name}" for name in ("q", "v"))
        + tuple(f"decoder.transformer.h.#.crossattention.{name}" for name in ("q_attn", "c_attn.v")),
    ),
    "two towers": (
        lambda tiny: transformers.VisionTextDualEncoderModel(
            vision_model=transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
            text_model=tiny("BertModel"),
        ),
        tuple(f"vision_model.encoder.layers.#.self_attn.{name}" for name in ("q_proj", "v_proj"))
        + tuple(f"text_model.encoder.layer.#.attention.self.{name}" for name in ("query", "value")),
    ),
    "speech and text": (
        speech_translator,
        tuple(f"encoder.encoder.layers.#.attention.{name}" for name in ("q_proj", "v_proj"))
        + tuple(f"decoder.bert.encoder.layer.#.attention.self.{name}" for name in ("query", "value"))
        + tuple(f"decoder.bert.encoder.layer.#.crossattention.self.{name}" for name in ("query", "value")),
    ),
    "GIT": (
        lambda tiny: transformers.GitForCausalLM(transformers.GitConfig(vision_config=VIT, vocab_size=64, **TEXT)),
        tuple(f"git.image_encoder.vision_model.encoder.layers.#.self_attn.{name}" for name in ("q_proj", "v_proj"))
        + tuple(f"git.encoder.layer.#.attention.self.{name}" for name in ("query", "value")),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_default_targets_reach_every_part(name, tiny):
    make, expected = PARTS[name]
    model = make(tiny)
    found = {target.name for target in select_targets(model, None)}
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
