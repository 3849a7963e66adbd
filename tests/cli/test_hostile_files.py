"""Files from a stranger, through the whole command: nothing of theirs runs, is opened or reaches the terminal, and what
is wrong with them is one line."""

import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from unilora_core import Layout, ProjectionSpec, save_adapter
from unilora_core.lora import lora_config, lora_state

ESCAPE = "\x1b[31m\x9b2J\x07"
SPEC = ProjectionSpec(Layout([("q.A", (1, 8)), ("q.B", (8, 1))]), 4)
ASKS = (
    "it brings Python code of its own, which nobody runs unasked; if you trust it, --model-arg trust_remote_code=true"
)
COMMANDS = {
    "convert": ("convert", "adapter.safetensors", "out", "--to", "lora"),
    "merge": ("merge", "adapter.safetensors", "--out", "out"),
    "inspect": ("inspect", "adapter.safetensors"),
}


def save(**metadata):
    """adapter.safetensors here, with these strings in its header."""
    save_adapter("adapter.safetensors", SPEC, SPEC.init(), metadata=metadata)


def one_line(result):
    """The error of a command that ended as it should."""
    assert result.code == 1, result
    lines = result.err.splitlines()
    assert lines[-1].startswith("unilora: error: ")
    assert len(lines) == 1, result.err
    assert lines[0].isprintable()
    assert len(lines[0]) < 2000
    return lines[0]


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """The folder of a base whose Python leaves a mark when it runs."""
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    base.mkdir()
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    code = {name: f"evil.{'C' if name == 'AutoConfig' else 'X'}" for name in classes}
    (base / "config.json").write_text(json.dumps({"model_type": "evilm", "auto_map": code}))
    tokens = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokens))
    (base / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'RAN')!r}).touch()\n"
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer as T\n"
        "class C(PretrainedConfig):\n    model_type = 'evilm'\n"
        "class X(PreTrainedModel):\n    config_class = C\n"
    )
    return base


# ---- what a file says of its base -------------------------------------------------------------------------------

FORBIDDEN = {
    "trust_remote_code": True,
    "code_revision": "main",
    "revision": "evil",
    "token": "hf_secret",
    "cache_dir": "elsewhere",
    "device_map": "auto",
    "quantization_config": {"load_in_4bit": True},
    "attn_implementation": "evil/kernel",
    "gguf_file": "evil.gguf",
    "subfolder": "..",
    "state_dict": {},
    "config": "base",
    "dtype": "float16",
    "auto_map": {"AutoConfig": "evil.C"},
    "_from_auto": True,
    "proxies": {"https": "evil"},
    "pretrained_cfg": {"url": "https://evil.example/x.pth"},
    "pretrained_cfg_overlay": {"file": "evil.pth"},
    "checkpoint_path": "evil.pth",
    "scriptable": True,
    "features_only": True,
}


@pytest.mark.parametrize("kind", ["lm", "text", "vit"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_setting_of_a_file_runs_code(unilora, evil, tmp_path, kind, command):
    pytest.importorskip("timm")
    for key, value in FORBIDDEN.items():
        arguments = json.dumps({"arguments": {"num_labels": 2, key: value}})
        save(base_model=str(evil), base_class="AutoModelForCausalLM", task=kind, base_arguments=arguments)
        result = unilora(*COMMANDS[command])
        if command == "inspect":
            assert result.code == 0, result.err
        else:
            assert f"adapter.safetensors: it asks for {key} = " in one_line(result)
            assert (
                f"give {key} yourself: --model-arg {key}=… to the command, or {key}=… to from_pretrained" in result.err
            )
    assert not (tmp_path / "RAN").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lm", "text"])
@pytest.mark.parametrize("command", ["convert", "merge"])
def test_the_code_of_a_base_runs_only_where_the_command_line_says_so(unilora, evil, tmp_path, kind, command):
    """transformers would ask on a terminal, and a script has no terminal: neither happens."""
    save(base_model=str(evil), task=kind)
    assert ASKS in one_line(unilora(*COMMANDS[command]))
    assert not (tmp_path / "RAN").exists()
    unilora(*COMMANDS[command], "--model-arg", "trust_remote_code=true")
    assert (tmp_path / "RAN").exists()


def test_a_peft_folder_runs_no_code(unilora, evil, tmp_path):
    config = {"peft_type": "UNILORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(evil)}
    config |= {"trust_remote_code": True, "auto_mapping": {"parent_library": "evil"}}
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.unilora_theta_d": np.zeros(4, np.float32)}, folder / "adapter_model.safetensors")
    assert ASKS in one_line(unilora("convert", "peft", "out.safetensors", "--to", "unilora"))
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("kind", ["lm", "text"])
def test_training_on_a_base_with_code_wants_a_word_for_it(unilora, evil, tmp_path, tsv, dialogues, kind):
    data = tsv if kind == "text" else dialogues
    result = unilora("finetune", kind, "--model", evil, "--data", data, "--device", "cpu", "--out", "run")
    assert ASKS in one_line(result)
    assert not (tmp_path / "RAN").exists()


class Mark:
    def __reduce__(self):
        return (Path.touch, (Path("RAN").resolve(),))


@pytest.mark.parametrize("name", ["{}", "local-dir:{}"])
def test_a_pickle_in_a_folder_of_timm_does_not_run(unilora, tmp_path, name):
    """timm 1.0.22 unpickled whatever is in the folder of a model."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    timm.models.save_for_hf(model, tmp_path / "base", safe_serialization=False)
    torch.save({"weight": Mark()}, tmp_path / "base/pytorch_model.bin")
    save(base_model=name.format(tmp_path / "base"), task="vit")
    for command in ("convert", "merge"):
        assert "cannot build the model" in one_line(unilora(*COMMANDS[command]))
    assert not (tmp_path / "RAN").exists()


def test_the_checkpoint_that_a_file_names_is_not_opened(unilora, tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Mark()))
    how = {"arguments": {"img_size": 32, "depth": 1}, "pretrained": False, "checkpoint": str(tmp_path / "weights.pth")}
    save(base_model="vit_tiny_patch16_224", task="vit", base_arguments=json.dumps(how))
    for command in ("convert", "merge"):
        error = one_line(unilora(*COMMANDS[command]))
        assert "adapter.safetensors: the weights of its base came from a file, '" in error
        assert "which is not opened on its word; add --checkpoint PATH." in error
        assert "no such checkpoint file" in one_line(unilora(*COMMANDS[command], "--checkpoint", "none.pth"))
    assert not (tmp_path / "RAN").exists()


NAMES = ["https://evil.example/x", "file:///etc/passwd", "s3:bucket/x", "local-dir:/none", "local-dir:", "hf-hub:a/b/c"]
NAMES += ["hf-hub:", "a/b/c", "file.txt", "a\0b", "a b", f"x{ESCAPE}", "a\nb", "C:\\x", "~/x", "/none", "$HOME"]


@pytest.mark.parametrize("kind", ["vit", "text", "lm"])
def test_a_file_names_a_model_or_a_folder(unilora, tmp_path, kind):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    (tmp_path / "file.txt").touch()
    for name in NAMES:
        save(base_model=name, task=kind)
        for command in ("convert", "merge"):
            error = one_line(unilora(*COMMANDS[command]))
            assert "which is neither the name of a model nor a folder here; add --model NAME." in error
    for name in ("no-such-model", "..", "x" * 5000):
        save(base_model=name, task=kind)
        for command in ("convert", "merge"):
            assert re.search("cannot (build the model|load the tokenizer)", one_line(unilora(*COMMANDS[command])))


def test_names_of_timm_and_of_the_hub_are_taken():
    from unilora_cli.tasks.models import HUB, TIMM

    for name in ("vit_base_patch16_224.augreg_in21k", "hf-hub:timm/vit", "hf_hub:timm/vit@v1", "a/b", "HF-HUB:a/b@x/y"):
        assert TIMM.fullmatch(name)
    for name in ("gpt2", "meta-llama/Llama-3.2-1B", "FacebookAI/roberta-base"):
        assert HUB.fullmatch(name)


# ---- headers ----------------------------------------------------------------------------------------------------

DEEP = "[" * 10**5
HEADERS = {
    "targets": (DEEP, "{}", "[1]", '[["q"]]', '[["q", "q", "0", false]]', '[["z", "q", 0, false]]', "\x1b", "[[]]"),
    "modules_to_save": (DEEP, '"head"', "[1]", '{"a": 1}', '["a", "a"]', '[""]', "[[]]"),
    "labels": (DEEP, '"ab"', "[1, 2]", '{"0": "a"}', "[null]", "1e999", '["a", ["b"]]', "NaN"),
    "base": (DEEP, "[]", "1", '{"class": 1}', '{"class": "X", "name": null, "embeddings": 1, "values": ""}'),
    "base_arguments": (
        *(DEEP, "[]", '"x"', '{"arguments": []}', '{"arguments": null}', '{"seed": "0"}', '{"seed": 1.5}'),
        *('{"pretrained": 1}', '{"checkpoint": 1}', '{"other": 1}', '{"seed": 1' + "0" * 5000 + "}"),
    ),
    "task": ("audio", "", ESCAPE, "["),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("entry", "text"), [(entry, text) for entry, texts in HEADERS.items() for text in texts])
def test_an_entry_of_a_header_that_is_wrong_is_named(unilora, command, entry, text):
    save(**({"base_model": "tiny", "task": "vit"} | {entry: text}))
    error = one_line(unilora(*COMMANDS[command]))
    assert f"adapter.safetensors: {'its targets' if entry == 'targets' else entry}" in error
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["convert", "merge"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 10**9},
        {"num_classes": "2"},
        {"drop_rate": "a"},
        {"depth": 0},
        {"img_size": [32, 32, 32]},
        {"img_size": 10**6},
        {"global_pool": "evil"},
    ],
)
def test_a_setting_of_another_type_or_size_is_named(unilora, command, arguments):
    pytest.importorskip("timm")
    save(base_model="vit_tiny_patch16_224", task="vit", base_arguments=json.dumps({"arguments": arguments}))
    assert f"adapter.safetensors: base_arguments.{next(iter(arguments))}" in one_line(unilora(*COMMANDS[command]))


@pytest.mark.parametrize("seed", [2**70, -(2**70)])
def test_a_seed_that_torch_does_not_take(unilora, seed):
    pytest.importorskip("timm")
    save(base_model="vit_tiny_patch16_224", task="vit", base_arguments=json.dumps({"seed": seed}))
    assert "base_arguments.seed: expected an integer below 2^64" in one_line(unilora(*COMMANDS["merge"]))


# ---- folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """make(modules, **config): a LoRA folder."""

    def make(modules=("model.layers.0.self_attn.q_proj",), **changes):
        (tmp_path / "lora").mkdir(exist_ok=True)
        blocks = {name: [(np.ones((2, 4), np.float32), np.ones((4, 2), np.float32), 0)] for name in modules}
        state, rank = lora_state(blocks, dict.fromkeys(modules, 4))
        save_file(state, tmp_path / "lora/adapter_model.safetensors")
        config = lora_config(modules, rank, base_model="org/base") | changes
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
        return tmp_path / "lora"

    return make


FIELDS = {"r": ["2"], "target_modules": 5, "modules_to_save": {"a": 1}, "base_model_name_or_path": ["a"], "bias": 1}
FIELDS |= {"peft_type": ["LORA"], "task_type": {}, "use_dora": "yes", "alpha_pattern": [1]}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_folder_of_another_type(unilora, folder, field):
    folder(**{field: FIELDS[field]})
    for words in (("check", "lora"), ("convert", "lora", "out.safetensors", "--to", "unilora")):
        assert f"lora/adapter_config.json: {field}: expected " in one_line(unilora(*words))


def test_a_folder_that_cannot_be_read(unilora, folder, tmp_path):
    config, weights = (folder() / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    whole = weights.read_bytes()
    for data, broken in ((b"[" * 10**5, whole), (b'"\xff"', whole), (b"", whole), (b"{}", whole[:50]), (b"{}", b"")):
        config.write_bytes(data)
        weights.write_bytes(broken)
        for words in (("check", "lora"), ("convert", "lora", "out.safetensors", "--to", "unilora")):
            assert ": not " in one_line(unilora(*words))
    assert not (tmp_path / "out.safetensors").exists()


def test_the_number_of_classes_comes_from_a_head_that_is_there(unilora, folder, tmp_path, bert):
    """A tensor of no values can have any number of rows."""
    pytest.importorskip("transformers")
    (folder(task_type="SEQ_CLS", base_model_name_or_path=str(bert)) / "adapter_model.safetensors").unlink()
    empty = {"base_model.model.classifier.weight": np.zeros((2**40, 0), np.float32)}
    save_file(empty, tmp_path / "lora/adapter_model.safetensors")
    assert "expected peft_type UNILORA" in one_line(unilora("convert", "lora", "out.safetensors", "--to", "unilora"))


# ---- what is printed --------------------------------------------------------------------------------------------

FAKE = f"x{ESCAPE}\nunilora: all is well\r\u202e"


def printed(result):
    """The output of a command, which holds no control character but its own line breaks."""
    assert all(line.isprintable() for text in (result.out, result.err) for line in text.split("\n")), result
    assert not re.search(r"^unilora: all is well", result.out + result.err, re.MULTILINE)
    return result


def test_inspect_prints_a_file_escaped(unilora):
    spec = ProjectionSpec(Layout([(f"q{FAKE}.A", (1, 8)), (f"q{FAKE}.B", (8, 1))]), 4)
    facts = {"base_model": FAKE, "task": "vit", "labels": json.dumps([FAKE]), "written_by": FAKE, FAKE: FAKE}
    head = {f"head{FAKE}": np.ones(2, np.float32)}
    save_adapter("adapter.safetensors", spec, spec.init(), tensors=head, metadata=facts)
    shown = printed(unilora("inspect", "adapter.safetensors"))
    assert shown.code == 0, shown.err
    assert shown.out.count(r"x\x1b[31m\x9b2J\x07\nunilora: all is well\r\u202e") == 5
    assert json.loads(printed(unilora("inspect", "adapter.safetensors", "--json")).out)["metadata"][FAKE] == FAKE


def test_a_column_of_a_table_is_no_wider_than_a_message(unilora):
    """Every row is filled up to the longest: one long name beside many short ones would fill the terminal's memory."""
    names = ["x" * 50_000, *(f"b{i}x" for i in range(1000))]
    spec = ProjectionSpec(Layout([(f"{name}.{f}", s) for name in names for f, s in (("A", (1, 2)), ("B", (2, 1)))]), 4)
    save_adapter("adapter.safetensors", spec, spec.init())
    assert len(unilora("inspect", "adapter.safetensors").out) < 10**6


def test_errors_print_a_file_escaped(unilora):
    for facts in ({"task": FAKE}, {"base_model": FAKE, "task": "vit"}, {"labels": FAKE}, {"base_model": FAKE}):
        save(**facts)
        for words in (*COMMANDS.values(), ("--debug", *COMMANDS["merge"])):
            printed(unilora(*words))


def test_check_prints_a_folder_escaped_and_quoted(unilora, folder, tmp_path):
    folder([f"model.layers.0.{FAKE}"], bias=FAKE, target_modules=FAKE, modules_to_save=[FAKE])
    assert r"\x1b[31m" in printed(unilora("check", "lora", "--engine", "sglang")).out
    folder(base_model_name_or_path="x; touch RAN; $(touch RAN)`touch RAN`")
    out = printed(unilora("check", "lora")).out
    (line,) = [line for line in out.splitlines() if line.startswith("  vllm serve")]
    assert shlex.split(line)[2] == "x; touch RAN; $(touch RAN)`touch RAN`"
    assert not (tmp_path / "RAN").exists()


def test_the_line_that_loads_a_merged_model_is_python(unilora, trained, tmp_path):
    timm = pytest.importorskip("timm")
    name = "a\"b\\n'\x1b[31m"
    result = printed(unilora("merge", trained("vit")[0] / "adapter.safetensors", "--out", name))
    assert result.code == 0, result.err
    line = next(line.strip() for line in result.out.splitlines() if line.startswith("  timm."))
    assert eval(line, {"timm": timm}).num_classes == 3


# ---- recipes ----------------------------------------------------------------------------------------------------

RECIPES = {
    "deep": f"task = {'[' * 10**5}",
    "deep tables": "task = 'text'\nrank = " + "{a = " * 10**4,
    "a list as the task": 'task = ["text"]',
    "a table as the task": "[task]\nof = 1",
    "about no text": 'task = "text"\nabout = ["a"]',
    "a date": 'task = "text"\nrank = 1979-05-27',
    "a time as a text": 'task = "text"\nmodel = 07:32:00',
    "too many digits": f'task = "text"\nrank = {"9" * 5000}',
    "too many digits of another base": f'task = "text"\nrank = 0x{"f" * 5000}',
    "a huge task": f"task = 0x{'f' * 5000}",
    "a huge integer": f'task = "text"\nmodel = "m"\ndata = "d"\nepochs = 1{"0" * 30}',
    "a huge seed": f'task = "text"\nmodel = "m"\ndata = "d"\nseed = 1{"0" * 30}',
    "NaN": 'task = "text"\nlora-rate = nan',
    "infinity": 'task = "text"\nlora-rate = inf',
    "nested lists": 'task = "text"\ntargets = [["a"]]',
    "a table in a list": 'task = "text"\ntargets = [{a = 1}]',
    "a table": 'task = "text"\n[rank]\nof = 1',
    "a null character": 'task = "text"\nmodel = "a\\u0000b"\ndata = "d"',
    "an escape": 'task = "text"\n"\\u001b[31m" = 1',
    "a strange home": 'task = "text"\nmodel = "m"\ndata = "~nobody-here/x.tsv"',
    "a key twice": 'task = "text"\nrank = 1\nrank = 2',
    "a long value": f'task = "text"\nrank = "{"x" * 10**5}"',
    "a long key": f'task = "text"\n{"x" * 10**5} = 1',
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_one_line(unilora, tmp_path, case):
    (tmp_path / "my.toml").write_text(RECIPES[case])
    assert one_line(unilora("finetune", "text", "--recipe", "my.toml", "--out", "run"))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_no_text(unilora, tmp_path):
    (tmp_path / "my.toml").write_bytes(b'task = "\xff"')
    for words in (("recipes", "my.toml"), ("finetune", "text", "--recipe", "my.toml")):
        assert "my.toml: not TOML ('utf-8' codec" in one_line(unilora(*words))
    (tmp_path / "my.toml").write_text('task = "text"\nabout = "a\tb" # \x9b2J')
    assert unilora("recipes", "my.toml").out == 'task = "text"\nabout = "a\tb" # \\x9b2J\n'


def test_a_prompt_of_a_recipe_names_columns_only(unilora, tmp_path, llama, dialogues):
    """A format of Python's could fill any memory, or reach into what is formatted."""
    for prompt in ("{instruction:>999999999}", "{instruction!r}", "{instruction:{output}}"):
        (tmp_path / "my.toml").write_text(f'task = "lm"\nprompt = "{prompt}"\nresponse-column = "output"\n')
        words = ("--recipe", "my.toml", "--model", llama, "--data", dialogues, "--out", "run")
        error = one_line(unilora("finetune", "lm", *words))
        assert "--prompt: expected the name of a column alone in {instruction…}, as {column}." in error
    for prompt in ("{instruction.__class__}", "{instruction[0]}", "{0}", "{}"):
        (tmp_path / "my.toml").write_text(f'task = "lm"\nprompt = "{prompt}"\nresponse-column = "output"\n')
        assert "there is no column" in one_line(unilora("finetune", "lm", *words))


# ---- arguments and data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["[" * 300, "-" * 10**5 + "1", "(" * 10**5, "{[]: 1}", "a\0b", "\x1b", "1_", "{1,2}[0]"]
)
def test_a_value_that_python_cannot_read_is_a_text_or_a_wrong_usage(unilora, tmp_path, value):
    pytest.importorskip("timm")
    words = ("finetune", "vit", "--model", "vit_tiny_patch16_224", "--data", tmp_path / "none", "--out", "run")
    result = unilora(*words, "--model-arg", f"key={value}")
    if result.code == 1:
        assert "none: no such folder" in one_line(result)
    else:
        assert result.code == 2
        assert "argument --model-arg: key: a value nested too deeply, " in result.err
        assert len(result.err) < 10_000


DEEP_ROW = '{"sentence": ' + "[" * 5000 + "]" * 5000 + ', "label": 1}\n'
RECORDS = {
    "deep": DEEP_ROW + DEEP_ROW,
    "a number too long": '{"sentence": "a", "label": ' + "1" * 5000 + "}\n",
    "lists as labels": '{"sentence": "a", "label": [1]}\n{"sentence": "b", "label": {"a": 1}}\n',
    "labels that are only nearly numbers": '{"sentence": "a", "label": "²"}\n{"sentence": 1, "label": "--5"}\n',
    "texts that are none": '{"sentence": {"a": ["\x7f"]}, "label": 1}\n{"sentence": "b", "label": 2}\n',
}


@pytest.mark.parametrize("case", RECORDS)
def test_hostile_records_are_one_line(unilora, tmp_path, bert, case):
    (tmp_path / "data.jsonl").write_text(RECORDS[case])
    for words in ((), ("--regression",)):
        result = unilora("finetune", "text", "--model", bert, "--data", "data.jsonl", "--out", "run", *words)
        assert one_line(result).startswith("unilora: error: data.jsonl")


# ---- the state of an interrupted run ----------------------------------------------------------------------------


@pytest.fixture
def interrupted(unilora, images, vit_model, monkeypatch):
    """The words of a run that was interrupted after its first epoch, of three steps."""
    pytest.importorskip("timm")
    from unilora_cli.training import recorder as report

    words = ("finetune", "vit", *vit_model, "--data", images, "--device", "cpu", "--batch-size", 8, "--out", "run")
    save_state = report.Recorder.checkpoint

    def stop(recorder, step, growth):
        save_state(recorder, step, growth)
        if step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.Recorder, "checkpoint", stop)
        assert unilora(*words).code == 130
    shutil.copytree("run", "kept")
    return words


STRANGE = (None, 1, "x", [], {}, [1], {"a": 1}, float("nan"), [[1, 2]], [{}], ["x", 1, 2])


def refused(unilora, words):
    """Whether the run is not gone on with; then that is said in a line."""
    result = unilora(*words, "--resume")
    if result.code:
        assert "run" in one_line(result)
    return bool(result.code)


def test_a_strange_state_of_a_run_is_one_line(unilora, interrupted, tmp_path):
    path = tmp_path / "run/unilora-training/checkpoint-3/run.json"
    whole = json.loads(path.read_text())
    tries = [whole | {name: value} for name in whole for value in STRANGE]
    tries += [{key: value for key, value in whole.items() if key != name} for name in whole]
    tries += [whole | {"more": 1}, whole | {"spec": DEEP}, whole | {"spec": {"seed": 0}}, [], 1]
    tries += [whole | {"files": ["none.pt"]}, whole | {"files": ["../../metrics.json/x"]}]
    count = 0
    for contents in tries:
        path.write_text(json.dumps(contents))
        count += refused(unilora, interrupted)
        restore(tmp_path / "run", path, whole)
    assert count > len(tries) - 20  # numbers such as seconds = 1 are as good as others


def restore(run, path, whole):
    """As the run was, if one of the tries was gone on with, and ended."""
    if not path.exists():
        shutil.rmtree(run)
        shutil.copytree(run.with_name("kept"), run)
    path.write_text(json.dumps(whole))


def test_strange_tensors_of_a_run_are_one_line(unilora, interrupted, tmp_path):
    """What the Trainer wrote: the generators, the optimiser, the schedule, and its own state."""
    import torch

    place = tmp_path / "run/unilora-training/checkpoint-3"
    names = ("rng_state.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json")
    for name in names:
        before = (place / name).read_bytes()
        for contents in (b"", b"x" * 100, before[:200], pickle.dumps(Mark())):
            (place / name).write_bytes(contents)
            assert refused(unilora, interrupted), name
        (place / name).write_bytes(before)
    for name in names[:2]:
        before = (place / name).read_bytes()
        for contents in STRANGE:
            torch.save(contents, place / name)
            assert refused(unilora, interrupted), (name, contents)
        (place / name).write_bytes(before)
    assert not (tmp_path / "RAN").exists()
    assert not refused(unilora, interrupted)


# ---- writing ----------------------------------------------------------------------------------------------------


def test_files_of_a_run_keep_the_links_that_lead_to_them(unilora, trained, images, vit_model, tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    names = ("metrics.json", "summary.csv", "loss.png", "predictions.csv", "confusion.csv", "confusion.png")
    for name in (*names, "metrics.csv", "adapter.safetensors"):
        (tmp_path / "disk" / name).write_text("old")
        if name != "adapter.safetensors":  # --overwrite takes that one away first
            (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    result = unilora(
        *("finetune", "vit", *vit_model, "--data", images, "--device", "cpu", "--max-steps", 1, "--out", "run")
    )
    assert result.code == 0, result.err
    for name in (*names, "metrics.csv"):
        assert (tmp_path / "run" / name).is_symlink()
        assert (tmp_path / "disk" / name).read_bytes() != b"old"
    assert not list(tmp_path.rglob(".unilora-*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without room is wanted")
def test_a_line_that_finds_no_room_names_its_file(unilora, images, vit_model, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    from unilora_cli.training import recorder as report

    begin = report.Recorder._open

    def on_a_full_disk(recorder, fresh):
        begin(recorder, fresh)
        (tmp_path / "run/metrics.csv").unlink()
        (tmp_path / "run/metrics.csv").symlink_to("/dev/full")

    monkeypatch.setattr(report.Recorder, "_open", on_a_full_disk)
    result = unilora("finetune", "vit", *vit_model, "--data", images, "--device", "cpu", "--out", "run")
    said = "unilora: error: the adapter is in run/adapter.safetensors, but this could not be written: metrics.csv ("
    assert one_line(result).startswith(said)
    assert "metrics.csv cannot be written (No space left on device); going on" in result.out
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("kind", ["vit", "lm"])
def test_a_merge_that_fails_at_its_end_leaves_nothing(unilora, trained, tmp_path, monkeypatch, kind):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timm.models, "save_for_hf", full)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    result = unilora("merge", trained(kind)[0] / "adapter.safetensors", "--out", "merged")
    assert result.code == 1
    assert result.err.splitlines()[-1] == "unilora: error: merged: No space left on device"
    assert list(tmp_path.iterdir()) == []
