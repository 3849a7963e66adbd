"""The reference model of a preference trainer, without a second copy of the base."""

import contextlib
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unilora_core import TargetError
from unilora_torch.adapter import adapters

__all__ = ["Reference"]


class Reference(nn.Module):
    """A model with its adapters off: ``ref_model=Reference(model)`` for TRL's trainers.

    It has no parameters of its own; whatever it lacks is looked up in the model. A call always goes to the model, so
    that what a trainer does to its forward pass (a fused head, autocast) holds here too.

    Raises:
        TargetError: the model has no adapter, or has one with `modules_to_save`, whose values are no longer the base's.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        found = adapters(model)
        if not found:
            raise TargetError("Reference: the model has no adapter to switch off; attach one first.")
        if heads := [head for adapter in found.values() for head in adapter.modules_to_save]:
            raise TargetError(
                f"Reference: {', '.join(heads)} is trained in full, so the model without its adapter is not the base; "
                "give the trainer a copy of the base model, or attach with modules_to_save=()."
            )
        self._models = (model,)  # a tuple, so that the model is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_models"][0], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the base model's outputs."""
        with contextlib.ExitStack() as stack:
            for adapter in adapters(self._models[0]).values():
                stack.enter_context(adapter.disabled())
            return self._models[0](*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state, by which a trainer tells cached results of one reference from another's."""
        return self._models[0].state_dict(*args, **kwargs)
