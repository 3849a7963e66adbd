"""Uni-LoRA for JAX: one trainable vector adapts any pytree of parameters; nothing is mutated."""

from unilora_jax.adapter import Adapter
from unilora_jax.plan import load, plan
from unilora_jax.projection import project, project_transpose
from unilora_jax.sums import wrap
from unilora_jax.targets import Target, conv_target, embedding_target, find_targets, linear_target
from unilora_jax.tenants import Tenants, route, tenants

__all__ = [
    "Adapter",
    "Target",
    "Tenants",
    "conv_target",
    "embedding_target",
    "find_targets",
    "linear_target",
    "load",
    "plan",
    "project",
    "project_transpose",
    "route",
    "tenants",
    "wrap",
]
