"""Paths by which an update reaches what a model computes: beside a linear layer, a convolution or an embedding, or in a
weight.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_core import TargetError
from unilora_torch.calls import Handle, surround
from unilora_torch.chains import joined, product
from unilora_torch.checks import REMEDY
from unilora_torch.live import Live
from unilora_torch.replaced import IN_PLACE, Copies, forward_with, is_bound, is_registered
from unilora_torch.targets import Target, is_conv, shaped

__all__ = ["BesideHook", "ConvPath", "EmbeddingPath", "LowRankPath", "StreamedPath", "WeightPath", "add_paths"]


def add_paths(live: Live, model: nn.Module, targets: Iterable[Target], handles: list[Handle]) -> None:
    """Register the paths of all targets, each with its handle in the list as soon as it is there."""
    grouped: dict[tuple[str, bool], list[Target]] = {}
    for target in targets:
        grouped.setdefault((target.module, target.parameter is None), []).append(target)
    for (name, beside), parts in grouped.items():
        module = model.get_submodule(name)
        if not beside:
            inside = WeightPath(live, tuple(parts))
            handles.append(surround(module, inside))
            handles.append(module.register_forward_pre_hook(inside.open))
            handles.append(module.register_forward_hook(inside.close, always_call=True))
        else:
            handles.append(module.register_forward_hook(_kind(live, module)(live, tuple(parts)), with_kwargs=True))
            _put_first(module)


def _put_first(module: nn.Module) -> None:
    """Let the paths see what the layer itself gives, before the hooks of others: those then see what a merge gives."""
    others = [key for key, hook in module._forward_hooks.items() if not isinstance(hook, BesideHook)]
    for key in others:
        module._forward_hooks.move_to_end(key)


def _kind(live: Live, module: nn.Module) -> type["BesideHook"]:
    if isinstance(module, nn.Embedding):
        return EmbeddingPath
    if is_conv(module):
        return ConvPath
    return LowRankPath if live.adapter.whole else StreamedPath


class _Path:
    """The base class of paths: the live state of its adapter, and the targets of one module."""

    def __init__(self, live: Live, targets: tuple[Target, ...]):
        self.live, self.targets = live, targets


class BesideHook(_Path):
    """The forward hook of a layer: it adds to the outputs what the chain makes of the inputs."""

    def __init__(self, live: Live, targets: tuple[Target, ...]):
        super().__init__(live, tuple(sorted(targets, key=lambda target: target.first_row)))
        self.rows = tuple(target.first_row for target in self.targets)
        first, last = self.targets[0], self.targets[-1]
        self.inputs = first.in_features
        self.module, self.width, self.needed = last.module, first.out_features, last.first_row + last.out_features

    def __call__(self, module: nn.Module, args: tuple, *kwargs_and_output: Any) -> Tensor | None:
        """Return the new output, or None where the adapter is off. None is also returned to those who moved the hook to
        a layer of theirs without its keyword arguments.
        """
        return self.added(module, args, *kwargs_and_output) if self.live.acts() else None

    def added(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Return the output with B·A·x."""
        raise NotImplementedError

    def chain(self, module: nn.Module, height: int) -> tuple[Tensor, ...]:
        """Compute the chain of all targets, (height, in) as a product; see `chains.joined`."""
        self.reach(module, height)
        chains = [self.live.chain_of(target) for target in self.targets]
        return chains[0] if self.width == height else joined(chains, self.rows, height)

    def reach(self, module: nn.Module, height: int) -> None:
        """Note that the layer has run.

        Raises:
            TargetError: the layer gave fewer outputs than are adapted.
        """
        self.live.reach(self.module)
        if self.needed > height:
            raise TargetError(
                f"{self.module}: expected {self.needed} outputs or more, this {type(module).__name__} gave {height}; "
                "exclude it."
            )

    def fits(self, module: nn.Module, width: int) -> None:
        """Refuse a layer whose number of inputs has changed since it was adapted; for an embedding, its number of rows.

        Raises:
            TargetError: it has changed; the error has both numbers.
        """
        if width != self.inputs:
            raise TargetError(
                f"{self.module}: {self.inputs} inputs are adapted, this {type(module).__name__} has {width} now; merge "
                "for good by detach(merge=True), or save and detach, before a layer is resized."
            )


class LowRankPath(BesideHook):
    """The forward hook of a linear layer: it adds the chain's product with x, factor by factor.

    Only the input and the output of the layer are used, so its weight may be quantised, or kept under any name.
    """

    def added(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Return the output with the chain's product; see `BesideHook`."""
        x = args[0] if args else next(iter(kwargs.values()))
        self.fits(module, x.size(-1))
        hidden = x
        for factor in self.chain(module, output.size(-1)):
            hidden = F.linear(hidden, factor.to(x.dtype))
        return output + hidden.to(output.dtype)


class StreamedPath(BesideHook):
    """The forward hook of a linear layer whose ΔW is never made: it adds x·ΔWᵀ, which is computed in blocks."""

    def added(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Return the output with x·ΔWᵀ; see `BesideHook`."""
        x = args[0] if args else next(iter(kwargs.values()))
        self.fits(module, x.size(-1))
        self.reach(module, output.size(-1))
        for target in self.targets:
            update = self.live.update(x, target).to(output.dtype)
            after = output.size(-1) - target.first_row - target.out_features
            output = output + (F.pad(update, (target.first_row, after)) if target.first_row or after else update)
        return output


class EmbeddingPath(BesideHook):
    """The forward hook of an embedding: it adds what the chain makes of the columns F_1[:, ids].

    The embedding itself gives these columns, with F_1ᵀ as its weight, and so they have the scale that some embeddings
    apply.
    """

    def added(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Return the output with the update of its ids; see `BesideHook`."""
        first, *rest = self.chain(module, output.size(-1))
        self.fits(module, module.num_embeddings)
        hidden = forward_with(module, {"weight": first.T.to(output.dtype)}, *args, **kwargs)
        for factor in rest:
            hidden = F.linear(hidden, factor.to(hidden.dtype))
        return output + hidden.to(output.dtype)


class ConvPath(BesideHook):
    """The forward hook of a convolution: it adds the convolution with F_1, then 1×1 convolutions with the other
    factors.

    The rows of F_1 are kernels in the shape of the layer's own. The layer's class applies them, with its stride,
    padding and dilation.
    """

    def added(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Return the output with the convolutions; see `BesideHook`."""
        kernel = module.kernel_size
        first, *rest = self.chain(module, output.size(-1 - len(kernel)))
        x = args[0] if args else next(iter(kwargs.values()))
        hidden = forward_with(module, {"weight": first.to(x.dtype).unflatten(1, (-1, *kernel)), "bias": None}, x)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        for factor in rest:
            hidden = convolve(hidden, factor.to(hidden.dtype).view(*factor.shape, *(1 for _ in kernel)))
        return output + hidden.to(output.dtype)


class WeightPath(_Path):
    """The hooks of a module that uses a weight by itself: it reads W + F_k·…·F_1 from its beginning to its end.

    The sum stands in the ``__dict__`` of a copy of the module, which is called in its place (see `Copies`): W stays
    registered, under its name, and is what everybody else reads meanwhile.
    """

    def __init__(self, live: Live, targets: tuple[Target, ...]):
        super().__init__(live, targets)
        self.paths = tuple(dict.fromkeys(path for path, _ in map(_place, targets) if path))

    def around(self, run: Callable[[nn.Module], Any], module: nn.Module) -> Any:
        """Run a call of the module."""
        if is_bound([module, *map(module.get_submodule, self.paths)]):
            with IN_PLACE:
                try:
                    return run(module)
                finally:
                    self.close(module)
        if not self.live.acts():
            return run(module)
        with Copies(module, self.paths) as copies:
            return run(copies.top)

    def open(self, module: nn.Module, _args: Any) -> None:
        """Set the sum, before the forward pass of the module or of its copy."""
        if not self.live.acts():
            return
        self.live.reach(self.targets[0].module)
        for target in self.targets:
            path, name = _place(target)
            owner = module.get_submodule(path)
            if not is_registered(owner, name):
                raise TargetError(
                    f"{target.name}: the {name} of this {type(owner).__name__} is no parameter any more, and so cannot "
                    f"be W + B·A; {REMEDY}, or exclude it."
                )
            owner.__dict__[name] = _sum(getattr(owner, name), self.live.chain_of(target), target)

    def close(self, module: nn.Module, _args: Any = None, _output: Any = None) -> None:
        """Remove the sum after the forward pass: a graph works on the module itself."""
        for target in self.targets:
            path, name = _place(target)
            owner = module.get_submodule(path)
            if is_registered(owner, name):
                owner.__dict__.pop(name, None)


def _sum(weight: Tensor, chain: Sequence[Tensor], target: Target) -> Tensor:
    """Compute W + F_k·…·F_1 in float32, rounded once to W's dtype, as a merge does."""
    with torch.autocast(weight.device.type, enabled=False):
        update = product(chain)
        height = weight.shape[-1 if target.transposed else 1 if target.experts else 0]
        before, after = target.first_row, height - target.first_row - target.out_features
        if before or after:
            update = F.pad(update, (0, 0, before, after))
        return (weight.float() + shaped(update, target, weight)).to(weight.dtype)


def _place(target: Target) -> tuple[str, str]:
    """Return the path, inside the target's module, of the module that holds its parameter, and the parameter's name
    there.
    """
    path, _, name = (target.parameter or "").rpartition(".")
    return path, name
