"""Uni-LoRA for Hugging Face transformers: targets and heads by default, PEFT's UniLora adapters both ways."""

from unilora_core import engines
from unilora_torch import Adapter, Bank, Target
from unilora_transformers.attach import attach, from_pretrained, load
from unilora_transformers.merging import merge_checkpoint
from unilora_transformers.peft import load_peft, save_peft
from unilora_transformers.reference import Reference

__all__ = [
    "Adapter",
    "Bank",
    "Reference",
    "Target",
    "attach",
    "engines",
    "from_pretrained",
    "load",
    "load_peft",
    "merge_checkpoint",
    "save_peft",
]
