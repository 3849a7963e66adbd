"""Uni-LoRA for timm: one trainable vector adapts a vision model, its classifier trains and is saved beside it.

model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=10)
adapter = unilora_timm.attach(model)
optimizer = timm.optim.create_optimizer_v2(adapter.parameter_groups(lora_rate=1e-3), opt="adamw")  # import timm.optim
"""

from unilora_timm.attach import attach, load
from unilora_timm.saving import merged, save_onnx
from unilora_timm.targets import classifier, find_targets
from unilora_torch import Adapter, Bank, Growth, Target, adapters, switch

__all__ = [
    "Adapter",
    "Bank",
    "Growth",
    "Target",
    "adapters",
    "attach",
    "classifier",
    "find_targets",
    "load",
    "merged",
    "save_onnx",
    "switch",
]
