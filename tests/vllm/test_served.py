"""ServedBase: what export_lora writes beside the loaded base, made without its weights."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_llama import SIZES, make_adapter, make_base

import unilora_transformers
from unilora_core import AdapterFileError, MismatchError
from unilora_torch.export import lora_tensors
from unilora_transformers import ServedBase


def assert_equal(found, wanted):
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        assert found[1][name].dtype == tensor.dtype, name
        assert torch.equal(found[1][name], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"targets": "all-linear", "rank": 2},
        {"targets": ["q_proj", "v_proj", "down_proj"], "rank": {"q_proj": 2, "v_proj": 2, "down_proj": 5}},
        {"method": "vera", "rank": 4},
        {"start": "paper"},
    ],
)
@pytest.mark.parametrize("engine", [None, "vllm", "sglang"])
def test_it_is_what_the_loaded_model_exports(base, tmp_path, options, engine):
    adapter = make_adapter(base, tmp_path / "a.safetensors", **options)
    folder = str(tmp_path / "base")
    if (engine == "sglang" and "down_proj" not in str(options)) or engine != "sglang":
        wanted = lora_tensors(adapter, folder, engine=engine)
        assert_equal(ServedBase.of(folder).lora_tensors(tmp_path / "a.safetensors", engine=engine), wanted)


def test_blocks_of_a_fused_layer_get_its_height(tmp_path):
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "a.safetensors")
    found = ServedBase.of(tmp_path / "base").lora_tensors(tmp_path / "a.safetensors")
    assert_equal(found, lora_tensors(adapter, str(tmp_path / "base")))


def test_a_trained_head_comes_from_the_file(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0, num_labels=3
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "a.safetensors")
    found = ServedBase.of(tmp_path / "base").lora_tensors(tmp_path / "a.safetensors", engine="vllm")
    assert "base_model.model.score.weight" in found[1]
    assert_equal(found, lora_tensors(adapter, str(tmp_path / "base"), engine="vllm"))


def test_no_weight_of_the_base_is_read(base, adapter, tmp_path):
    served = ServedBase.of(tmp_path / "base")
    served.lora_tensors(tmp_path / "files" / "fr.safetensors")
    (model,) = served._models.values()
    matrices = [name for name, value in model.named_parameters() if value.dim() == 2 and "embed" not in name]
    assert matrices
    assert all(model.get_parameter(name).is_meta for name in matrices if "lm_head" not in name)


def test_another_base_of_the_same_shape_is_refused(base, adapter, tmp_path):
    make_base(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"fr\.safetensors: it was made for .*values of its norms"):
        ServedBase.of(tmp_path / "other").lora_tensors(tmp_path / "files" / "fr.safetensors")


def test_a_base_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"org/nowhere: no folder, and not in the hub's cache.*say in which"):
        ServedBase.of("org/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file; expected a checkpoint"):
        ServedBase.of(tmp_path / "empty")


def test_what_the_engine_would_not_serve_is_refused(tmp_path, base):
    make_adapter(base, tmp_path / "a.safetensors", targets=["q_proj"])
    with pytest.raises(AdapterFileError, match=r"sglang .* would not serve this export: .*q_proj alone"):
        ServedBase.of(tmp_path / "base").lora_tensors(tmp_path / "a.safetensors", engine="sglang")


def test_the_public_name_and_the_folder_agree(base, adapter, tmp_path):
    adapter.export_lora(tmp_path / "lora", base_model=str(tmp_path / "base"))
    _, tensors = unilora_transformers.ServedBase.of(tmp_path / "base").lora_tensors(
        tmp_path / "files" / "fr.safetensors"
    )
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert written.keys() == tensors.keys()
