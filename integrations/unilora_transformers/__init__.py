"""Uni-LoRA for Hugging Face transformers: targets and heads by default, PEFT's UniLora adapters both ways."""

from unilora_torch import Adapter, Target
from unilora_transformers.attach import attach, load
from unilora_transformers.peft import load_peft, save_peft

__all__ = ["Adapter", "Target", "attach", "load", "load_peft", "save_peft"]
