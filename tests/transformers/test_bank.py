"""Bank on transformers models: each row gets what its adapter alone gives, also from `generate`."""

import copy

import pytest
import torch

import unilora_torch
import unilora_transformers
from unilora_core import TargetError, ValuesError
from unilora_transformers import Bank

KINDS = {
    "a": {"seed": 1},
    "b": {"rank": 2, "d": 50, "start": "paper", "bound": 0.3},
    "c": {"targets": "all-linear", "grouping": "iid"},
    "d": {"seed": 1},
}


@pytest.fixture
def trained(tmp_path):
    """trained(model, **kinds): name → the file of an adapter that moved, made on copies of the model."""

    def make(model, **kinds):
        paths = {}
        for i, (name, options) in enumerate((kinds or KINDS).items()):
            adapter = unilora_transformers.attach(copy.deepcopy(model), **options)
            generator = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for parameter in (adapter.theta_d, *adapter.saved_parameters().values()):
                    size = 2 * parameter.std(correction=0)
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
            paths[name] = tmp_path / f"{name}.safetensors"
            adapter.save(paths[name])
        return paths

    return make


def bank_of(model, paths):
    bank = Bank(copy.deepcopy(model))
    for name, path in paths.items():
        bank.add(name, path)
    return bank


def singles(model, paths):
    """Name → a copy of the model with this adapter alone; None → the base."""
    models = {None: model}
    for name, path in paths.items():
        models[name] = copy.deepcopy(model)
        unilora_torch.load(models[name], path)  # not unilora_transformers', which readies a 4-bit base for training
    return models


def tokens(rows, length=7):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_each_row(model, paths, names, tolerance=1e-5, **more):
    """The logits of a batch against those of each row alone."""
    ids, bank, models = tokens(len(names)), bank_of(model, paths), singles(model, paths)
    with torch.no_grad():
        with bank.rows(names):
            found = bank.model(input_ids=ids, **more).logits
        parts = []
        for i, name in enumerate(names):
            inputs = {key: value[i : i + 1] for key, value in {"input_ids": ids, **more}.items()}
            parts.append(models[name](**inputs).logits[0])
        base = model(input_ids=ids, **more).logits
    wanted = torch.stack(parts)
    assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))
    moved = (found - base).flatten(1).abs().amax(1)
    # a mixture's experts take the tokens of all rows in one product, which may be rounded in another order
    assert (moved > tolerance).tolist() == [name is not None for name in names]
    assert moved[[name is not None for name in names]].min() > 10 * tolerance
    return bank


NAMES = ["a", None, "b", "c", "d", "a", "c"]


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"]
)
def test_logits(tiny, trained, name):
    """GPT-2: blocks of a fused Conv1D, the weights transposed."""
    model = tiny(name)
    assert_each_row(model, trained(model), NAMES)


def test_bfloat16(tiny, trained):
    model = tiny("LlamaForCausalLM")
    paths = trained(model)
    assert_each_row(model.to(torch.bfloat16), paths, NAMES, tolerance=2e-2)


def test_encoder_and_decoder(tiny, trained):
    model = tiny("T5ForConditionalGeneration")
    assert_each_row(model, trained(model), NAMES, decoder_input_ids=tokens(len(NAMES), 3))


def test_a_4_bit_base(tiny, trained):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny("LlamaForCausalLM", hidden_size=64)  # bitsandbytes quantises blocks of 64
    paths = trained(model)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            setattr(layer.self_attn, name, new.to("cpu"))
    assert_each_row(model.eval(), paths, NAMES)


def test_heads(tiny, trained):
    """Each row is classified by the head that was trained with its adapter."""
    model = tiny("RobertaForSequenceClassification", num_labels=3)
    paths = trained(model, a={}, b={"rank": 2}, c={"targets": "all-linear", "modules_to_save": ()})
    bank = assert_each_row(model, paths, ["a", None, "b", "c", "a"])
    assert list(bank.entries["a"].heads) == ["classifier"]
    assert not bank.entries["c"].heads


# ---- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_generate(tiny, trained, name, options):
    model = tiny(name, **{"decoder_start_token_id": 0} if name.startswith("T5") else {})
    paths = trained(model)
    names, ids = ["a", None, "b", "c"], tokens(4)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    bank, models = bank_of(model, paths), singles(model, paths)
    with bank.rows(names, copies=options.get("num_beams", 1)):
        found = bank.model.generate(ids, **options)
    wanted = torch.cat([models[each].generate(ids[i : i + 1], **options) for i, each in enumerate(names)])
    assert torch.equal(found, wanted)
    if name.startswith("Llama"):  # a random T5 may repeat one token, whatever the adapter
        assert not torch.equal(found, model.generate(ids, **options))


def test_generate_without_copies_is_refused(tiny, trained):
    model = tiny("T5ForConditionalGeneration", decoder_start_token_id=0)
    bank = bank_of(model, trained(model, a={}))
    with (
        pytest.raises(ValuesError, match=r"decoder.*the 2 rows that were named, got.*\(6, .*copies="),
        bank.rows(["a"] * 2),
    ):
        bank.model.generate(tokens(2), num_beams=3, max_new_tokens=3)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_experts_are_refused_and_attention_is_not(tiny, trained):
    model = tiny("MixtralForCausalLM")
    assert_each_row(model, trained(model, a={}, b={"seed": 2}), ["a", None, "b"])
    paths = trained(model, a={"targets": ["mlp.experts.down_proj"]})
    with pytest.raises(TargetError, match=r"down_proj is added to a weight, which all rows of a batch share"):
        bank_of(model, paths)


def test_positions_of_their_own_axis_are_refused(tiny, trained):
    """DeBERTa's query projection also runs over its positions, which are no rows."""
    model = tiny(
        "DebertaV2ForSequenceClassification", relative_attention=True, share_att_key=True, pos_att_type=["p2c"]
    )
    bank = bank_of(model, trained(model, a={"modules_to_save": ()}))
    with pytest.raises(ValuesError, match=r"query_proj: expected inputs.*the 2 rows"), bank.rows(["a", None]):
        bank.model(input_ids=tokens(2))
