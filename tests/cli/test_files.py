"""`unilora inspect`, `convert` and `merge`."""

import json
import shutil
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from unilora_core import Layout, ProjectionSpec, read_adapter, save_adapter

ADAPTER = "adapter.safetensors"


# ---- inspect ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """An adapter file made with the core alone."""
    shapes = [
        (f"blocks.{i}.attn.{x}.{f}", s) for i in range(3) for x in "qv" for f, s in (("A", (2, 8)), ("B", (6, 2)))
    ]
    spec = ProjectionSpec(Layout(shapes), d=12, seed=7)
    head = {"head.weight": np.ones((3, 6), np.float32)}
    save_adapter(tmp_path / ADAPTER, spec, spec.init(), tensors=head, metadata={"task": "vit", "base_model": "tiny"})
    return tmp_path / ADAPTER


def test_inspect_prints_what_a_file_holds(unilora, small):
    result = unilora("inspect", small)
    assert (result.code, result.err) == (0, "")
    for part in (
        f"({small.stat().st_size:,} bytes; as LoRA this would be 744 bytes)",
        "tiny (vit)",
        "format       version 1",
        "balanced version 1, seed 7",
        "d = 12 trained for D = 168 LoRA parameters: D/d = 14",
        "paper, U(-0.02, 0.02)",
        read_adapter(small).spec.layout.fingerprint,
        "targets: 6\n  3 ×  blocks.*.attn.q  A 2 × 8, B 6 × 2\n",
        "saved in full: 1 tensors\n  head.weight  3 × 6  float32",
    ):
        assert part in result.out


def test_inspect_as_json(unilora, small):
    facts = json.loads(unilora("inspect", small, "--json").out)
    theta_d = read_adapter(small).theta_d
    assert facts["theta_d"]["norm"] == pytest.approx(np.linalg.norm(theta_d))
    assert facts["theta_d"]["max"] == theta_d.max()
    assert (facts["D"], facts["d"], facts["seed"], facts["format_version"]) == (168, 12, 7, "1")
    assert facts["targets"]["blocks.2.attn.v"] == {"A": [2, 8], "B": [6, 2]}
    assert facts["head"] == {"head.weight": [[3, 6], "float32"]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], "not a whole safetensors file"),
        (lambda data: data[:400], "not a whole safetensors file"),
        (lambda data: data.replace(b'seed\\":7', b'seed\\":8'), "do not match the checksum"),
        (lambda data: data[:-3] + b"\x42" + data[-2:], "do not match the checksum"),
        (lambda data: b"", "not a whole safetensors file"),
    ],
)
def test_inspect_of_a_damaged_file(unilora, small, damage, message):
    small.write_bytes(damage(small.read_bytes()))
    result = unilora("inspect", small)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"unilora: error: {small}: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_inspect_of_no_file(unilora, tmp_path):
    result = unilora("inspect", tmp_path / "none")
    assert (result.code, result.err) == (1, f"unilora: error: {tmp_path}/none: no such adapter file.\n")


def test_debug_shows_the_traceback(unilora, tmp_path):
    for words in (("--debug", "inspect", "none"), ("inspect", "none", "--debug")):
        result = unilora(*words)
        assert result.code == 1
        assert "Traceback" in result.err
        assert "unilora: error: none: no such adapter file." in result.err


# ---- merge ------------------------------------------------------------------------------------------------------


def adapted(base_of, file, *words):
    """The base model of a file with the adapter in it."""
    from unilora_cli.tasks import models

    base = base_of(file, *words)
    model, _ = models.build(base)
    models.load_adapter(base, model, file)
    return model.eval()


def logits(model, x):
    import torch

    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)


def test_a_merged_timm_model_is_a_plain_one(unilora, trained, base_of, tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    file = trained("vit")[0] / ADAPTER
    result = unilora("merge", file, "--out", "merged")
    assert result.code == 0, result.err
    assert 'timm.create_model("local-dir:merged", pretrained=True)' in result.out
    assert "random weights, made again from seed 0" in result.out
    plain = timm.create_model(f"local-dir:{tmp_path}/merged", pretrained=True).eval()
    assert not hasattr(plain, "unilora")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(plain, x), logits(adapted(base_of, file), x), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]


def test_a_merged_timm_model_is_a_base_for_the_next_adapter(unilora, trained, images, base_of):
    pytest.importorskip("timm")
    from safetensors.numpy import load_file

    assert unilora("merge", trained("vit")[0] / ADAPTER, "--out", "merged").code == 0
    sources = {
        "folder": ("--model", "merged"),
        "checkpoint": ("--model", "vit_tiny_patch16_224", "--checkpoint", "merged/model.safetensors"),
    }
    words = ("--data", images, "--max-steps", 2, "--augment", "none", "--device", "cpu")
    sizes = ("--model-arg", "img_size=32", "--model-arg", "depth=2")
    for out, source in sources.items():
        result = unilora("finetune", "vit", *source, *sizes, *words, "--out", out)
        assert result.code == 0, result.err
        model = adapted(base_of, f"{out}/{ADAPTER}", *(source[2:] if out == "checkpoint" else ()))
        wanted = load_file("merged/model.safetensors")["blocks.1.attn.qkv.weight"]
        assert np.array_equal(model.get_submodule("blocks.1.attn.qkv").weight.detach().numpy(), wanted)


def test_merge_writes_onnx_with_the_same_logits(unilora, trained, base_of, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="reading the ONNX file back needs onnxruntime")
    file = trained("vit")[0] / ADAPTER
    result = unilora("merge", file, "--out", "merged", "--onnx")
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"config.json", "model.onnx", "model.safetensors"}
    session = runtime.InferenceSession("merged/model.onnx", providers=["CPUExecutionProvider"])
    model = adapted(base_of, file)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        found = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
        torch.testing.assert_close(found, logits(model, x), atol=1e-4, rtol=0)


def test_merge_refuses_onnx_that_it_cannot_write(unilora, trained, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    cases = {
        "vit": "--onnx: writing ONNX needs onnxscript, which is not installed: pip install 'unilora[onnx]'",
        "lm": "--onnx goes with models of timm; ",
    }
    for kind, message in cases.items():
        result = unilora("merge", trained(kind)[0] / ADAPTER, "--out", "new", "--onnx")
        assert result.code == 1
        assert message in result.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_a_merged_transformers_model_is_a_plain_one(unilora, trained, base_of, kind):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    file = trained(kind)[0] / ADAPTER
    result = unilora("merge", file, "--out", "merged")
    assert result.code == 0, result.err
    name = "AutoModelForSequenceClassification" if kind == "text" else "AutoModelForCausalLM"
    assert f'transformers.{name}.from_pretrained("merged")' in result.out
    plain, report = getattr(transformers, name).from_pretrained("merged", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.tensor([[5, 6, 7, 8, 13, 14], [6, 7, 5, 9, 10, 17]])
    torch.testing.assert_close(logits(plain.eval(), x), logits(adapted(base_of, file), x), atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained("merged")("the film")["input_ids"]
    if kind == "text":
        assert plain.config.id2label == {0: "bad", 1: "good"}


def test_merge_refuses_what_it_cannot_do(unilora, small, trained, tmp_path, bert):
    pytest.importorskip("timm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    cases = {
        (small, "--out", "full"): "full: exists and is not an empty folder",
        (small, "--out", "new"): "cannot build the model 'tiny'",
        (small, "--out", "new", "--kind", "text", "--model", bert): "the model has no module 'blocks.0.attn.q'",
        (tmp_path / "none", "--out", "new"): "no such adapter file",
    }
    for words, message in cases.items():
        result = unilora("merge", *words)
        assert result.code == 1
        assert message in result.err
    assert not (tmp_path / "new").exists()
    file = read_adapter(small)
    save_adapter(small, file.spec, file.theta_d)
    assert "add --model NAME and --kind vit, text or lm" in unilora("merge", small, "--out", "new").err
    result = unilora("merge", small, "--out", "new", "--model", "x")
    assert "what kind of model 'x' is; add --kind vit, text or lm" in result.err


def test_merge_takes_a_checkpoint_in_several_files(unilora, trained, llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    file = trained("lm")[0] / ADAPTER
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
    result = unilora("merge", file, "--model", tmp_path / "base", "--out", "merged")
    assert result.code == 0, result.err
    assert unilora("merge", file, "--out", "whole").code == 0
    merged, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "whole"))
    assert all(np.array_equal(merged[name], value) for name, value in whole.items())


def test_merge_refuses_another_base(unilora, trained, llama, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "other")
    result = unilora("merge", trained("lm")[0] / ADAPTER, "--model", tmp_path / "other", "--out", "new")
    assert result.code == 1
    assert "it was made for" in result.err
    assert not (tmp_path / "new").exists()


def test_factors_larger_than_their_layer_are_taken_where_the_command_line_says_so(unilora, vit_model, images):
    pytest.importorskip("timm")
    words = ("--rank", 200, "--d", 500, "--max-steps", 1, "--data", images, "--augment", "none", "--device", "cpu")
    assert "expected a rank of at most 192, as of" in unilora("finetune", "vit", *vit_model, *words, "--out", "run").err
    result = unilora("finetune", "vit", *vit_model, *words[2:], "--out", "run")
    assert result.code == 0, result.err
    file = read_adapter(f"run/{ADAPTER}")
    wide = {name: (200, n) if name.endswith(".A") else (m, 200) for name, (m, n) in file.spec.layout.factors}
    spec = ProjectionSpec(Layout(wide), 500)
    save_adapter(f"run/{ADAPTER}", spec, spec.init(), tensors=file.tensors, metadata=file.metadata)
    for words in (("merge", f"run/{ADAPTER}", "--out", "out"), ("convert", f"run/{ADAPTER}", "out", "--to", "lora")):
        assert "expected a rank of at most 192" in unilora(*words).err
        result = unilora(*words, "--any-rank")
        assert result.code == 0, result.err
        shutil.rmtree("out")


# ---- check ------------------------------------------------------------------------------------------------------


def test_check_says_which_engines_take_an_export(unilora, trained):
    pytest.importorskip("transformers")
    lm, text = trained("lm")[0] / ADAPTER, trained("text")[0] / ADAPTER
    result = unilora("convert", lm, "--to", "lora", "--engine", "vllm", "lora")
    assert result.code == 0, result.err
    assert "served by: vllm, sglang, lorax, llama.cpp" in result.out
    assert json.loads(Path("lora/adapter_config.json").read_text())["r"] == 16
    result = unilora("check", "lora", "--engine", "vllm")
    assert (result.code, result.err) == (0, "")
    assert "vllm (0.33.0): yes\n  vllm serve" in result.out
    assert "--max-lora-rank 16 --lora-modules adapter=lora" in result.out
    assert unilora("convert", text, "--to", "lora", "--rank", 20, "text").code == 0
    result = unilora("check", "text", "--engine", "sglang")
    assert result.code == 1
    assert "sglang (0.5.23): no\n  - " in result.out
    assert "sglang 0.5.23 would not serve this export" in result.err


def test_an_export_that_the_engine_would_refuse_is_not_written(unilora, trained, tmp_path):
    pytest.importorskip("transformers")
    result = unilora("convert", trained("text")[0] / ADAPTER, "--to", "lora", "--engine", "llama.cpp", "new")
    assert result.code == 1
    assert "classifier" in result.err
    assert not (tmp_path / "new").exists()


def test_check_of_no_folder(unilora, tmp_path):
    result = unilora("check", tmp_path)
    assert result.code == 1
    assert "adapter_config.json: no such file; give a LoRA folder" in result.err


def test_the_engines_of_the_options_are_those_of_the_core():
    from unilora_cli.options.files import Engine
    from unilora_core.engines import ENGINES

    assert tuple(ENGINES) == get_args(Engine)


# ---- convert ----------------------------------------------------------------------------------------------------

PEFT_LIKE = ("--grouping", "numpy-shuffle", "--start", "paper")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("kind", ["text", "lm"])
def test_convert_to_lora_gives_the_same_logits_in_peft(unilora, trained, base_of, kind, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from unilora_cli.tasks import models

    file = trained(kind)[0] / ADAPTER
    result = unilora("convert", file, "--to", "lora", "lora")
    assert result.code == 0, result.err
    assert "→ lora (lora): " in result.out
    base = base_of(file)
    model = peft.PeftModel.from_pretrained(models.build(base)[0], tmp_path / "lora").eval()
    x = torch.tensor([[5, 6, 7, 8, 13, 14], [6, 7, 5, 9, 10, 17]])
    torch.testing.assert_close(logits(model, x), logits(adapted(base_of, file), x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["text", "lm"])
def test_convert_to_peft_and_back(unilora, trained, kind, base_of):
    torch = pytest.importorskip("torch")
    file = trained(kind, *PEFT_LIKE)[0] / ADAPTER
    base = json.loads(json.dumps(read_adapter(file).metadata))["base_model"]
    result = unilora("convert", file, "--to", "peft-unilora", "peft")
    assert result.code == 0, result.err
    back = unilora("convert", "peft", "--model", base, "--kind", kind, "--to", "unilora", "back.safetensors")
    assert back.code == 0, back.err
    assert np.array_equal(read_adapter("back.safetensors").theta_d, read_adapter(file).theta_d)
    x = torch.tensor([[5, 6, 7, 8, 13, 14]])
    torch.testing.assert_close(logits(adapted(base_of, "back.safetensors"), x), logits(adapted(base_of, file), x))


@pytest.mark.parametrize(
    ("to", "out", "written"), [("lora", "out", "out/adapter_config.json"), ("gguf", "a.gguf", "a.gguf")]
)
def test_convert_writes_over_nothing_unasked(unilora, trained, to, out, written):
    words = ("convert", trained("lm")[0] / ADAPTER, "--to", to, out)
    Path(written).parent.mkdir(exist_ok=True)
    Path(written).write_text("mine")
    result = unilora(*words)
    assert (result.code, Path(written).read_text()) == (1, "mine")
    assert f"{written}: there is a file already; add --overwrite, or choose another OUT." in result.err
    assert unilora(*words, "--overwrite").code == 0
    assert Path(written).read_bytes() != b"mine"


def test_convert_to_gguf(unilora, trained):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    file = trained("lm")[0] / ADAPTER
    result = unilora("convert", file, "--to", "gguf", "lora.gguf")
    assert result.code == 0, result.err
    assert "→ lora.gguf (gguf): " in result.out
    names = [tensor.name for tensor in gguf.GGUFReader("lora.gguf").tensors]
    assert "blk.0.attn_q.weight.lora_a" in names
    assert len(names) == 2 * len(json.loads(read_adapter(file).metadata["targets"]))


def test_convert_refuses_what_it_cannot_do(unilora, trained, tmp_path, small):
    text, vit = trained("text")[0] / ADAPTER, trained("vit")[0] / ADAPTER
    (tmp_path / "folder").mkdir()
    cases = {
        (tmp_path / "none", "out", "--to", "lora"): "no such adapter file or folder",
        (text, "out", "--to", "unilora"): "--to unilora starts from a PEFT folder",
        (tmp_path / "folder", "out", "--to", "lora"): "--to lora starts from an adapter file",
        (tmp_path / "folder", "out", "--to", "unilora"): "folder/adapter_config.json: no such file; give a LoRA folder",
        (text, "out", "--to", "peft-unilora"): "numpy-shuffle",
        (vit, "out", "--to", "peft-unilora"): "for a timm model use --to lora",
        (vit, "out", "--to", "gguf"): "--to gguf is for transformers models",
        (text, "out", "--to", "peft-unilora", "--engine", "vllm"): "--engine and --rank go with --to lora",
        (text, "out", "--to", "lora", "--rank", 2): "expected rank ≥ 16",
    }
    for words, message in cases.items():
        result = unilora("convert", *words)
        assert result.code == 1, result
        assert message in result.err
    assert not (tmp_path / "out").exists()


def test_files_move(unilora, trained, tmp_path):
    shutil.copy(trained("lm")[0] / ADAPTER, tmp_path / "moved.safetensors")
    assert unilora("inspect", tmp_path / "moved.safetensors").code == 0
