"""Export as a plain LoRA folder in PEFT's format (`unilora_core.lora`): A and B are known exactly, no SVD is needed."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unilora_core.lora import join_blocks, lora_config, lora_names
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
    factors = {name: factor.detach().cpu().numpy() for name, factor in adapter.factors().items()}
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(target.module for target in adapter.targets):
        parts = [target for target in adapter.targets if target.module == module]
        blocks = [(factors[f"{part.name}.A"], factors[f"{part.name}.B"], part.first_row) for part in parts]
        pair = join_blocks(blocks, height=_out_features(model, parts[0]))
        state |= {name: torch.from_numpy(factor) for name, factor in zip(lora_names(module), pair, strict=True)}
        ranks[module] = pair[0].shape[0]
    for module in adapter.modules_to_save:
        for name, tensor in model.get_submodule(module).state_dict().items():
            state[f"base_model.model.{module}.{name}"] = tensor.detach().cpu().clone().contiguous()
    config = lora_config(
        ranks,
        base_model=base_model or getattr(model, "name_or_path", None),
        fan_in_fan_out=any(target.transposed for target in adapter.targets),
        modules_to_save=adapter.modules_to_save,
    )
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _out_features(model: torch.nn.Module, target: Target) -> int:
    module = model.get_submodule(target.module)
    return module.out_features if isinstance(module, torch.nn.Linear) else module.weight.shape[target.transposed]
