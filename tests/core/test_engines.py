"""check, refuse: which engines take a LoRA folder, and the field or tensor at which each would stop."""

import json
import shlex
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from unilora_core import AdapterFileError, CorruptFileError, SpecError, engines
from unilora_core.files import new_files
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
    for text, message in {
        "{": "not JSON that can be read",
        "[]": r"expected a JSON object, got \[\]",
        "[" * 10**5: "not JSON that can be read",
        '{"r": 1, "r": 2}': r"not JSON that can be read \(the name 'r' occurs twice",
    }.items():
        (path / CONFIG).write_text(text)
        with pytest.raises(CorruptFileError, match=rf"adapter_config\.json: {message}"):
            engines.check(path)
    (path / CONFIG).write_bytes(b'{"r": "\xff"}')
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json: not a JSON file in UTF-8"):
        engines.check(path)
    (path / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: no such file; give a LoRA folder"):
        engines.check(path)


WRONG = {
    "r": ("8", 8.5, True, [8], {}),
    "lora_alpha": ("8", True, [8]),
    "target_modules": (5, True, {"q_proj": 1}, [1], [["q_proj"]]),
    "modules_to_save": ({"a": 1}, "lm_head", 1, [None]),
    "base_model_name_or_path": (["a"], 1, {"a": 1}, True),
    "bias": (1, [], {"a": 1}),
    "peft_type": (["LORA"], 1),
    "alpha_pattern": ([1], "a", {"a": "b"}),
    "use_dora": ("yes", 1),
    "task_type": (["CAUSAL_LM"],),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_of_another_type_is_refused_by_its_name(folder, field, value):
    with pytest.raises(CorruptFileError, match=rf"adapter_config\.json: {field}.*: expected .*, got "):
        engines.check(folder(**{field: value}))


def test_a_field_that_nobody_looks_at_may_be_anything(folder):
    assert refusing(folder(corda_config=[{"a": [1]}], eva_config="x", new={"of": "tomorrow"})) == set()


def test_the_base_models_config_is_checked_as_well(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for text, message in {
        '{"tie_word_embeddings": "yes"}': "tie_word_embeddings: expected true or false",
        "[" * 10**5: "not JSON that can be read",
    }.items():
        (base / "config.json").write_text(text)
        with pytest.raises(CorruptFileError, match=rf"base/config\.json: {message}"):
            engines.check(folder([*LLAMA, "lm_head"], base_model_name_or_path=str(base)))


NUMBERS = {"999999999999": False, "99999999": True, "9" * 5000: False, "²": False}  # those that are a layer's


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_in_a_name_costs_nothing(folder, number):
    """A folder of a few hundred bytes once made a set of all numbers below that one."""
    path = folder([*LLAMA, f"model.layers.{number}.self_attn.q_proj"])
    tracemalloc.start()
    reasons = engines.check(path)["lorax"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert any("not in layer 2; it serves" in reason for reason in reasons) is NUMBERS[number]


def calls(work):
    """How many functions of Python a call enters and how many lines it runs; the same on every machine."""
    count = 0

    def trace(*_):
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def test_the_work_is_linear_in_the_folder(folder):
    """Eight times the layers, in which every kind of layer has gaps: some eight times the lines."""
    steps = []
    for count in (100, 800):
        path = folder([f"model.layers.{2 * i}.self_attn.{end}" for i in range(count) for end in ("q_proj", "v_proj")])
        steps.append(calls(lambda path=path: engines.check(path)))
    assert steps[1] < 9 * steps[0]


def test_long_names_do_not_backtrack(folder):
    long = ["a." + "1" * 50_000, "layers." * 10_000, ".lora_" * 10_000, "1.layers.2" * 5_000]
    assert refusing(folder([*LLAMA, *long])) >= {"sglang"}
    for reasons in engines.check(folder([*LLAMA, *long])).values():
        assert all(len(reason) < 1000 for reason in reasons)


def test_a_factor_that_is_no_matrix(folder):
    path = folder()
    for shape in ((), (8,)):
        save_file({"base_model.model.a.lora_A.weight": np.zeros(shape, np.float32)}, path / TENSORS)
        with pytest.raises(CorruptFileError, match=r"a\.lora_A\.weight: expected a matrix, got the shape \("):
            engines.check(path)


EVIL = "x; touch RAN; $(touch RAN) `touch RAN` '\n\x1b[31m"


def test_what_is_printed_for_pasting_is_quoted(folder, tmp_path):
    lora = engines.read_lora(folder(base_model_name_or_path=EVIL))
    for name in engines.ENGINES:
        command = engines.serving(name, f"{tmp_path}/{EVIL}", lora)
        words = shlex.split(command)
        assert any(word.endswith(r"x; touch RAN; $(touch RAN) `touch RAN` '\n\x1b[31m") for word in words)
        assert command.isprintable()
    lora = engines.read_lora(folder(base_model_name_or_path="--trust-remote-code"))
    assert engines.serving("vllm", "--f", lora).startswith("vllm serve ./--trust-remote-code --enable-lora ")
    lora = engines.read_lora(folder())
    assert engines.serving("sglang", "my lora", lora).endswith("--enable-lora --lora-paths adapter='my lora'")


def test_a_base_on_the_disk_is_named_as_a_folder(folder, tmp_path):
    local = engines.read_lora(folder(base_model_name_or_path=str(tmp_path)))
    assert f" --base {tmp_path} " in engines.serving("llama.cpp", "f", local) + " "
    of_the_hub = engines.read_lora(folder(base_model_name_or_path="somebody/model"))
    assert " --base-model-id somebody/model " in engines.serving("llama.cpp", "f", of_the_hub) + " "


def test_reasons_are_lines_without_control_characters(folder):
    modules = [f"layers.{i}.{EVIL}" for i in range(4)]
    found = engines.check(folder(modules, extra=[EVIL], bias=EVIL, peft_type=EVIL, modules_to_save=[EVIL]))
    reasons = [reason for reasons in found.values() for reason in reasons]
    assert reasons
    assert all(reason.isprintable() for reason in reasons)


def test_a_folder_that_is_being_written_is_read_whole(folder):
    """The config of rank 4 beside the tensors of rank 8 is never seen: who reads waits for who writes, and so back."""
    path, both = folder(), {}
    for rank in (4, 8):
        folder(rank=rank)
        both[rank] = [(path / name).read_bytes() for name in (TENSORS, CONFIG)]
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            lora = engines.read_lora(path)
            seen.append({lora.config["r"], *lora.ranks.values()})

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(50):
            with new_files(path / TENSORS, path / CONFIG) as new:
                for file, data in zip(new, both[(4, 8)[turn % 2]], strict=True):
                    file.write_bytes(data)
    finally:
        done.set()
        reader.join()
    assert seen
    assert all(len(ranks) == 1 for ranks in seen)


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
