"""How B·A reaches what a model computes: beside a linear layer, a convolution, an embedding, or inside a parameter."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unilora_core import TargetError
from unilora_torch.replaced import forward_with
from unilora_torch.targets import Target, is_conv, shaped

if TYPE_CHECKING:
    from unilora_torch.adapter import Adapter

__all__ = ["ConvPath", "EmbeddingPath", "LowRankPath", "WeightPath", "add_paths"]


def add_paths(adapter: "Adapter", model: nn.Module, targets: Iterable[Target]) -> list[RemovableHandle]:
    """Register the paths of all targets as forward hooks, and return their handles."""
    handles: list[RemovableHandle] = []
    grouped: dict[tuple[str, bool], list[Target]] = {}
    for target in targets:
        grouped.setdefault((target.module, target.parameter is None), []).append(target)
    for (name, beside), parts in grouped.items():
        module = model.get_submodule(name)
        if not beside:
            inside = WeightPath(adapter, tuple(parts))
            handles.append(module.register_forward_pre_hook(inside.open))
            handles.append(module.register_forward_hook(inside.close, always_call=True))
        else:
            kind = EmbeddingPath if isinstance(module, nn.Embedding) else ConvPath if is_conv(module) else LowRankPath
            handles.append(module.register_forward_hook(kind(adapter, tuple(parts)), with_kwargs=True))
    return handles


class _Path:
    """What every path knows: the adapter, and the targets of one module."""

    def __init__(self, adapter: "Adapter", targets: tuple[Target, ...]):
        self.adapter, self.targets = adapter, targets

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _reached(self) -> None:
        self.adapter._unreached.discard(self.targets[0].module)


class LowRankPath(_Path):
    """The forward hook of a linear layer: adds B·A·x to the outputs of each of its targets.

    Only the input and the output of the layer are used, so its weight may be quantised, or kept under any name.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """The new output, or None where the adapter is off."""
        if not self.adapter.active:
            return None
        self._reached()
        x = args[0] if args else next(iter(kwargs.values()))
        for target in self.targets:
            A, B = self.adapter.factors_of(target)
            update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)).to(output.dtype)
            output = _plus(output, update, target, module)
        return output


class EmbeddingPath(_Path):
    """The forward hook of an embedding: adds B·A[:, ids].

    A[:, ids] is what the embedding itself gives with Aᵀ as its weight, and so has the scale that some embeddings apply.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """The new output, or None where the adapter is off."""
        if not self.adapter.active:
            return None
        self._reached()
        for target in self.targets:
            A, B = self.adapter.factors_of(target)
            rows = forward_with(module, {"weight": A.T.to(output.dtype)}, *args, **kwargs)
            update = F.linear(rows, B.to(rows.dtype)).to(output.dtype)
            output = _plus(output, update, target, module)
        return output


class ConvPath(_Path):
    """The forward hook of a convolution: adds the 1×1 convolution with B of the convolution with A.

    A's rows are kernels of the shape of the layer's own, which the layer's class applies: stride, padding and dilation
    are its business.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """The new output, or None where the adapter is off."""
        if not self.adapter.active:
            return None
        self._reached()
        x = args[0] if args else next(iter(kwargs.values()))
        one = (1,) * len(module.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(one) - 1]
        for target in self.targets:
            A, B = self.adapter.factors_of(target)
            kernels = A.to(x.dtype).unflatten(1, (-1, *module.kernel_size))
            hidden = forward_with(module, {"weight": kernels, "bias": None}, x)
            update = convolve(hidden, B.to(hidden.dtype).view(*B.shape, *one)).to(output.dtype)
            output = _plus(output, update, target, module, -1 - len(one))
        return output


class WeightPath(_Path):
    """The forward hooks of a module that uses a weight by itself: it reads W + B·A from its beginning to its end.

    The sum stands in the module's ``__dict__``, where Python looks before `nn.Module.__getattr__` finds the parameter:
    the parameter stays registered, under its name, and is what the module reads again afterwards, also after an error.
    """

    def open(self, module: nn.Module, _args: Any) -> None:
        """Before the module's forward pass."""
        if not self.adapter.active:
            return
        self._reached()
        for target in self.targets:
            owner, name = _owner(module, target)
            A, B = self.adapter.factors_of(target)
            owner.__dict__[name] = _sum(getattr(owner, name), A, B, target)

    def close(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """After it."""
        for target in self.targets:
            owner, name = _owner(module, target)
            owner.__dict__.pop(name, None)


def _plus(output: Tensor, update: Tensor, target: Target, module: nn.Module, axis: int = -1) -> Tensor:
    """The update added to its block of the outputs, which lie along one axis."""
    before, after = target.first_row, output.shape[axis] - target.first_row - target.out_features
    if after < 0:
        raise TargetError(
            f"{target.module}: expected {target.first_row + target.out_features} outputs or more, this "
            f"{type(module).__name__} gave {output.shape[axis]}; exclude it."
        )
    if before or after:
        update = F.pad(update, (*(0, 0) * (-1 - axis), before, after))
    return output + update


def _sum(weight: Tensor, A: Tensor, B: Tensor, target: Target) -> Tensor:
    """W + B·A in float32, rounded once to W's dtype, as a merge does."""
    with torch.autocast(weight.device.type, enabled=False):
        update = B @ A
        height = weight.shape[-1 if target.transposed else 1 if target.experts else 0]
        before, after = target.first_row, height - target.first_row - target.out_features
        if before or after:
            update = F.pad(update, (0, 0, before, after))
        return (weight.float() + shaped(update, target, weight)).to(weight.dtype)


def _owner(module: nn.Module, target: Target) -> tuple[nn.Module, str]:
    """The module that holds a target's parameter, and the parameter's name in it."""
    owner, _, name = (target.parameter or "").rpartition(".")
    return module.get_submodule(owner), name
