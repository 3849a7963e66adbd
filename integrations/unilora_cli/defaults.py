"""The defaults of `unilora finetune`, per task, in one place.

The start of θ_d and the factor between LoRA's learning rate and θ_d's are the library's (`unilora_torch`), not these.
"""

from dataclasses import dataclass

__all__ = ["DEFAULTS", "Defaults"]


@dataclass(frozen=True)
class Defaults:
    """What a task uses where the user says nothing.

    Attributes:
        lora_rate: the learning rate that LoRA would use; θ_d's follows from it.
        head_rate: the learning rate of the modules that train in full.
        warmup: the part of all steps in which the rates rise from 0.
        length: tokens per example at the most; 0 where there are none.
    """

    lora_rate: float
    head_rate: float
    epochs: int = 3
    batch_size: int = 32
    warmup: float = 0.06
    schedule: str = "linear"
    holdout: float = 0.1
    length: int = 0


DEFAULTS = {
    "vit": Defaults(lora_rate=5e-3, head_rate=5e-3),
    "text": Defaults(lora_rate=5e-3, head_rate=5e-3, length=128),
    "lm": Defaults(lora_rate=2e-4, head_rate=1e-3, batch_size=8, length=256),
}
