"""Bypassed layers of a transformers model; see `unilora_torch.bypassed`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from unilora_torch import Target, bypassed
from unilora_transformers.made_up import made_up_inputs

__all__ = ["through_readers"]


def through_readers(
    model: PreTrainedModel, targets: tuple[Target, ...], example: Mapping[str, Any] | None = None
) -> tuple[Target, ...]:
    """Return the targets, where a bypassed layer becomes a parameter of the module that reads its weight.

    Args:
        example: the inputs of the run; by default they are made up from the config.
    """
    for inputs in made_up_inputs(model) if example is None else (example,):
        try:
            return bypassed.through_readers(model, targets, partial(model, **inputs))
        except Exception:  # a model may raise anything on inputs that it was not made for
            continue
    return targets
