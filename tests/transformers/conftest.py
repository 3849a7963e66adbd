"""Tiny models with random weights, made from configs: no network, no download."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for reload_worker

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
D_MODEL = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
D_MODEL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "BartConfig": D_MODEL,
    "BertConfig": SMALL,
    "BloomConfig": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4} | SPECIAL,
    "CLIPConfig": {"text_config": SMALL | SPECIAL, "vision_config": IMAGE, "projection_dim": 16},
    "DebertaV2Config": SMALL,
    "DistilBertConfig": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "GPT2Config": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | SPECIAL,
    "GemmaConfig": SMALL | {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma3TextConfig": SMALL | {"num_key_value_heads": 2, "head_dim": 16},
    "GPTNeoXConfig": SMALL | SPECIAL,
    "LlamaConfig": SMALL | {"num_key_value_heads": 2},
    "MambaConfig": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "GptOssConfig": SMALL | {"num_key_value_heads": 2},
    "MistralConfig": SMALL | {"num_key_value_heads": 2},
    "MixtralConfig": SMALL | {"num_key_value_heads": 2, "num_local_experts": 4},
    "OPTConfig": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Phi3Config": SMALL | SPECIAL,
    "Qwen2Config": SMALL | {"num_key_value_heads": 2},
    "Qwen3MoeConfig": SMALL | {"num_key_value_heads": 2},
    "RobertaConfig": SMALL,
    "SwitchTransformersConfig": T5,
    "T5Config": T5,
    "ViTConfig": IMAGE,
    "WhisperConfig": D_MODEL | SPECIAL | {"num_mel_bins": 8, "max_source_positions": 10, "decoder_start_token_id": 3},
}


def pytest_collect_file():
    """Skips the folder; a conftest that skips itself is an error where the folder is named on the command line."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"the tests of the transformers integration need {name}")


@pytest.fixture(autouse=True)
def two_threads():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """tiny(class_name, **config): a model of random weights, the same at each call."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()

    def make(name, **config):
        cls = getattr(transformers, name)
        torch.manual_seed(0)
        return cls(cls.config_class(**CONFIGS[cls.config_class.__name__] | config)).eval()

    return make


@pytest.fixture(scope="session")
def ids():
    import torch

    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def train():
    """train(adapter): as if it had been trained; the same change for the same adapter."""
    import torch

    def move(adapter):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in (adapter.theta_d, *adapter.saved_parameters().values()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0))

    return move
