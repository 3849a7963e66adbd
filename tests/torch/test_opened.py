"""A file, checked against a model before anything of its size is made: ranks, rows, heads; whoever opens it."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from small_models import assert_unchanged, mlp, snapshot
from torch import nn

import unilora_torch
from unilora_core import CorruptFileError, Layout, MismatchError, ProjectionSpec, TargetError, ValuesError, save_adapter
from unilora_core.lora import largest_rank, lora_layout
from unilora_torch.checks import check_targets
from unilora_torch.opened import open_file
from unilora_torch.targets import Target


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def wrote(path, layers, rank, tensors=None, d=1, **metadata):
    """An adapter file of these layers, and what its header says beside."""
    spec = ProjectionSpec(lora_layout(layers, rank), d)
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    save_adapter(path, spec, spec.init(), tensors=tensors, metadata=texts)
    return path


def everybody(path, model):
    """Each way to open a file, on a model of its own."""
    yield lambda: unilora_torch.load(model(), path)
    yield lambda: unilora_torch.Bank(model()).add("x", path)
    yield lambda: unilora_torch.attach(model(), ["head"], d=1).swap(path)


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_that_a_file_may_have():
    assert [largest_rank(*sizes) for sizes in ((4096, 4096), (4096, 100), (4096, 8), (1, 1))] == [4096, 100, 64, 64]


@pytest.mark.parametrize("rank", [65, 2**20, 2**40])
def test_a_rank_beyond_the_layer_costs_nothing(path, rank):
    wrote(path, [("head", 6, 3)], rank)
    assert path.stat().st_size < 1000
    for opens in list(everybody(path, mlp))[:2]:
        tracemalloc.start()
        with pytest.raises(MismatchError, match=rf"head: expected a rank of at most 64 for 6 inputs and 3.*has {rank}"):
            opens()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


def test_any_rank_where_it_is_asked_for(path):
    wrote(path, [("head", 6, 3)], 65)
    assert unilora_torch.load(mlp(), path, any_rank=True).spec.D == 65 * 9
    unilora_torch.Bank(mlp()).add("x", path, any_rank=True)


def test_an_adapter_of_usual_rank_on_a_narrow_layer_is_its_own_file(path):
    unilora_torch.attach(mlp(), ["head"], rank=64, d=5).save(path)
    assert unilora_torch.load(mlp(), path).spec.D == 64 * 9


def test_many_blocks_of_one_layer_are_bounded_together(path):
    layers = [(f"b{i}", 16, 1) for i in range(16)]
    rows = [[f"b{i}", "0", i, False] for i in range(16)]
    wrote(path, layers, 16, targets=rows)
    unilora_torch.load(nn.Sequential(nn.Linear(16, 16)), path)
    wrote(path, layers, 17, targets=rows)
    with pytest.raises(MismatchError, match=r"0: expected blocks whose ranks add up to at most 256, .* to 272"):
        unilora_torch.load(nn.Sequential(nn.Linear(16, 16)), path)
    assert unilora_torch.load(nn.Sequential(nn.Linear(16, 16)), path, any_rank=True).spec.D == 17 * 17 * 16


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_thousands_of_blocks_are_compared_once_each(monkeypatch):
    layer = nn.Sequential(nn.Linear(2, 4000))
    targets = [Target(f"b{i}", "0", 2, 1, i) for i in reversed(range(4000))]
    reads = 0

    class Counted(Target):
        def __getattribute__(self, name):
            nonlocal reads
            reads += name == "first_row"
            return super().__getattribute__(name)

    check_targets(layer, [Counted(**vars(target)) for target in targets])
    assert reads < 100 * len(targets)
    with pytest.raises(TargetError, match=r"b7 and x adapt the same outputs of 0|x and b7 adapt the same outputs of 0"):
        check_targets(layer, [*targets, Target("x", "0", 2, 1, 7)])


def test_a_name_that_occurs_twice_is_found_in_linear_time():
    names = [f"n{i}" for i in range(50_000)]
    comparisons = 0

    class Name(str):
        def __eq__(self, other):
            nonlocal comparisons
            comparisons += 1
            return str(self) == str(other)

        __hash__ = str.__hash__

    with pytest.raises(ValueError, match="the name 'n49999' occurs twice"):
        Layout((Name(name), (1, 1)) for name in [*names, "n49999"])
    assert comparisons < 20 * len(names)


# ---- heads ----------------------------------------------------------------------------------------------------------


def head(dtype, value=1):
    return {"head.weight": np.full((3, 6), value).astype(dtype), "head.bias": np.zeros(3, dtype)}


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8])
def test_a_head_of_another_kind_of_number(path, dtype):
    wrote(path, [("blocks.0.up", 6, 12)], 2, head(dtype), modules_to_save=["head"])
    model = mlp()
    before = snapshot(model)
    with pytest.raises(
        MismatchError, match=r"head\.(weight|bias): the file holds torch\.\w+, the model expects torch\.float32"
    ):
        unilora_torch.load(model, path)
    assert_unchanged(model, before)


def test_a_head_that_the_models_dtype_cannot_hold(path):
    wrote(path, [("blocks.0.up", 6, 12)], 2, head(np.float32, 1e6), modules_to_save=["head"])
    with pytest.raises(ValuesError, match=r"head\.weight: 18 of its 18 values are NaN or infinite as torch\.float16"):
        unilora_torch.load(mlp().half(), path)
    unilora_torch.load(mlp().bfloat16(), path)


def test_a_head_of_nan_is_neither_written_nor_read(path):
    adapter = unilora_torch.attach(mlp(), ["blocks.0.up"], d=5, modules_to_save=["head"])
    adapter.save(path)
    before = path.read_bytes()
    with torch.no_grad():
        adapter.model.head.weight[1, 2] = float("nan")
    with pytest.raises(ValuesError, match=r"1 of the 18 values of head\.weight are NaN or infinite"):
        adapter.save(path)
    assert path.read_bytes() == before


def test_tensors_are_given_to_their_modules_in_one_pass(path):
    """A module's name may begin another's, and neither gets the other's tensors."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 3), "up": nn.Linear(4, 4)})
    state = {name: value.numpy() for name, value in model.state_dict().items() if not name.startswith("up")}
    wrote(path, [("up", 4, 4)], 1, state, modules_to_save=["a", "ab"])
    heads = open_file(path, model).heads
    assert {name: set(each) for name, each in heads.items()} == {"a": {"weight", "bias"}, "ab": {"weight", "bias"}}
    assert heads["ab"]["weight"].shape == (3, 2)


def test_a_head_that_cannot_train_is_refused_where_the_model_has_its_values(path):
    state = {f"head.{name}": value.numpy() for name, value in mlp().head.state_dict().items()}
    wrote(path, [("blocks.0.up", 6, 12)], 1, state, modules_to_save=["head"])
    model = mlp()
    model.tied = nn.Linear(6, 3)
    model.tied.weight = model.head.weight
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"modules_to_save: head\.weight is tied, it is also tied\.weight"):
        unilora_torch.load(model, path)
    assert_unchanged(model, before)
    assert set(open_file(path, mlp().to("meta"), loaded=False).heads) == {"head"}


# ---- what else a header may say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"modules_to_save": ["head", "head"]}, "names of different modules"),
        ({"modules_to_save": "head"}, "modules_to_save: expected a list of a string"),
        ({"base": {"class": 1, "name": None, "embeddings": [], "values": ""}}, "base.kind: expected a string"),
        ({"base": {"class": "x", "name": None, "embeddings": [[1]], "values": ""}}, "embeddings"),
        ({"base": {"class": "x", "name": None, "embeddings": [], "values": "!"}}, "base64"),
        ({"labels": {"a": 1}}, "labels: expected a list of a string"),
        ({"targets": [["head", "head", 0.0, False]]}, "targets do not fit its layout"),
    ],
)
def test_headers_of_strangers(path, said, message):
    wrote(path, [("head", 6, 3)], 1, **said)
    for opens in everybody(path, mlp):
        with pytest.raises(CorruptFileError, match=message):
            opens()
