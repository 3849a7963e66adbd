"""Out: merged weights as a checkpoint of timm's own, ONNX with the same logits, and the file of θ_d with its head."""

import json
import resource
import sys

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file
from timm.models import save_for_hf

import unilora_timm
from unilora_core import TargetError
from unilora_timm.saving import merged, save_onnx
from unilora_torch import switch


@pytest.fixture
def plain_of(tiny, tmp_path):
    """plain_of(name, folder): the model that timm builds from a folder, as someone without unilora would."""
    if Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm reads safetensors from a folder of one's own from 1.0.31 on")

    def build(folder):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    return build


def is_plain(model):
    """Whether no key, module, hook or value outside the parameters is left of an adapter."""
    hooks = [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
    return (
        not any(hooks)
        and not any("unilora" in name for name in (*model.state_dict(), *dict(model.named_modules())))
        and not any(isinstance(v, torch.Tensor) for module in model.modules() for v in vars(module).values())
    )


def audible(model):
    """Scales of layers at one: fresh models start with such small ones that nothing is heard through them."""
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            torch.nn.init.ones_(parameter)
    return model


FAMILIES = {
    "vit_tiny_patch16_224": None,  # blocks of a fused qkv
    "vit_small_patch16_dinov3": "all-linear",
    "beit_base_patch16_224": None,  # a qkv that the model does not call
    "swinv2_tiny_window8_256": None,
    "deit_tiny_distilled_patch16_224": ["qkv", "proj", "mlp"],  # two heads
    "convnext_tiny": "mlp",
    "pvt_v2_b0": None,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_builds_the_merged_model_from_its_folder(tiny, images, move, plain_of, tmp_path, name):
    model = audible(tiny(name))
    move(unilora_timm.attach(model, FAMILIES[name]))
    save_for_hf(merged(model), tmp_path, safe_serialization=True)
    plain = plain_of(tmp_path)
    assert is_plain(plain)
    assert not any("unilora" in key for key in load_file(tmp_path / "model.safetensors"))
    assert not torch.allclose(model(images), audible(tiny(name))(images), rtol=1e-2)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_merged_copy_is_plain_and_leaves_the_model_as_it_was(tiny, images, move):
    model = tiny()
    adapter = move(unilora_timm.attach(model))
    torch.nn.init.normal_(model.head.weight)
    before, expected = {key: value.clone() for key, value in model.state_dict().items()}, model(images)
    copied = merged(model)
    assert is_plain(copied)
    assert all(parameter.requires_grad for parameter in copied.parameters())
    torch.testing.assert_close(copied(images), expected, rtol=1e-5, atol=1e-6)
    assert list(copied.state_dict()) == list(tiny().state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(images), expected)
    assert (adapter.active, model.unilora) == (True, adapter)
    with torch.no_grad():
        copied.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once_to_the_dtype_of_the_weights(tiny, move, dtype):
    model = tiny().to(dtype)
    adapter = move(unilora_timm.attach(model))
    target = adapter.targets[0]
    rows = slice(target.first_row, target.first_row + target.out_features)
    weight = model.blocks[0].attn.qkv.weight.detach()[rows].float() + adapter.delta_weight(target)
    assert torch.equal(merged(model).blocks[0].attn.qkv.weight[rows], weight.to(dtype))


def test_merging_several_adapters_takes_those_that_act(tiny, images, move):
    model = tiny()
    unilora_timm.attach(model, "q", modules_to_save=())
    unilora_timm.attach(model, "v", modules_to_save=(), name="second")
    unilora_timm.attach(model, "mlp", modules_to_save=(), name="third")
    for name in ("unilora", "second", "third"):
        move(getattr(model, name))
    switch(model, {"unilora": 1.0, "third": 0.5})
    plain = merged(model)
    assert is_plain(plain)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-5, atol=1e-5)


def test_merging_a_model_without_an_adapter_is_refused(tiny):
    with pytest.raises(TargetError, match=r"merged: this VisionTransformer has no adapter; .*unwrap_model"):
        merged(tiny())


def test_the_config_says_what_timm_needs(tiny, images, move, plain_of, tmp_path):
    model = tiny(global_pool="avg")
    move(unilora_timm.attach(model))
    model.reset_classifier(5)
    labels = ["daisy", "iris", "lily", "rose", "tulip"]
    save_for_hf(merged(model), tmp_path, model_config={"label_names": labels}, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["label_names"]) == (
        "vit_tiny_patch16_224",
        5,
        labels,
    )
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == config["pretrained_cfg"]["std"] == [0.5, 0.5, 0.5]
    assert config["global_pool"] == "avg"
    plain = plain_of(tmp_path)
    assert plain.head.out_features == plain.num_classes == 5
    assert timm.data.resolve_model_data_config(plain)["input_size"] == (3, 32, 32)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_merged_model_is_the_base_of_the_next_adapter(tiny, images, move, plain_of, tmp_path):
    model = tiny()
    move(unilora_timm.attach(model))
    save_for_hf(merged(model), tmp_path / "first", safe_serialization=True)
    second = plain_of(tmp_path / "first")
    move(unilora_timm.attach(second, seed=1)).save(tmp_path / "second.safetensors")
    again = plain_of(tmp_path / "first")
    unilora_timm.load(again, tmp_path / "second.safetensors")
    assert torch.equal(again(images), second(images))


# ---- ONNX -------------------------------------------------------------------------------------------------------


def onnx_logits(path, images):
    runtime = pytest.importorskip("onnxruntime", reason="reading the ONNX file back needs onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_onnx_gives_the_same_logits_for_any_batch(tiny, move, tmp_path):
    """BEiT, which does not call its qkv, and whose fused attention torch cannot export; a ViT in tests/cli."""
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnx and onnxscript")
    model = audible(tiny("beit_base_patch16_224", depth=1))
    move(unilora_timm.attach(model))
    torch.nn.init.normal_(model.get_classifier().weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_onnx(model, tmp_path / "new" / "model.onnx")
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        expected = model(images).detach()
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(onnx_logits(tmp_path / "new" / "model.onnx", images), expected, rtol=0, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_packages_says_what_to_install(tiny, tmp_path, monkeypatch, package):
    pytest.importorskip(package, reason="hides the package, so it must be there")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}, .*pip install 'unilora\[onnx\]'"):
        save_onnx(tiny(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_onnx_would_take_for_one_batch_size_only_is_refused(tmp_path):
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnx and onnxscript")

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mean((2, 3)) * torch.ones(2, 1))

    with pytest.raises(RuntimeError, match="Failed to export"):
        save_onnx(Fixed(), tmp_path / "model.onnx", torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def any_is_large(monkeypatch):
    monkeypatch.setattr("unilora_timm.saving.LARGE", 1000)


@pytest.mark.usefixtures("any_is_large")
def test_large_weights_lie_beside_onnx(tiny, images, tmp_path):
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnx and onnxscript")
    (tmp_path / "there").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "there" / "model.onnx")
    model = tiny(depth=1)
    torch.nn.init.normal_(model.head.weight)
    save_onnx(model, tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["model.onnx", "model.onnx.data"]
    found = onnx_logits(tmp_path / "there" / "model.onnx", images[:1])
    torch.testing.assert_close(found, model(images[:1]).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("large", [False, True])
def test_onnx_that_does_not_fit_the_disk_leaves_the_old_files(request, tiny, tmp_path, large):
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnx and onnxscript")
    if large:
        request.getfixturevalue("any_is_large")
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_onnx(tiny(depth=1), tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / ("model.onnx.data" if large else "model.onnx"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "model.onnx": b"old",
        "model.onnx.data": b"old",
    }
