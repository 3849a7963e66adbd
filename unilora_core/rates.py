"""The learning rate of θ_d, and other numbers that follow from D and d. The evidence is in ``docs/method.md``."""

import math

from unilora_core.spec import PAPER_BOUND, ProjectionSpec

__all__ = ["LORA_RANK", "default_bound", "map_rate", "theta_rate"]

LORA_RANK = 4
"""The rank of the LoRA that Uni-LoRA is compared with. By default θ_d has a sixteenth of its numbers, and trains at its
rate.
"""


def theta_rate(spec: ProjectionSpec, lora_rate: float) -> float:
    """Return the learning rate of θ_d that trains as LoRA would at ``lora_rate``. It is ``lora_rate`` times the map's
    factor ((D/d)^¾·√(4/r) for Uni-LoRA, Fastfood and Gaussian, 1 where d = D) times the frame's (10 for VeRA, LoRA-XS
    and FourierFT, by their own settings).
    """
    return lora_rate * map_rate(spec) * spec.form.rate


def map_rate(spec: ProjectionSpec) -> float:
    """Return the map's factor of the learning rate. Where a pair's numbers are shared it has √(4/r), where r is the
    mean rank of the targets, since the sum of r rank-one updates grows like √r while (D/d)^¾ grows with r. It is 1
    where ΔW itself is made, whose entries LoRA has no rate for (D/d grows with the model there, and a factor that grows
    with it was seen to diverge).
    """
    if spec.form.dense:
        return 1.0
    if spec.frame != "pair" or spec.map.fixed:
        return spec.map.rate(spec)
    ranks = [shape[-2] for name, shape in spec.layout.factors if not name.endswith(".B")]
    return spec.map.rate(spec) * math.sqrt(LORA_RANK / (sum(ranks) / len(ranks)))


def default_bound(spec: ProjectionSpec) -> float:
    """Return the bound of θ_d⁰ for which the entries of A start as large as LoRA's, U(-1/√in, 1/√in), on average.

    An entry is θ_d/√n with n = D/d; LoRA's layers differ in their inputs, so the mean of in_features is taken.
    Where every factor is measured from θ_d⁰, nothing tells its size; the paper's bound is returned then.
    """
    inputs = [shape[-1] for name, shape in spec.layout.factors if not spec.shifted(name)]
    if not inputs:
        return PAPER_BOUND
    return math.sqrt(spec.D / spec.d) / math.sqrt(sum(inputs) / len(inputs))
