"""Export as a plain LoRA adapter in PEFT's format: A and B are known exactly, so no SVD is needed.

Format: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT 0.21 reads and writes them; also read by vLLM,
SGLang and llama.cpp's converter when no module is saved in full.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unilora_torch.adapter import Adapter
from unilora_torch.targets import Target

__all__ = ["export_lora"]


def export_lora(adapter: Adapter, folder: str | os.PathLike, base_model: str | None = None) -> None:
    """Write ``adapter`` as a PEFT LoRA folder.

    Targets that adapt blocks of one layer (q and v of a fused qkv) become one LoRA of the summed rank, whose B has a
    block for each. alpha equals r in every layer, so the scaling is 1.

    Args:
        base_model: the name or path of the base model for ``base_model_name_or_path``; by default the model's own
            ``name_or_path``, where it has one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = adapter._root[0]
    factors = {name: factor.detach().cpu() for name, factor in adapter.factors().items()}
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(target.module for target in adapter.targets):
        parts = [target for target in adapter.targets if target.module == module]
        A, B = _joined(parts, factors, height=_out_features(model, parts[0]))
        state[f"base_model.model.{module}.lora_A.weight"] = A
        state[f"base_model.model.{module}.lora_B.weight"] = B
        ranks[module] = A.shape[0]
    for module in adapter.modules_to_save:
        for name, tensor in model.get_submodule(module).state_dict().items():
            state[f"base_model.model.{module}.{name}"] = tensor.detach().cpu().clone().contiguous()
    config = _config(adapter, ranks, base_model or getattr(model, "name_or_path", None))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _joined(parts: list[Target], factors: dict[str, Tensor], height: int) -> tuple[Tensor, Tensor]:
    """One A (Σr, in) and one B (height, Σr) for the targets of one layer."""
    A = torch.cat([factors[f"{part.name}.A"] for part in parts])
    B, column = A.new_zeros(height, A.shape[0]), 0
    for part in parts:
        block = factors[f"{part.name}.B"]
        B[part.first_row : part.first_row + part.out_features, column : column + block.shape[1]] = block
        column += block.shape[1]
    return A.contiguous(), B


def _out_features(model: torch.nn.Module, target: Target) -> int:
    module = model.get_submodule(target.module)
    return module.out_features if isinstance(module, torch.nn.Linear) else module.weight.shape[target.transposed]


def _config(adapter: Adapter, ranks: dict[str, int], base_model: str | None) -> dict:
    rank = max(ranks.values())
    other = {module: r for module, r in ranks.items() if r != rank}
    return {
        "alpha_pattern": other,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in adapter.targets),
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": other,
        "target_modules": list(ranks),
        "task_type": None,
    }
