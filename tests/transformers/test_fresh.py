"""What no checkpoint gave values: found, trained, in the file; a file does not load onto other random values."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import unilora_torch
import unilora_transformers
from unilora_core import MismatchError, TargetError, read_adapter, save_adapter
from unilora_transformers.fresh import added_rows, fresh_weights

IDS = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
LARGER = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
OTHER_SIZES = {"ignore_mismatched_sizes": True}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT |= {"image_size": 16, "patch_size": 8}
YOLOS = VIT | {"image_size": [16, 16], "num_detection_tokens": 5, "num_labels": 5}
ALBERT = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
POOLER = "bert.pooler"


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory):
    """checkpoint(class_name, **config): the folder of a tiny model, made once for the same arguments."""
    made = {}

    def folder(name, **config):
        key = f"{name} {config}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base")
            cls = getattr(transformers, name)
            if config:
                torch.manual_seed(0)
                cls(cls.config_class(**config)).save_pretrained(made[key])
            else:
                tiny(name).save_pretrained(made[key])
        return made[key]

    return folder


def bert(checkpoint, name="BertForSequenceClassification"):
    return getattr(transformers, name).from_pretrained(checkpoint("BertForMaskedLM"))


def copied(checkpoint):
    return copy.deepcopy(bert(checkpoint))


def encoder_decoder(checkpoint):
    folder = checkpoint("BertForMaskedLM")
    return transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder)


def captioner(checkpoint):
    decoder = transformers.GPT2LMHeadModel.from_pretrained(checkpoint("GPT2LMHeadModel"), add_cross_attention=True)
    encoder = transformers.ViTModel.from_pretrained(checkpoint("ViTModel"))
    return transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)


def two_towers(checkpoint):
    return transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(
        checkpoint("ViTModel"), checkpoint("BertForMaskedLM")
    )


def longer_positions(checkpoint):
    model = transformers.DistilBertForSequenceClassification.from_pretrained(checkpoint("DistilBertModel"))
    model.resize_position_embeddings(600)
    return model


def one_weight_lost(checkpoint):
    """A lone parameter beside others."""
    folder = checkpoint("ViTForMaskedImageModeling", **VIT, encoder_stride=8)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("vit.embeddings.cls_token", None)
    save_file(tensors, path, metadata={"format": "pt"})
    return transformers.ViTForImageClassification.from_pretrained(folder)


CASES = {
    "BERT": (bert, {"input_ids": IDS}, {"classifier", POOLER}),
    "a copy, which has no marks": (copied, {"input_ids": IDS}, {"classifier", POOLER}),
    "multiple choice": (
        lambda checkpoint: bert(checkpoint, "BertForMultipleChoice"),
        {"input_ids": IDS[None]},
        {"classifier", POOLER},
    ),
    "a language model from its base": (
        lambda checkpoint: transformers.BertForMaskedLM.from_pretrained(checkpoint("BertModel")),
        {"input_ids": IDS},
        {"cls.predictions.transform", "cls.predictions.bias", "cls.predictions.decoder.bias"},
    ),
    "ALBERT": (
        lambda checkpoint: transformers.AlbertForSequenceClassification.from_pretrained(
            checkpoint("AlbertForMaskedLM", **ALBERT)
        ),
        {"input_ids": IDS},
        {"classifier", "albert.pooler"},
    ),
    "a detector's new labels": (
        lambda checkpoint: transformers.YolosForObjectDetection.from_pretrained(
            checkpoint("YolosForObjectDetection", **YOLOS), num_labels=3, **OTHER_SIZES
        ),
        {"pixel_values": PIXELS},
        {"class_labels_classifier", "bbox_predictor"},
    ),
    "larger images": (
        lambda checkpoint: transformers.ViTForImageClassification.from_pretrained(
            checkpoint("ViTModel"), image_size=32, **OTHER_SIZES
        ),
        {"pixel_values": LARGER},
        {"classifier", "vit.embeddings.position_embeddings"},
    ),
    "one weight lost": (one_weight_lost, {"pixel_values": PIXELS}, {"classifier", "vit.embeddings.cls_token"}),
    "longer positions": (
        longer_positions,
        {"input_ids": IDS},
        {"pre_classifier", "classifier", "distilbert.embeddings.position_embeddings"},
    ),
    "another vocabulary, tied": (
        lambda checkpoint: transformers.BertForMaskedLM.from_pretrained(
            checkpoint("BertForMaskedLM"), vocab_size=70, **OTHER_SIZES
        ),
        {"input_ids": IDS},
        {"bert.embeddings.word_embeddings", "cls.predictions.decoder", "cls.predictions.bias"},
    ),
    "cross-attention between two": (
        encoder_decoder,
        {"input_ids": IDS, "decoder_input_ids": IDS},
        {"encoder.pooler", *(f"decoder.bert.encoder.layer.{i}.crossattention" for i in (0, 1))},
    ),
    "a captioner": (
        captioner,
        {"pixel_values": PIXELS, "decoder_input_ids": IDS},
        {f"decoder.transformer.h.{i}.{part}" for i in (0, 1) for part in ("crossattention", "ln_cross_attn")},
    ),
    "two towers": (
        two_towers,
        {"pixel_values": PIXELS, "input_ids": IDS},
        {"text_model.pooler", "visual_projection", "text_projection", "logit_scale"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_fresh_is_trained_and_saved(name, checkpoint, train, tmp_path):
    make, inputs, parts = CASES[name]
    torch.manual_seed(1)
    model = make(checkpoint).eval()
    adapter = unilora_transformers.attach(model, example=inputs)
    assert set(adapter.modules_to_save) == parts
    assert all(parameter.requires_grad for parameter in adapter.saved_parameters().values())
    assert not adapter.base.fresh
    train(adapter)
    expected = model(**inputs)[0]
    adapter.save(tmp_path / "a.safetensors")
    torch.manual_seed(2)  # another run
    again = make(checkpoint).eval()
    assert not torch.allclose(again(**inputs)[0], expected, atol=1e-3)
    unilora_transformers.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(**inputs)[0], expected)


@pytest.mark.parametrize(
    "name", ["BERT", "larger images", "longer positions", "another vocabulary, tied", "two towers"]
)
def test_a_file_without_them_fits_the_same_values_only(name, checkpoint, tmp_path):
    make, inputs, parts = CASES[name]
    torch.manual_seed(1)
    model = make(checkpoint).eval()
    adapter = unilora_transformers.attach(model, modules_to_save=(), example=inputs)
    assert "random, frozen and in no file" in adapter.summary()
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    unilora_transformers.load(model, tmp_path / "a.safetensors")
    model.unilora.swap(tmp_path / "a.safetensors")
    torch.manual_seed(2)
    with pytest.raises(MismatchError, match=r"which is not in the file, is another|are others"):
        unilora_transformers.load(make(checkpoint), tmp_path / "a.safetensors")


def test_a_matrix_alone_tells_fresh_values_apart(checkpoint, tmp_path):
    """A pooler's bias is zero in each run, and its matrix is no vector."""
    adapter = unilora_transformers.attach(bert(checkpoint), modules_to_save=())
    adapter.save(tmp_path / "a.safetensors")
    other = bert(checkpoint)
    other.classifier.load_state_dict(adapter.model.classifier.state_dict())
    with pytest.raises(MismatchError, match=r"bert\.pooler\.dense\.weight, which no checkpoint"):
        unilora_transformers.load(other, tmp_path / "a.safetensors")
    unilora_transformers.load(other, tmp_path / "a.safetensors", check_base=False)


def test_named_modules_are_joined_by_what_is_fresh(checkpoint):
    adapter = unilora_transformers.attach(bert(checkpoint), modules_to_save="classifier")
    assert adapter.modules_to_save == ("classifier", POOLER)
    assert "classifier, bert.pooler: 1,122;" in adapter.summary()
    adapter.detach()
    adapter = unilora_transformers.attach(bert(checkpoint), modules_to_save=["bert.pooler.dense", "classifier"])
    assert adapter.modules_to_save == ("classifier", POOLER)  # each once


def test_a_model_from_a_config_has_nothing_fresh(tiny):
    assert fresh_weights(tiny("BertForSequenceClassification")) == ()


def test_what_is_computed_is_not_fresh(checkpoint):
    config = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    config |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0, "decoder_vocab_size": 64}
    folder = checkpoint("MarianMTModel", **config)
    path = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "embed_positions" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    assert fresh_weights(transformers.MarianMTModel.from_pretrained(folder)) == ()


def test_marks_outlive_a_cast_and_a_second_adapter(checkpoint):
    model = bert(checkpoint).half().float()
    unilora_transformers.attach(model).detach()
    assert unilora_transformers.attach(model).modules_to_save == ("classifier", POOLER)
    unilora_torch.switch(model, ())
    assert unilora_transformers.attach(model, name="other").modules_to_save == ("classifier", POOLER)


def test_a_file_that_does_not_say_loads_with_a_warning(checkpoint, tmp_path):
    """As files did before they told fresh weights apart."""
    path = tmp_path / "a.safetensors"
    unilora_torch.attach(bert(checkpoint), ["query", "value"], modules_to_save=["classifier"]).save(path)
    file = read_adapter(path)
    metadata = {name: text for name, text in file.metadata.items() if name != "base_more"}
    save_adapter(path, file.spec, file.theta_d, tensors=file.tensors, metadata=metadata)
    torch.manual_seed(0)
    model = bert(checkpoint)
    with pytest.warns(UserWarning, match=r"a\.safetensors: no checkpoint gave bert\.pooler values, .* not in here"):
        unilora_transformers.load(model, path, check_base=False)


def test_the_last_row_of_an_embedding_tells_bases_apart(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    unilora_transformers.attach(tiny("LlamaForCausalLM")).save(path)
    other = tiny("LlamaForCausalLM")
    with torch.no_grad():
        other.model.embed_tokens.weight[-1] += 0.1
    with pytest.raises(MismatchError, match="the last rows of its embeddings are others"):
        unilora_transformers.load(other, path)
    assert json.loads(read_adapter(path).metadata["base_more"])["ends"]


def test_a_lone_parameter_is_no_lora_and_no_row_of_a_bank(checkpoint, tmp_path):
    model = CASES["larger images"][0](checkpoint)
    adapter = unilora_transformers.attach(model, example={"pixel_values": LARGER})
    with pytest.raises(TargetError, match=r"vit\.embeddings\.position_embeddings is a parameter that was trained"):
        adapter.export_lora(tmp_path / "lora")
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    with pytest.raises(TargetError, match=r"position_embeddings is a parameter"):
        unilora_torch.Bank(model).add("a", tmp_path / "a.safetensors")


def test_pretrained_brings_them_back(checkpoint, train, tmp_path):
    torch.manual_seed(1)
    model = bert(checkpoint).eval()
    train(unilora_transformers.attach(model))
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        unilora_transformers.from_pretrained(tmp_path / "adapter").eval()(input_ids=IDS).logits, expected
    )


def with_tokens(checkpoint, tie, seed=1):
    """Three tokens more, with rows that each run makes anew."""
    torch.manual_seed(seed)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    folder = checkpoint("LlamaForCausalLM", **small, num_attention_heads=4, tie_word_embeddings=tie)
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(67, mean_resizing=False)
    return model


ADDED = torch.tensor([[64, 5, 65, 9, 66, 12]])
TABLES = ("model.embed_tokens", "lm_head")


@pytest.mark.parametrize("tie", [False, True])
def test_rows_of_added_tokens_are_not_lost_without_a_word(tie, checkpoint):
    model = with_tokens(checkpoint, tie)
    match = r"the rows from 64 to 66 belong to added tokens.*modules_to_save=\('model.embed_tokens', 'lm_head'\)"
    for named in (None, ["model.norm"], ["lm_head"]):
        with pytest.raises(TargetError, match=match if named is None else "the rows from 64 to 66"):
            unilora_transformers.attach(model, modules_to_save=named)
    assert not hasattr(model, "unilora")


@pytest.mark.parametrize("tie", [False, True])
def test_tables_with_added_tokens_are_saved_and_the_base_gets_them(tie, checkpoint, train, tmp_path):
    model = with_tokens(checkpoint, tie)
    adapter = unilora_transformers.attach(model, modules_to_save=TABLES)
    model(input_ids=ADDED, labels=ADDED).loss.backward()
    assert model.get_input_embeddings().weight.grad[64:].abs().sum(-1).min() > 0
    train(adapter)
    expected = model(input_ids=ADDED).logits
    model.save_pretrained(tmp_path / "adapter")
    again = unilora_transformers.from_pretrained(tmp_path / "adapter").eval()
    assert again.config.vocab_size == 67
    assert torch.equal(again(input_ids=ADDED).logits, expected)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tie
    adapter.detach()
    other = with_tokens(checkpoint, tie, seed=2)
    unilora_transformers.load(other, tmp_path / "adapter" / "adapter.safetensors")
    assert torch.equal(other(input_ids=ADDED).logits, expected)


@pytest.mark.parametrize("tie", [False, True])
def test_rows_that_stay_as_they_are_fit_themselves_only(tie, checkpoint, tmp_path):
    model = with_tokens(checkpoint, tie)
    adapter = unilora_transformers.attach(model, modules_to_save=())
    assert "random, frozen and in no file: model.embed_tokens.weight, lm_head.weight" in adapter.summary()
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    unilora_transformers.load(model, tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match="the last rows of its embeddings are others"):
        unilora_transformers.load(with_tokens(checkpoint, tie, seed=2), tmp_path / "a.safetensors")
    if not tie:
        other = with_tokens(checkpoint, tie, seed=2)
        other.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
        with pytest.raises(MismatchError, match=r"lm_head\.weight, which no checkpoint"):
            unilora_transformers.load(other, tmp_path / "a.safetensors")


def test_a_resized_base_that_was_saved_has_no_fresh_rows(checkpoint, tmp_path):
    with_tokens(checkpoint, tie=False).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert unilora_transformers.attach(model).modules_to_save == ()


def test_rows_of_biases_count_too(checkpoint):
    model = transformers.BertForMaskedLM.from_pretrained(checkpoint("BertForMaskedLM"))
    model.resize_token_embeddings(70)
    weights = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    assert added_rows(model).keys() == weights | {"cls.predictions.bias", "cls.predictions.decoder.bias"}
    tables = ("bert.embeddings.word_embeddings", "cls.predictions.decoder", "cls.predictions.bias")
    assert unilora_transformers.attach(model, modules_to_save=tables).modules_to_save == tables


def test_a_smaller_vocabulary_has_no_fresh_rows(checkpoint):
    model = with_tokens(checkpoint, tie=True)
    model.resize_token_embeddings(60)
    assert fresh_weights(model) == ()
