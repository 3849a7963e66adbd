"""The low-rank path beside each target: how B·A reaches the outputs of a layer."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_torch.targets import Target

if TYPE_CHECKING:
    from unilora_torch.adapter import Adapter

__all__ = ["LowRankPath"]


class LowRankPath:
    """The forward hook of one layer: adds B·A·x to the outputs of each of its targets."""

    def __init__(self, adapter: "Adapter", targets: tuple[Target, ...]):
        self.adapter, self.targets = adapter, targets

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """The new output, or None where the adapter is off."""
        if not self.adapter.active:
            return None
        self._reached()
        x = args[0] if args else next(iter(kwargs.values()))
        for target in self.targets:
            A, B = self.adapter.factors_of(target)
            update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)).to(output.dtype)
            before, after = target.first_row, output.shape[-1] - target.first_row - target.out_features
            output = output + (F.pad(update, (before, after)) if before or after else update)
        return output

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _reached(self) -> None:
        self.adapter._unreached.discard(self.targets[0].module)
