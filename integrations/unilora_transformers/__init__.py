"""Uni-LoRA for Hugging Face transformers: targets and heads by default, PEFT's UniLora adapters both ways."""

from unilora_core import engines
from unilora_torch import Adapter, Bank, Growth, Target, Tenants, adapters, switch
from unilora_transformers import auto
from unilora_transformers.attach import attach, from_pretrained, load
from unilora_transformers.gguf import save_gguf
from unilora_transformers.merging import merge_checkpoint
from unilora_transformers.peft import load_peft, save_peft
from unilora_transformers.reference import Reference
from unilora_transformers.rollouts import LoraSync, lora_tensors, merged_parameters, sync_rollouts
from unilora_transformers.served import ServedBase
from unilora_transformers.tenants import TenantModel

__all__ = [
    "Adapter",
    "Bank",
    "Growth",
    "LoraSync",
    "Reference",
    "ServedBase",
    "Target",
    "TenantModel",
    "Tenants",
    "adapters",
    "attach",
    "engines",
    "from_pretrained",
    "load",
    "load_peft",
    "lora_tensors",
    "merge_checkpoint",
    "merged_parameters",
    "save_gguf",
    "save_peft",
    "switch",
    "sync_rollouts",
]

auto.register()
