"""check, refuse: which engines take a LoRA folder, and the field or tensor at which each would stop."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from unilora_core import AdapterFileError, CorruptFileError, SpecError, engines
from unilora_core.lora import lora_config, lora_state

LLAMA = [f"model.layers.{i}.self_attn.{end}" for i in range(2) for end in ("q_proj", "v_proj")]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """make(modules, extra tensors, **changes of the config): a LoRA folder."""

    def make(modules=LLAMA, rank=8, extra=(), ranks=None, **changes):
        tensors = {}
        for module in modules:
            r = (ranks or {}).get(module, rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.zeros((r, 16), np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.zeros((12, r), np.float32)
        tensors |= {f"base_model.model.{name}": np.zeros((2, 2), np.float32) for name in extra}
        config = lora_config(modules, rank, base_model="org/base") | changes
        save_file(tensors, tmp_path / TENSORS)
        (tmp_path / CONFIG).write_text(json.dumps(config))
        return tmp_path

    return make


def refusing(folder):
    return {name for name, reasons in engines.check(folder).items() if reasons}


def test_what_every_engine_takes(folder):
    assert engines.check(folder()) == dict.fromkeys(("vllm", "sglang", "lorax", "llama.cpp"), ())
    assert list(engines.ENGINES) == list(engines.check(folder()))
    fused = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    assert refusing(folder(fused, rank=12)) == set()


EVERYONE = set(engines.ENGINES)
REFUSED = {
    "another method": ({"peft_type": "UNILORA"}, EVERYONE, "peft_type is 'UNILORA', expected 'LORA'"),
    "dora": ({"use_dora": True}, EVERYONE, "use_dora is set"),
    "experts": ({"target_parameters": ["mlp.experts.down_proj"]}, EVERYONE, "target_parameters is set"),
    "bias": ({"bias": "all"}, EVERYONE, "bias is 'all', expected 'none'"),
    "no alpha": ({"lora_alpha": None}, EVERYONE, "lora_alpha is None"),
    "no targets": ({"target_modules": None}, EVERYONE, "target_modules is missing"),
    "a rank of 640": ({"rank": 640}, {"vllm"}, "the rank is 640, the largest --max-lora-rank is 512"),
    "a pattern": ({"target_modules": ".*q_proj"}, {"sglang"}, "expected a list of names or 'all-linear'"),
    "several ranks": (
        {"ranks": {LLAMA[1]: 4}},
        EVERYONE - {"vllm"},
        r"model.layers.0.self_attn.v_proj has rank 4 and r is 8",
    ),
    "several alphas": ({"alpha_pattern": {"q_proj": 4}}, EVERYONE - {"vllm"}, "alpha_pattern is set"),
    "rslora": ({"use_rslora": True}, {"sglang", "llama.cpp"}, "use_rslora is set"),
    "a classifier": (
        {"extra": ["classifier.dense.weight"], "modules_to_save": ["classifier"]},
        EVERYONE,
        r"base_model.model.classifier.dense.weight.*Merge the adapter into a full checkpoint",
    ),
    "a plain score": (
        {"extra": ["score.weight"], "modules_to_save": ["score"]},
        EVERYONE - {"vllm"},
        r"base_model.model.score.weight \(modules_to_save = \['score'\]\)",
    ),
    "BERT": (
        {"modules": ["bert.encoder.layer.0.attention.self.query"]},
        {"sglang"},
        "no buffers for layers named query",
    ),
    "T5": (
        {"modules": ["encoder.block.0.layer.0.SelfAttention.q"]},
        {"sglang"},
        "dropped without a word, as it is in no numbered layer",
    ),
    "q alone": ({"modules": LLAMA[::2]}, {"sglang"}, "q_proj alone; it joins q, k and v"),
    "up without gate": (
        {"modules": [f"model.layers.{i}.mlp.up_proj" for i in range(2)]},
        {"sglang"},
        "up_proj without gate_proj",
    ),
    "a layer left out": (
        {"modules": [*LLAMA, "model.layers.1.self_attn.o_proj"]},
        {"lorax"},
        r"model.layers.\*.self_attn.o_proj: not in layer 0",
    ),
    "GPT-2": (
        {"modules": ["transformer.h.0.attn.c_attn"], "fan_in_fan_out": True},
        EVERYONE - {"lorax"},
        "fan_in_fan_out is set|c_attn",
    ),
    "no base": ({"base_model_name_or_path": None}, {"llama.cpp"}, "base_model_name_or_path is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(folder, case):
    options, who, message = REFUSED[case]
    found = engines.check(folder(**options))
    assert {name for name, reasons in found.items() if reasons} == who
    lora = engines.read_lora(folder(**options))
    for name in engines.ENGINES:
        if name in who:
            with pytest.raises(AdapterFileError, match=f"(?s)^{name} .* would not serve this export: .*({message})"):
                engines.refuse(lora, name)
        else:
            engines.refuse(lora, name)


def test_a_tied_head_stops_llama_cpp(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for tied in (True, False):
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        found = engines.check(folder([*LLAMA, "lm_head"], base_model_name_or_path=str(base)))
        assert any("tied to the embeddings" in reason for reason in found["llama.cpp"]) is tied


def test_the_rank_that_vllm_is_started_with():
    assert [engines.served_rank("vllm", r) for r in (1, 2, 8, 9, 300, 512, 513)] == [1, 8, 8, 16, 320, 512, 513]
    assert [engines.served_rank(name, 12) for name in ("sglang", "lorax", "llama.cpp")] == [12, 12, 12]


def test_an_unknown_engine(folder):
    for call in (lambda: engines.served_rank("tgi", 4), lambda: engines.refuse(engines.read_lora(folder()), "tgi")):
        with pytest.raises(SpecError, match=r"unknown engine 'tgi'; known: vllm, sglang, lorax, llama\.cpp"):
            call()


def test_damaged_folders(folder):
    path = folder()
    (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-4])
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        engines.check(path)
    for text in ("{", "[]"):
        (path / CONFIG).write_text(text)
        with pytest.raises(CorruptFileError, match="not a JSON object"):
            engines.check(path)
    (path / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: no such file; give a LoRA folder"):
        engines.check(path)


# ---- what is written ------------------------------------------------------------------------------------------------


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rank", [None, 6, 64])
def test_smaller_ranks_are_filled_up_and_the_update_is_the_same(rank):
    blocks = {
        "qkv": [(random(2, 6), random(4, 2), 0), (random(4, 6), random(4, 4), 8)],
        "o": [(random(3, 6), random(5, 3), 0)],
    }
    state, found = lora_state(blocks, {"qkv": 12, "o": 5}, rank)
    assert found == (rank or 6)
    for module, parts in blocks.items():
        A, B = (state[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        assert (A.shape, B.shape) == ((found, 6), (12 if module == "qkv" else 5, found))
        wanted = np.zeros((len(B), 6), np.float32)
        for a, b, row in parts:
            wanted[row : row + len(b)] += b @ a
        np.testing.assert_allclose(B @ A, wanted, rtol=1e-6, atol=1e-6)


def test_a_rank_that_is_too_small():
    blocks = {"o": [(random(3, 6), random(5, 3), 0)], "qkv": [(random(2, 6), random(4, 2), 0)] * 2}
    with pytest.raises(SpecError, match="qkv: expected rank ≥ 4, which its blocks add up to, got 3"):
        lora_state(blocks, {"qkv": 12, "o": 5}, 3)
