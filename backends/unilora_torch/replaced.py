"""A layer with another weight: what its class computes then, and whether that is linear in the weight."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["convolves", "forward_with", "looks_up"]

M = torch.tensor([[0.5, -1, 2], [4, 1, -2]])
"""Mixes two outputs to three."""


def forward_with(module: nn.Module, replaced: dict[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
    """What the module's class computes with other parameters, without its hooks.

    They stand in the module's ``__dict__``, where Python looks before `nn.Module.__getattr__` finds the parameters.
    """
    own = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    module.__dict__.update(replaced)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        for name in replaced:
            del module.__dict__[name]
        module.__dict__.update(own)


def looks_up(embedding: nn.Embedding) -> bool:
    """Whether forward(X)·M = forward(X·M) for the weight X: then B·A can be applied after the lookup, and merged."""
    X = _wave(embedding.num_embeddings, 2).to(embedding.weight)
    ids, m = torch.arange(min(3, embedding.num_embeddings))[None].to(X.device), M.to(X)
    try:
        narrow, wide = forward_with(embedding, {"weight": X}, ids), forward_with(embedding, {"weight": X @ m}, ids)
    except Exception:  # whatever another forward pass raises on a weight of another width
        return False
    return wide.shape == (*ids.shape, 3) and torch.allclose(narrow @ m, wide, rtol=1e-2, atol=1e-2)


def convolves(module: nn.Module) -> bool:
    """Whether a convolution without groups gives Mᵀ·forward(K) for the kernels Mᵀ·K, as those of PyTorch do: then B·A
    can be applied as two convolutions, and merged.

    One that standardises its kernels, say, or that depends on the number of its outputs, does not.
    """
    if module.groups > 1 or type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return module.groups == 1
    device = "cpu" if module.weight.is_meta else module.weight.device
    size = [2 * dilation * length for dilation, length in zip(module.dilation, module.kernel_size, strict=True)]
    x = _wave(1, module.in_channels, *size).to(device)
    K, m = _wave(2, module.in_channels, *module.kernel_size).to(device), M.to(device)
    try:
        narrow = forward_with(module, {"weight": K, "bias": None}, x)
        wide = forward_with(module, {"weight": torch.einsum("nm,n...->m...", m, K), "bias": None}, x)
    except Exception:  # whatever another forward pass raises on a weight of another height
        return False
    mixed = torch.einsum("nm,bn...->bm...", m, narrow) if narrow.shape[1] == 2 else narrow
    return wide.shape == mixed.shape and torch.allclose(mixed, wide, rtol=1e-2, atol=1e-2)


def _wave(*shape: int) -> Tensor:
    """Numbers that differ, and that no generator draws."""
    return torch.arange(float(torch.Size(shape).numel())).square().cos().view(shape)
