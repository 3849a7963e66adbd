"""sentence-transformers as it stands: a saved folder comes back with equal outputs, and its trainer goes on from it."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch

import unilora_transformers
from unilora_core import AdapterFileError, MismatchError
from unilora_torch import switch

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
Dataset = pytest.importorskip("datasets").Dataset
tokenizers = pytest.importorskip("tokenizers")

from sentence_transformers.sentence_transformer import losses as st_losses  # noqa: E402
from sentence_transformers.sentence_transformer import modules as models  # noqa: E402
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast  # noqa: E402

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
STEPS = 4


@pytest.fixture
def base(tiny, tmp_path):
    """base(class_name, **config): a folder with a model and a tokenizer of sixty words."""

    def make(name="BertModel", folder="base", **config):
        known = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(59))]
        core = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
        )
        core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "model_max_length": 32}
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path / folder)
        tiny(name, **config).save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    return make


def encoder(folder, *more):
    torch.manual_seed(3)
    return st.SentenceTransformer(
        modules=[models.Transformer(folder), models.Pooling(32), *(make() for make in more)], device="cpu"
    )


def adapted(model, train, **options):
    adapter = unilora_transformers.attach(model[0].auto_model, **options)
    train(adapter)
    return model


def dense():
    return models.Dense(32, 8)


@pytest.mark.parametrize("more", [(), (models.Normalize,), (dense, models.Normalize)])
def test_a_saved_model_is_loaded_as_any_other(base, train, tmp_path, more):
    model = adapted(encoder(base(), *more), train, rank=2)
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    there = set(os.listdir(tmp_path / "saved"))
    assert {"adapter.safetensors", "config.json", "modules.json", "README.md"} <= there
    assert "model.safetensors" not in there
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (loaded.encode(TEXTS) == expected).all()
    adapter = loaded[0].auto_model.unilora
    assert adapter.spec == model[0].auto_model.unilora.spec
    with adapter.disabled():
        assert not (loaded.encode(TEXTS) == expected).all()
    loaded.save_pretrained(str(tmp_path / "again"))
    assert (st.SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS) == expected).all()


def test_another_process_needs_one_import(base, train, tmp_path):
    model = adapted(encoder(base()), train)
    model.save_pretrained(str(tmp_path / "saved"))
    code = "from sentence_transformers import SentenceTransformer as ST; "
    code += "print(ST({!r}, device='cpu').encode(['w1 w2'])[0])"
    run = [sys.executable, "-c", code.format(str(tmp_path / "saved"))]
    without = subprocess.run(run, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "`unilora`" in without.stderr
    run[2] = f"import unilora_transformers; {run[2]}"
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(model.encode(["w1 w2"])[0])


def test_a_cross_encoder_with_its_head(base, train, tmp_path):
    model = st.CrossEncoder(base(), num_labels=1, device="cpu")
    train(unilora_transformers.attach(model[0].auto_model))
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6")]
    expected = model.predict(pairs)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert (loaded.predict(pairs) == expected).all()
    assert loaded[0].auto_model.unilora.modules_to_save == ("classifier",)


def test_a_sparse_encoder(base, train, tmp_path):
    model = st.SparseEncoder(base("BertForMaskedLM"), device="cpu")
    train(unilora_transformers.attach(model[0].auto_model))
    expected = model.encode(TEXTS).to_dense()
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(loaded.encode(TEXTS).to_dense(), expected)


def test_an_encoder_of_an_encoder_decoder(base, train, tmp_path):
    model = adapted(encoder(base("T5ForConditionalGeneration")), train)
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(loaded[0].auto_model).__name__ == "T5EncoderModel"
    assert (loaded.encode(TEXTS) == expected).all()


def test_a_router_of_two_adapted_models(base, train, tmp_path):
    query, document = models.Transformer(base()), models.Transformer(base(folder="other", num_hidden_layers=1))
    routes = models.Router.for_query_document([query, models.Pooling(32)], [document, models.Pooling(32)])
    model = st.SentenceTransformer(modules=[routes], device="cpu")
    for module, seed in ((query, 1), (document, 2)):
        train(unilora_transformers.attach(module.auto_model, seed=seed))
    expected = model.encode_query(TEXTS), model.encode_document(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (loaded.encode_query(TEXTS) == expected[0]).all()
    assert (loaded.encode_document(TEXTS) == expected[1]).all()
    assert not (expected[0] == expected[1]).all()


def test_several_adapters_act_as_they_did(base, train, tmp_path):
    model = adapted(encoder(base()), train)
    inner = model[0].auto_model
    train(unilora_transformers.attach(inner, name="second", seed=4))
    for weights in ({"unilora": 1.0, "second": 0.5}, {"second": 1.0}, {}):
        switch(inner, weights)
        model.save_pretrained(str(tmp_path / "saved"))
        loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert (loaded.encode(TEXTS) == model.encode(TEXTS)).all()
    text = (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "saved" / "config.json").write_text(text.replace('"acting": {}', '"acting": {"unilora": "much"}'))
    with pytest.raises(AdapterFileError, match=r"config\.json: acting\.unilora: expected a finite number"):
        st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")


def test_options_reach_the_base(base, train, tmp_path):
    model = adapted(encoder(base()), train)
    model.save_pretrained(str(tmp_path / "saved"))
    options = {"model_kwargs": {"dtype": torch.bfloat16, "attn_implementation": "eager"}}
    options |= {"config_kwargs": {"hidden_dropout_prob": 0.25}}
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", **options)
    inner = loaded[0].auto_model
    assert (inner.dtype, inner.unilora.theta_d.dtype) == (torch.bfloat16, torch.float32)
    assert inner.config.hidden_dropout_prob == 0.25
    assert inner.config._attn_implementation == "eager"
    assert not inner.config.use_cache
    with pytest.raises(AdapterFileError, match="hidden_dropout_probability"):
        st.SentenceTransformer(str(tmp_path / "saved"), config_kwargs={"hidden_dropout_probability": 0.25})


# ---- the folder and its base ----------------------------------------------------------------------------------------


def test_the_folder_of_the_base_is_not_overwritten(base, train, tmp_path):
    encoder(base()).save_pretrained(str(tmp_path / "model"))
    before = (tmp_path / "model" / "config.json").read_bytes()
    model = adapted(st.SentenceTransformer(str(tmp_path / "model"), device="cpu"), train)
    with pytest.raises(FileExistsError, match=r"model: the base model lies there and would lose its config"):
        model.save_pretrained(str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (loaded.encode(TEXTS) == model.encode(TEXTS)).all()


def test_a_base_that_cannot_be_found_again_is_said_to_be(base, train, tmp_path):
    model = adapted(encoder(base()), train)
    model[0].auto_model.name_or_path = ""
    with pytest.warns(UserWarning, match=r"saved cannot be loaded by itself, as the base model has no config\.json"):
        model.save_pretrained(str(tmp_path / "saved"))
    again = encoder(base())
    unilora_transformers.load(again[0].auto_model, tmp_path / "saved" / "adapter.safetensors")
    assert (again.encode(TEXTS) == model.encode(TEXTS)).all()


def test_merged_for_good_it_is_a_plain_model(base, train, tmp_path):
    model = adapted(encoder(base()), train)
    expected = model.encode(TEXTS)
    model[0].auto_model.unilora.detach(merge=True)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "adapter.safetensors").exists()
    assert (st.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS) == model.encode(TEXTS)).all()
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), torch.tensor(expected))


# ---- its trainer ----------------------------------------------------------------------------------------------------


def data():
    rows = [[f"w{i}", f"w{i} w{i + 1}"] for i in range(24)]
    return Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]})


def trainer(model, folder, rate=1e-2, **options):
    common = {"max_steps": STEPS, "per_device_train_batch_size": 6, "logging_steps": 1, "save_steps": 2}
    common |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    return st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(str(folder), **common | options),
        train_dataset=data(),
        eval_dataset=data().select(range(8)),
        loss=st_losses.MultipleNegativesRankingLoss(model),
        optimizers=(torch.optim.AdamW(model[0].auto_model.unilora.parameter_groups(rate)), None),
    )


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("method", ["uni-lora", "lora-xs"])
def test_resuming_goes_on_exactly(base, tmp_path, method, caplog):
    folder = base()

    def start():
        model = encoder(folder)
        unilora_transformers.attach(model[0].auto_model, method=method, rank=2)
        return model

    whole = trainer(start(), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 120_000
    again = trainer(start(), tmp_path / "again")
    if method == "lora-xs":  # as another computer's singular vectors would be
        for arrays in again.model[0].auto_model.unilora.chains.frozen.values():
            for array in arrays.values():
                array.neg_()
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)
    adapters = [run.model[0].auto_model.unilora for run in (whole, again)]
    assert torch.equal(adapters[0].theta_d, adapters[1].theta_d)


def test_resuming_beside_a_base_of_4_bits(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = base(hidden_size=64, intermediate_size=128)

    def start():
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what bitsandbytes would like to be installed
            options = {"model_kwargs": {"quantization_config": BitsAndBytesConfig(**nf4)}}
            inside = models.Transformer(folder, **options)
        model = st.SentenceTransformer(modules=[inside, models.Pooling(64)], device="cpu")
        unilora_transformers.attach(model[0].auto_model)
        return model

    whole, again = trainer(start(), tmp_path / "whole"), trainer(start(), tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole)


def test_the_best_checkpoint_is_loaded_at_the_end(base, tmp_path, caplog):
    model = encoder(base())
    unilora_transformers.attach(model[0].auto_model)
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path / "run", rate=3.0, **every)
    with caplog.at_level(logging.ERROR):
        run.train()
    assert "best model" not in caplog.text  # it logs what keeps it from loading, and goes on
    evaluated = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    best = min(evaluated, key=evaluated.get)
    assert best != STEPS
    loaded = st.SentenceTransformer(run.state.best_model_checkpoint, device="cpu")
    assert torch.equal(loaded[0].auto_model.unilora.theta_d, model[0].auto_model.unilora.theta_d)
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)


def test_a_resume_from_another_spec_is_refused(base, tmp_path):
    folder = base()
    model = encoder(folder)
    unilora_transformers.attach(model[0].auto_model)
    trainer(model, tmp_path / "run", max_steps=2).train()
    other = encoder(folder)
    theta_d = unilora_transformers.attach(other[0].auto_model, seed=7).theta_d
    before = theta_d.detach().clone()
    with pytest.raises(MismatchError, match=r"was trained with \{'seed': 0\}, the model's has \{'seed': 7\}"):
        trainer(other, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(theta_d, before)
