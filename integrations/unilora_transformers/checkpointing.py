"""Gradient checkpointing beside a frozen model."""

import threading
from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = ["InputGradients"]


ONE_AT_A_TIME = threading.RLock()
"""Held while hooks are put on a model, which two threads may train."""


class InputGradients:
    """A forward pre-hook that lets the embeddings' output require a gradient while checkpointing is on.

    Reentrant checkpointing drops the gradient of a layer of which no input requires one. In a frozen model that is
    every layer, and θ_d, which reaches them past their inputs, would get none. Checkpointing may be switched on at any
    time (the Trainer does so when training begins), so the flags are read at each pass.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.ours = False

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Before each forward pass of the model."""
        if self.ours or not self.model.training or getattr(self.model, "_require_grads_hooks", None):
            return
        if any(layer.gradient_checkpointing for layer in self.layers):
            with ONE_AT_A_TIME:
                if not self.ours:
                    self._enable()

    def _enable(self) -> None:
        try:
            self.model.enable_input_require_grads()
        finally:  # an interrupt may come when it is done
            self.ours = hasattr(self.model, "_require_grads_hooks")

    def remove(self) -> None:
        """Leave the model as it was, as the handle of a hook does."""
        if self.ours:
            self.model.disable_input_require_grads()
            self.ours = False
