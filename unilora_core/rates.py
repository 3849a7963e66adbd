"""The learning rate of θ_d and other numbers that follow from D and d. Evidence: ``docs/method.md``."""

import dataclasses
import math
from typing import Literal

from unilora_core.layout import Layout
from unilora_core.spec import ProjectionSpec

__all__ = ["default_bound", "default_d", "planned_spec", "theta_rate"]

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


def planned_spec(
    layout: Layout, d: int | Literal["auto"], seed: int, grouping: str, start: str, bound: float | None
) -> ProjectionSpec:
    """The spec for d (or ``"auto"``) and the bound of θ_d⁰; without one the paper's start has its own, 0.02, and the
    identity the `default_bound`.

    Raises:
        SpecError: a field out of its range.
    """
    spec = ProjectionSpec(layout, default_d(layout.size) if d == "auto" else d, seed, grouping, start)
    if bound is None and start == "paper":
        return spec
    return dataclasses.replace(spec, bound=default_bound(spec) if bound is None else bound)
