"""Uni-LoRA for PyTorch: one trainable `torch.nn.Parameter` adapts any model with linear layers."""

from unilora_torch.adapter import Adapter, adapters
from unilora_torch.attach import attach, load
from unilora_torch.bank import Bank
from unilora_torch.gather import project, project_transpose
from unilora_torch.growing import Growth
from unilora_torch.switching import switch
from unilora_torch.targets import Target, find_targets
from unilora_torch.tenants import Tenants

__all__ = [
    "Adapter",
    "Bank",
    "Growth",
    "Target",
    "Tenants",
    "adapters",
    "attach",
    "find_targets",
    "load",
    "project",
    "project_transpose",
    "switch",
]
