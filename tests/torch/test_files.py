"""save and load: the same predictions on the right model, a named error and no change on every other."""

import json

import numpy as np
import pytest
import torch
from small_models import Block, Mlp, adapted, assert_unchanged, mlp, move, snapshot
from torch import nn

import unilora_core
import unilora_torch
from unilora_core import (
    CorruptFileError,
    Layout,
    MismatchError,
    ProjectionSpec,
    TargetError,
    UnknownVersionError,
    ValuesError,
    read_adapter,
    save_adapter,
)

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def saved(path, model=None, **kwargs):
    """An adapted model whose adapter lies at ``path``."""
    model, adapter = adapted(model=model, **kwargs)
    adapter.save(path)
    return model


def assert_refused(path, model, error, match):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        unilora_torch.load(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("grouping", ["balanced", "iid", "numpy-shuffle"])
def test_the_same_predictions_after_loading(path, start, grouping):
    model = saved(path, start=start, grouping=grouping)
    other = mlp()
    adapter = unilora_torch.load(other, path)
    assert torch.equal(other(X), model(X))
    assert adapter.spec == model.unilora.spec
    assert adapter.targets == model.unilora.targets
    adapter.detach()
    assert torch.equal(other(X), mlp()(X))


def test_load_does_not_advance_the_global_generators(path):
    saved(path)
    model = mlp()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()
    unilora_torch.load(model, path)
    assert torch.equal(state, torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))


def test_training_continues_after_loading(path, start):
    saved(path, start=start)
    model = mlp()
    adapter = unilora_torch.load(model, path)
    model(X).square().sum().backward()
    assert adapter.theta_d.grad.any()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["unilora.theta_d"]


def test_a_file_saved_while_merged_is_the_same(path, tmp_path):
    model = saved(path)
    model.unilora.merge()
    model.unilora.save(tmp_path / "merged.safetensors")
    before, merged = read_adapter(path), read_adapter(tmp_path / "merged.safetensors")
    assert np.array_equal(before.theta_d, merged.theta_d)
    assert (before.spec, before.metadata) == (merged.spec, merged.metadata)


class Reordered(nn.Module):
    """The same names as `Mlp`, registered the other way round."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        for block in self.blocks:
            block.up, block.down = None, None
            block.down = nn.Linear(12, 6, bias=False)
            block.up = nn.Linear(6, 12)

    forward = Mlp.forward
    checkpointing = None


def test_the_order_of_registration_does_not_matter(path, start):
    model, other = saved(path, start=start), Reordered()
    other.load_state_dict(mlp().state_dict())
    unilora_torch.load(other, path)
    assert torch.equal(other(X), model(X))


def test_the_numpy_reader_sees_the_same_theta_D(path, start):
    model = saved(path, start=start)
    spec, theta_d = unilora_core.load_adapter(path)
    factors = spec.layout.split(unilora_core.project(spec, theta_d))
    assert list(model.unilora.factors()) == list(factors)
    for name, factor in model.unilora.factors().items():
        assert np.array_equal(factor.detach().numpy(), factors[name])


def test_extra_metadata_is_kept(path):
    _, adapter = adapted()
    adapter.save(path, {"base_model": "mlp"})
    assert read_adapter(path).metadata["base_model"] == "mlp"


# ---- heads and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_is_saved_in_the_same_file(path, dtype, start):
    model, adapter = adapted(start, model=mlp().to(dtype), modules_to_save=["head"])
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias.normal_()
    adapter.save(path)
    other = mlp().to(dtype)
    loaded = unilora_torch.load(other, path)
    assert loaded.modules_to_save == ("head",)
    assert torch.equal(other(X.to(dtype)), model(X.to(dtype)))
    assert other.head.weight.requires_grad
    assert other.head.weight.dtype == dtype


def test_a_head_with_buffers(path):
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.BatchNorm1d(6)})

    model = build()
    adapter = unilora_torch.attach(model, ["body"], d=5, modules_to_save=["head"])
    model["head"](model["body"](X))
    adapter.save(path)
    other = build()
    unilora_torch.load(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_float32_adapter_onto_a_bf16_model(path, start):
    saved(path, start=start, modules_to_save=["head"])
    model = mlp().bfloat16()
    adapter = unilora_torch.load(model, path)
    assert adapter.theta_d.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(X.bfloat16()).float(), saved(path, start=start)(X), rtol=0, atol=0.3)


# ---- the wrong model ------------------------------------------------------------------------------------------------


def test_another_models_adapter(path):
    saved(path)
    other = nn.Sequential(nn.Linear(6, 6))
    assert_refused(path, other, MismatchError, r"adapter.safetensors: the model has no module 'blocks.0.up'")


def test_a_missing_module(path):
    saved(path, targets=["up"])
    model = mlp()
    model.blocks[1].upper = model.blocks[1].up
    del model.blocks[1].up
    assert_refused(path, model, MismatchError, r"no module 'blocks.1.up'; the nearest are \[.*'blocks.1.upper'")


def test_a_wrong_width(path):
    saved(path)
    message = r"blocks.0.up: expected a layer of 6 inputs and at least 12 outputs, the model has 8 and 16"
    assert_refused(path, mlp(width=8), MismatchError, message)


def test_a_module_that_is_no_linear_layer(path):
    saved(path, targets=["head"], d=5)
    model = mlp()
    model.head = nn.Tanh()
    assert_refused(path, model, MismatchError, r"head should be a linear layer, the model has Tanh")
    model.head = nn.Conv1d(6, 3, 2)
    assert_refused(path, model, MismatchError, r"head: expected a layer of 6 inputs .* the model has 12 and 3")


def test_a_wrong_head(path):
    saved(path, modules_to_save=["head"])
    assert_refused(path, mlp(classes=5), MismatchError, r"head: the file holds .*\(3, 6\).*expects .*\(5, 6\).*classes")


def test_a_missing_head(path):
    saved(path, modules_to_save=["head"])
    model = mlp()
    del model.head
    assert_refused(path, model, MismatchError, "no module 'head'")


def test_a_tied_layer(path):
    saved(path, targets=["up"])
    model = mlp()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert_refused(path, model, TargetError, r"blocks.0.up: its weight is tied")


def test_a_model_that_has_an_adapter(path):
    assert_refused(path, saved(path), TargetError, "already has an adapter 'unilora'")


def rewrite(path, change):
    """Save the file again with other metadata or another spec, as somebody else's program might."""
    file = read_adapter(path)
    spec, metadata = change(file.spec, dict(file.metadata))
    save_adapter(path, spec, file.theta_d, tensors=file.tensors, metadata=metadata)


def test_permuted_layers(path):
    """The layout of two equal layers swapped after training: the targets in the header no longer agree."""
    saved(path, targets=["up", "head"])

    def swap(spec, metadata):
        names = {"blocks.0.up": "head", "head": "blocks.0.up"}
        factors = [(names.get(n[:-2], n[:-2]) + n[-2:], shape) for n, shape in spec.layout.factors]
        return ProjectionSpec(Layout(factors), spec.d, spec.seed, spec.grouping, spec.start, spec.bound), metadata

    rewrite(path, swap)
    assert_refused(path, mlp(), MismatchError, r"(blocks.0.up|head): expected a layer of 6 inputs and at least")


def test_permuted_layers_behind_an_old_fingerprint(path):
    from safetensors.numpy import load_file, save_file

    saved(path)
    with unilora_core.serialisation.safe_open(path, framework="numpy") as file:
        header = dict(file.metadata())
    spec = json.loads(header["spec"])
    spec["layout"] = spec["layout"][::-1]
    header["spec"] = json.dumps(spec)
    header["checksum"] = unilora_core.serialisation._checksum(load_file(path), {**header, "checksum": None})
    save_file(load_file(path), path, metadata=header)
    assert_refused(path, mlp(), (CorruptFileError, MismatchError), "checksum|fingerprint")


@pytest.mark.parametrize(
    "targets",
    ["[]", "{}", "[1]", '"x"', '[["a"]]', "not json", '[["head", "head", 0, false]]', '[["head", "head", "x", false]]'],
)
def test_targets_that_do_not_fit_the_layout(path, targets):
    saved(path, targets=["up"])
    rewrite(path, lambda spec, metadata: (spec, metadata | {"targets": targets}))
    assert_refused(path, mlp(), CorruptFileError, "targets do not fit|two for each")


@pytest.mark.parametrize("modules", ["null", "3", '"head"', "[3]", "{"])
def test_modules_to_save_that_are_no_list_of_names(path, modules):
    saved(path, targets=["up"])
    rewrite(path, lambda spec, metadata: (spec, metadata | {"modules_to_save": modules}))
    assert_refused(path, mlp(), CorruptFileError, "modules_to_save|targets do not fit")


def test_a_negative_first_row(path):
    saved(path, targets=["head"], d=5)
    rewrite(path, lambda spec, m: (spec, m | {"targets": '[["head", "head", -2, false]]'}))
    assert_refused(path, mlp(), (MismatchError, TargetError), "head: ")


@pytest.mark.parametrize("order", [["A1", "B1", "A2", "B2"], ["B1", "A1", "B2", "A2"], ["A1", "A2", "B1", "B2"]])
def test_a_file_of_the_core_without_targets(path, order, start):
    """Another program's file: factors in any order, no torch metadata."""
    shapes = {
        "A1": ("blocks.0.up.A", (2, 6)),
        "B1": ("blocks.0.up.B", (12, 2)),
        "A2": ("head.A", (2, 6)),
        "B2": ("head.B", (3, 2)),
    }
    spec = ProjectionSpec(Layout([shapes[key] for key in order]), 13, start=start, bound=0.5)
    theta_d = np.random.default_rng(0).normal(size=13).astype(np.float32)
    save_adapter(path, spec, theta_d)
    model = mlp()
    adapter = unilora_torch.load(model, path)
    factors = spec.layout.split(unilora_core.project(spec, theta_d))
    output, alone = model(X), model.head(model.blocks[1](model.blocks[0](X)))
    torch.testing.assert_close(output, alone)
    for target in adapter.targets:
        delta = factors[f"{target.name}.B"] @ factors[f"{target.name}.A"]
        np.testing.assert_allclose(adapter.delta_weight(target).numpy(), delta, rtol=1e-5, atol=1e-6)
    adapter.merge()
    torch.testing.assert_close(model(X), output)


# ---- damaged files, and saves that must not happen -------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(path, keep):
    saved(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(path, mlp(), CorruptFileError, "adapter.safetensors: ")


def test_a_flipped_bit_anywhere(path):
    saved(path, targets=["head"], d=5)
    whole, model = path.read_bytes(), mlp()
    before = snapshot(model)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises((unilora_core.AdapterFileError, MismatchError, ValuesError)):
            unilora_torch.load(model, path)
    assert_unchanged(model, before)


def test_an_unknown_version(path, monkeypatch):
    monkeypatch.setattr(unilora_core.serialisation, "FORMAT_VERSION", "99")
    saved(path)
    monkeypatch.undo()
    assert_refused(path, mlp(), UnknownVersionError, "expected format version 1, got '99'")


def test_no_such_file(path):
    assert_refused(path, mlp(), FileNotFoundError, "no such adapter file")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_theta_d_that_is_not_finite_is_not_saved_and_the_old_file_stays(path, bad):
    model = saved(path)
    whole = path.read_bytes()
    with torch.no_grad():
        model.unilora.theta_d[0] = bad
    with pytest.raises(ValuesError, match="1 of the 40 values of theta_d are NaN or infinite"):
        model.unilora.save(path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_saving_again_replaces_the_file(path):
    model = saved(path)
    move(model.unilora, seed=5)
    model.unilora.save(path)
    other = mlp()
    unilora_torch.load(other, path)
    assert torch.equal(other(X), model(X))
