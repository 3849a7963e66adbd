"""Writing of an adapter as a GGUF LoRA, which llama.cpp loads beside the base's own GGUF file.

A and B are exact, as in `Adapter.export_lora`. Two things must match llama.cpp's converter: its names for the layers,
which the package gguf has, and the order of the outputs of q and k where the converter turns them for its rotary
embedding (architecture ``llama``).
"""

import os
from types import ModuleType
from typing import Any

import numpy as np

from unilora_core import TargetError
from unilora_core.files import new_files
from unilora_torch import Adapter
from unilora_torch.export import lora_tensors

__all__ = ["save_gguf"]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""The architecture that llama.cpp's converter makes of each ``model_type`` of transformers."""

TURNED = "llama"
"""The architecture whose converter turns the outputs of q and k."""

PREFIX = "base_model.model."


def save_gguf(adapter: Adapter, path: str | os.PathLike) -> None:
    """Write an adapter as a GGUF file of type ``adapter``: A and B of each layer in float32, alpha = r.

    Args:
        adapter: the adapter of a language model of one of the `ARCHITECTURES`.
        path: the path of the file; llama.cpp takes it as ``--lora``.

    Raises:
        ImportError: the package gguf is not installed.
        TargetError: the architecture is another, or llama.cpp has no name for a layer.
        AdapterFileError: llama.cpp would not serve it, such as a trained head; see `unilora_core.engines`.
        ValuesError: θ_d holds NaN or infinity. In each case nothing is written.
    """
    gguf, config = _package(), adapter.model.config
    architecture = _architecture(config)
    lora, tensors = lora_tensors(adapter, base_model="a GGUF file names none", engine="llama.cpp")
    arrays = {name.removeprefix(PREFIX): tensor.numpy() for name, tensor in tensors.items()}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    with new_files(path) as (file,):
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora["lora_alpha"])
        for module in lora["target_modules"]:
            if (name := names.get_name(module)) is None:
                raise TargetError(f"{module}: llama.cpp's {architecture} has no name for this layer; exclude it.")
            A, B = arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"]
            writer.add_tensor(f"{name}.weight.lora_a", A)
            writer.add_tensor(f"{name}.weight.lora_b", _turned(B, module, config) if architecture == TURNED else B)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _turned(B: np.ndarray, module: str, config: Any) -> np.ndarray:
    """Put the outputs of q and k in llama.cpp's order: the two halves of each head take turns."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return B
    halves = B.reshape(heads, 2, -1, B.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(B.shape)


def _architecture(config: Any) -> str:
    if config.model_type not in ARCHITECTURES:
        raise TargetError(
            f"save_gguf: expected a model of type {', '.join(ARCHITECTURES)}, got {config.model_type!r}; for others "
            "export_lora(folder, engine='llama.cpp'), then llama.cpp's own convert_lora_to_gguf.py."
        )
    return ARCHITECTURES[config.model_type]


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError("save_gguf needs the package gguf: pip install gguf.", name="gguf") from error
    return gguf
