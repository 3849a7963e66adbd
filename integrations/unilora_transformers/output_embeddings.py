"""A check of an adapted output layer that a trainer's fused loss bypasses."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from unilora_core import TargetError
from unilora_torch import Adapter
from unilora_torch.live import PerThread

__all__ = ["watch_output_embeddings"]


def watch_output_embeddings(model: PreTrainedModel, adapter: Adapter) -> list[RemovableHandle]:
    """Register hooks that raise where the model trains without calling its output embeddings, if they are a target.

    Losses that are fused with the last product (TRL's, Liger's) are put in the place of the model's forward pass after
    an adapter is attached, and read ``lm_head.weight``. So one check is not enough here: each training pass is checked.
    """
    output = model.get_output_embeddings()
    names = [target.name for target in adapter.targets if model.get_submodule(target.module) is output]
    if output is None or not names:
        return []
    watch = _Watch(adapter, names[0])
    return [
        model.register_forward_pre_hook(watch.begin),
        output.register_forward_hook(watch.seen),
        model.register_forward_hook(watch.end, prepend=True),  # its message is more exact
    ]


class _Here(PerThread):
    """The state of one thread: whether its pass has called the output embeddings."""

    def __init__(self) -> None:
        self.called = False


class _Watch:
    """A watch that notes whether the output embeddings were called between the beginning and the end of a pass."""

    def __init__(self, adapter: Adapter, name: str):
        self.adapter, self.name, self.here = adapter, name, _Here()

    def begin(self, _module: nn.Module, _args: Any) -> None:
        self.here.called = False

    def seen(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.here.called = True

    def end(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if module.training and torch.is_grad_enabled() and self.adapter.active and not self.here.called:
            raise TargetError(
                f"{self.name}: this forward pass does not call the output embeddings, so their update would do "
                "nothing; a loss that is fused with them reads their weight. Exclude them, or switch the fused loss "
                "off (TRL's trainers always fuse; Liger: use_liger_kernel=False)."
            )
