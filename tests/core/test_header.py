"""What a header says beside its spec: written, read, and refused where it has another structure or does not fit."""

import base64
import dataclasses
import json
import typing

import numpy as np
import pytest

from unilora_core import CorruptFileError, Layout, ProjectionSpec, read_adapter, save_adapter
from unilora_core.header import (
    SETTINGS,
    BaseArguments,
    BaseIdentity,
    TargetRow,
    read_header,
    read_identity,
    write_targets,
)
from unilora_core.lora import lora_layout

LAYERS = [("q", 5, 7), ("up", 5, 6, 3), ("shift", 4, 2, 0)]
ROWS = [("q", "attn.q", 2, True), ("up", "experts", 0, False, "up"), ("shift", "", 0, False, "shift")]
PLAIN = Layout([("x.A", (2, 5)), ("x.B", (7, 2))])


@pytest.fixture
def said(tmp_path):
    """said(layout, entry=text, …): the header of a file that says so."""

    def read(layout=PLAIN, **entries):
        path = tmp_path / "a.safetensors"
        save_adapter(path, ProjectionSpec(layout, 4), np.zeros(4, np.float32), metadata=entries)
        return read_header(path, read_adapter(path))

    return read


def refused(said, match, **entries):
    with pytest.raises(CorruptFileError, match=match) as caught:
        said(**entries)
    assert "a.safetensors: " in str(caught.value)
    assert len(str(caught.value)) < 2000


# ---- targets --------------------------------------------------------------------------------------------------------


def test_the_layout_of_stacked_matrices():
    layout = lora_layout(LAYERS, rank=2)
    assert layout.shapes == {
        "q.A": (2, 5),
        "q.B": (7, 2),
        "up.A": (3, 2, 5),
        "up.B": (3, 6, 2),
        "shift.A": (2, 4),
        "shift.B": (2, 2),
    }


def test_rows_come_back(said):
    header = said(lora_layout(LAYERS, rank=2), **write_targets(ROWS, ["head"]))
    assert header.modules_to_save == ("head",)
    assert header.targets == (
        TargetRow("q", "attn.q", 2, 5, 7, 2, True),
        TargetRow("up", "experts", 2, 5, 6, 0, False, "up", 3),
        TargetRow("shift", "", 2, 4, 2, 0, False, "shift"),
    )


def test_a_file_that_says_nothing(said):
    header = said()
    assert header.targets == (TargetRow("x", "x", 2, 5, 7),)
    assert (header.modules_to_save, header.labels, header.base_arguments) == ((), (), BaseArguments())
    assert (header.base, header.base_model, header.base_class, header.task) == (None,) * 4
    assert header.where.endswith("a.safetensors")


@pytest.mark.parametrize(
    ("shapes", "row"),
    [
        ([("x.A", (2, 5)), ("x.B", (7, 3))], ("x", "x", 0, False)),  # two ranks
        ([("x.A", (3, 2, 5)), ("x.B", (4, 7, 2))], ("x", "x", 0, False, "w")),  # two numbers of experts
        ([("x.A", (3, 2, 5)), ("x.B", (3, 7, 2))], ("x", "x", 0, False)),  # a stack beside a layer
        ([("x.A", (1, 3, 2, 5)), ("x.B", (1, 3, 7, 2))], ("x", "x", 0, False, "w")),
        ([("x.A", (5,)), ("x.B", (7, 1))], ("x", "x", 0, False)),
        ([("x.A", (1, 5)), ("x.B", (7,))], ("x", "x", 0, False)),
        ([("x.A", (4,) + (1,) * 1000), ("x.B", (4,) + (1,) * 1000)], ("x", "x", 0, False)),
        ([("x.A", (2, 5)), ("x.B", (7, 2))], ("y", "x", 0, False)),
        ([("x.A", (2, 5)), ("x.B", (7, 2))], ("x", "x", 0)),
        ([("x.A", (2, 5)), ("x.B", (7, 2))], ("x", "x", 0, False, "w", 1)),
    ],
)
def test_rows_that_do_not_fit(said, shapes, row):
    with pytest.raises(CorruptFileError, match="its targets do not fit its layout") as caught:
        said(Layout(shapes), **write_targets([row]))
    assert len(str(caught.value)) < 500


ROW = ["x", "x", 0, False]


@pytest.mark.parametrize(
    "targets",
    [
        [],
        {},
        0,
        False,
        "x",
        [[]],
        [ROW, ROW],
        [{"name": "x"}],
        [["x", "x", True, False]],
        [["x", "x", 0.0, False]],
        [["x", "x", "0", False]],
        [["x", "x", 0, 0]],
        [["x", None, 0, False]],
        [["x", ["x"], 0, False]],
        [["x", "x", 0, False, None]],
        [["x", "x", 0, False, ["w"]]],
        [[["x"], "x", 0, False]],
    ],
)
def test_targets_of_another_structure(said, targets):
    refused(said, "its targets do not fit its layout", targets=json.dumps(targets))


def test_no_entry_and_null_are_the_same(said):
    assert said(targets="null").targets == said().targets


# ---- the other entries ----------------------------------------------------------------------------------------------


STRUCTURES = [None, 0, True, 1.5, "a", {}, [1], [["a"]], [None], {"a": 1}]
DEEP = ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, "nul", ""]


@pytest.mark.parametrize("name", ["targets", "modules_to_save", "labels", "base_arguments", "base"])
@pytest.mark.parametrize("text", DEEP, ids=range(len(DEEP)))
def test_what_is_no_json(said, name, text):
    refused(said, f"a.safetensors: (its {name}|{name}).*not JSON that can be read", **{name: text})


@pytest.mark.parametrize("name", ["modules_to_save", "labels"])
@pytest.mark.parametrize("value", STRUCTURES)
def test_names_of_another_structure(said, name, value):
    refused(said, rf"{name}(\[0\])?: expected a (list of a )?string", **{name: json.dumps(value)})


@pytest.mark.parametrize("value", [["a", "a"], ["a", ""], ["a", "b", "a"]])
def test_modules_to_save_are_different_modules(said, value):
    refused(said, "modules_to_save: expected the names of different modules", modules_to_save=json.dumps(value))


def test_labels_may_repeat(said):
    assert said(labels=json.dumps(["", "a", "a", "\x1b[2J"])).labels == ("", "a", "a", "\x1b[2J")


@pytest.mark.parametrize("value", ["", "LM", "vit ", "null", "['vit']"])
def test_another_task(said, value):
    refused(said, "task: expected 'vit' or 'text' or 'lm', got", task=value)


@pytest.mark.parametrize(
    "value", [*(v for v in STRUCTURES if v != {}), {"pretrained": 1}, {"seed": "0"}, {"seed": -1}, {"seed": 2**64}]
)
def test_base_arguments_of_another_structure(said, value):
    refused(said, "base_arguments", base_arguments=json.dumps(value))


@pytest.mark.parametrize(
    "value", [{"arguments": []}, {"arguments": None}, {"checkpoint": 3}, {"seed": 1.0}, {"code": "x"}]
)
def test_base_arguments_of_another_kind(said, value):
    refused(said, "base_arguments", base_arguments=json.dumps(value))


# ---- the identity of the base ---------------------------------------------------------------------------------------


IDENTITY = {"class": "Llama", "name": None, "embeddings": [[31, 16]], "values": base64.b64encode(b"\0\1\2\3").decode()}


def test_an_identity_comes_back(said):
    found = said(base=json.dumps(IDENTITY)).base
    assert found == BaseIdentity("Llama", None, ((31, 16),), IDENTITY["values"])
    assert found == read_identity(json.dumps(IDENTITY), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"class": None},
        {"name": 3},
        {"embeddings": [[31]]},
        {"embeddings": [["31", 16]]},
        {"embeddings": 31},
        {"embeddings": [[31, 16.0]]},
        {"values": None},
        {"values": "AAA"},
        {"values": "AA=="},
        {"values": "%%%%"},
        {"values": "ääää"},
        {"values": "AAAA\n"},
        {"more": 1},
        {"kind": "Llama"},
    ],
)
def test_an_identity_of_another_structure(said, change):
    refused(said, "base", base=json.dumps(IDENTITY | change))


@pytest.mark.parametrize("gone", IDENTITY)
def test_an_identity_that_lacks_something(said, gone):
    refused(
        said, "base: expected the fields", base=json.dumps({name: IDENTITY[name] for name in IDENTITY if name != gone})
    )


@pytest.mark.parametrize("value", STRUCTURES)
def test_an_identity_that_is_none(said, value):
    refused(said, "base: expected", base=json.dumps(value))


# ---- settings of the base -------------------------------------------------------------------------------------------


def settings(said, given=(), **arguments):
    return said(base_arguments=json.dumps({"arguments": arguments})).settings(given)


DANGEROUS = {
    "trust_remote_code": True,
    "auto_map": {"AutoModel": "evil.X"},
    "code_revision": "main",
    "revision": "main",
    "token": "x",
    "use_auth_token": True,
    "proxies": {"http": "http://localhost:9"},
    "cache_dir": "/",
    "local_files_only": False,
    "subfolder": "../..",
    "gguf_file": "x.gguf",
    "variant": "x",
    "use_safetensors": False,
    "weights_only": False,
    "state_dict": {},
    "config": "/x",
    "attn_implementation": "org/kernel",
    "quantization_config": {},
    "load_in_4bit": True,
    "device_map": "auto",
    "offload_folder": "/x",
    "max_memory": {"0": 1},
    "torch_dtype": "float32",
    "dtype": "float32",
    "tp_plan": "auto",
    "adapter_kwargs": {},
    "checkpoint_path": "/x",
    "pretrained_cfg": {"url": "http://localhost:9"},
    "pretrained_cfg_overlay": {"file": "/x"},
    "pretrained": True,
    "kernel_config": "org/kernel",
    "use_kernels": True,
    "scriptable": True,
    "features_only": True,
    "__class__": "x",
    "": 1,
}


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_setting_that_only_the_caller_may_give(said, name):
    with pytest.raises(CorruptFileError, match=rf"a.safetensors: it asks for {name} = .*give {name} yourself"):
        settings(said, num_labels=3, **{name: DANGEROUS[name]})
    assert settings(said, given=[name], num_labels=3, **{name: DANGEROUS[name]}) == {"num_labels": 3}


def kinds_of(kind):
    """The plain types in a declared one."""
    return (
        set().union(*map(kinds_of, typing.get_args(kind)))
        if typing.get_args(kind)
        else {kind if isinstance(kind, type) else type(kind)}
    )


def test_no_setting_can_name_a_place_or_code():
    """Free strings would; words of a list do not."""
    assert all(typing.get_origin(kind) is typing.Literal or str not in kinds_of(kind) for kind in SETTINGS.values())
    assert not set(SETTINGS) & set(DANGEROUS)


@pytest.mark.parametrize(
    "right",
    [
        {"num_labels": 3, "problem_type": "regression", "pad_token_id": 0, "hidden_dropout_prob": 0.1},
        {"num_classes": 21_841, "img_size": 384, "global_pool": "avg", "drop_path_rate": 0, "depth": 2, "in_chans": 1},
        {"img_size": [224, 96], "global_pool": "", "ignore_mismatched_sizes": True},
        {},
    ],
)
def test_settings_that_a_file_may_state(said, right):
    found = settings(said, **right)
    assert found == right | ({"img_size": (224, 96)} if isinstance(right.get("img_size"), list) else {})
    assert not found or settings(said, given=list(right)[:1], **right) == dict(list(found.items())[1:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_labels", "3"),
        ("num_labels", 3.0),
        ("num_labels", True),
        ("num_labels", 0),
        ("num_labels", -1),
        ("num_labels", 2**16 + 1),
        ("num_classes", 10**30),
        ("depth", 65),
        ("in_chans", 257),
        ("img_size", 4097),
        ("img_size", [224, 4097]),
        ("img_size", [224]),
        ("img_size", [224, 224, 224]),
        ("img_size", None),
        ("global_pool", "x"),
        ("global_pool", ["avg"]),
        ("dropout", "0.1"),
        ("dropout", -0.1),
        ("attn_drop_rate", 1.5),
        ("hidden_dropout_prob", 1e308),
        ("pad_token_id", -1),
        ("pad_token_id", 2**31 + 1),
        ("pad_token_id", None),
        ("ignore_mismatched_sizes", 1),
        ("problem_type", "x"),
    ],
)
def test_a_setting_of_another_type_or_size(said, name, value):
    with pytest.raises(CorruptFileError, match=rf"a.safetensors: base_arguments\.{name}(\[\d\])?: expected ") as caught:
        settings(said, **{name: value})
    assert len(str(caught.value)) < 300


def test_a_header_is_frozen(said):
    with pytest.raises(dataclasses.FrozenInstanceError):
        said().base_model = "other"
