"""The learning rate of θ_d and other numbers that follow from D and d. Evidence: ``docs/method.md``."""

import math

from unilora_core.spec import ProjectionSpec

__all__ = ["default_bound", "default_d", "theta_rate"]

RATIO = 16
"""D/d by default: a sixteenth of LoRA's parameters."""


def default_d(D: int) -> int:
    """d for ``d="auto"``."""
    return max(1, round(D / RATIO))


def theta_rate(spec: ProjectionSpec, lora_rate: float) -> float:
    """η_θ = η·(D/d)^¾, between √(D/d), by which entries move, and D/d, by which the loss falls."""
    return lora_rate * (spec.D / spec.d) ** 0.75


def default_bound(spec: ProjectionSpec) -> float:
    """The bound of θ_d⁰ for which the entries of A start as large as LoRA's, U(-1/√in, 1/√in), on average.

    An entry is θ_d/√n with n = D/d; LoRA's layers differ in their inputs, so the mean of in_features is taken.
    """
    inputs = [shape[-1] for name, shape in spec.layout.factors if name.endswith(".A")]
    return math.sqrt(spec.D / spec.d) / math.sqrt(sum(inputs) / len(inputs))
