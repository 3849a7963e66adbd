"""Layers with another weight: what a layer's class computes with it, and whether that is linear in the weight."""

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "IN_PLACE",
    "Copies",
    "adds",
    "call_with",
    "convolves",
    "forward_with",
    "is_bound",
    "is_registered",
    "looks_up",
    "still",
]

M = torch.tensor([[0.5, -1, 2], [4, 1, -2]])
"""A matrix that mixes two outputs to three."""

NOTHING = object()


class Copies:
    """Shallow copies of a module and of some inside it, to be called in their place.

    They share everything, but what is set on a copy is seen only by code that is given the copy: by no other thread,
    and by nobody afterwards. So a module gets another weight for one call: in the ``__dict__`` of the copy, where
    Python looks before `nn.Module.__getattr__` finds the parameter.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str] = ()):
        self.made: dict[str, tuple[nn.Module, nn.Module, dict[str, Any]]] = {}
        self.top = self._copy("", module)
        for path in paths:
            self.at(path)

    def at(self, path: str) -> nn.Module:
        """Return the copy of the submodule at a path, made if need be; the copies above it have it in its place."""
        if path in self.made:
            return self.made[path][1]
        above, _, name = path.rpartition(".")
        parent = self.at(above)
        child = parent.get_submodule(name)
        copied = self._copy(path, child)
        children = {key: copied if value is child else value for key, value in parent._modules.items()}
        vars(parent)["_modules"] = self.made[above][2]["_modules"] = children
        return copied

    def _copy(self, path: str, module: nn.Module) -> nn.Module:
        before = dict(vars(module))
        for name in CALLS:
            before.pop(name, None)
        copied = object.__new__(type(module))
        vars(copied).update(before)
        self.made[path] = module, copied, before
        return copied

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the modules the attributes that a forward pass wrote on the copies."""
        for module, copied, before in self.made.values():
            now = vars(copied)
            if len(now) != len(before) or not all(map(operator.is_, now.values(), before.values())):
                _put_back(module, now, before)
            for name in copied._modules.keys() - module._modules.keys():
                module._modules[name] = copied._modules[name]


def _put_back(module: nn.Module, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name, NOTHING) is not value and not _stays(module, name):
            vars(module)[name] = value
    for name in before.keys() - now.keys():
        vars(module).pop(name, None)


CALLS = ("_call_impl", "_compiled_call_impl")
"""The attributes that call the module itself, not its copy."""


IN_PLACE = threading.RLock()
"""The lock that is held where a module itself has to take another weight for a call, and other threads have to wait."""


def is_bound(modules: Iterable[nn.Module]) -> bool:
    """Say whether a module has a ``forward`` of its own, as accelerate and Liger set: that never sees a copy."""
    return any("forward" in vars(module) for module in modules)


def _stays(module: nn.Module, name: str) -> bool:
    """Say whether an attribute of a copy is what the copy was made for, and not set by the forward pass."""
    flat = isinstance(module, nn.RNNBase) and name.startswith("_flat_weight")  # made of its weights
    return flat or name == "_modules" or name in module._parameters or name in module._buffers


def is_registered(module: nn.Module, name: str) -> bool:
    """Say whether a weight is a parameter or a buffer of its own; another tensor is computed anew, and overwritten."""
    return name in module._parameters or name in module._buffers


@contextlib.contextmanager
def still(module: nn.Module, name: str) -> Iterator[None]:
    """Keep a parametrised weight unchanged while it is read inside the ``with``: in training mode spectral
    normalisation takes a step with each look at it.
    """
    inside = module.parametrizations[name].modules() if is_parametrized(module, name) else ()
    training = [module for module in inside if module.training]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for each in training:
            each.training = True


def forward_with(module: nn.Module, replaced: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
    """Compute what the module's class gives with other parameters, without its hooks."""
    if is_parametrized(module):
        return _without_parametrizations(module, replaced, *args, **kwargs)
    if torch.compiler.is_compiling():  # a graph has no threads, and traces no copies
        return _in_place(module, type(module).forward, replaced, *args, **kwargs)
    with Copies(module) as copies:
        return _in_place(copies.top, type(module).forward, replaced, *args, **kwargs)


@torch.compiler.disable  # it would trace a module that changes its class
def _without_parametrizations(module: nn.Module, replaced: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Do the same as `forward_with` for a class whose parameters are properties, which would win over what stands in
    ``__dict__``.
    """
    own: Mapping[str, Any] = {name: getattr(module, name) for name in module.parametrizations if name not in replaced}
    with Copies(module) as copies:
        copies.top.__class__ = kind = type_before_parametrizations(module)
        return _in_place(copies.top, kind.forward, {**own, **replaced}, *args, **kwargs)


def _in_place(
    module: nn.Module, forward: Callable[..., Any], replaced: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    own = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    module.__dict__.update(replaced)
    try:
        return forward(module, *args, **kwargs)
    finally:
        for name in replaced:
            del module.__dict__[name]
        module.__dict__.update(own)


def call_with(module: nn.Module, state: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a module with other tensors in its state, as `torch.func.functional_call`, which is not for threads.

    The module's own hooks are left to the outer call, except those that compute its weights.
    """
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, dict(state), args, kwargs)
    copies = Copies(module, (name.rpartition(".")[0] for name in state))
    if is_bound(original for original, *_ in copies.made.values()):
        with IN_PLACE:
            return torch.func.functional_call(module, dict(state), args, kwargs)
    with copies:
        for name, value in state.items():
            owner, _, key = name.rpartition(".")
            vars(copies.at(owner))[key] = value
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, COMPUTES):
                hook(copies.top, args)
        return copies.top.forward(*args, **kwargs)


COMPUTES = (WeightNorm, SpectralNorm, BasePruningMethod)
"""The hooks that compute normalised and pruned weights in the old style."""


def adds(module: nn.Module, transposed: bool = False) -> bool:
    """Say whether forward(x; W + U) is forward(x; W) plus what B·A beside the layer would give for U: then it can be
    merged.

    PyTorch's own layers are linear in their weight; a class or an instance with another forward pass is tried.
    """
    bound = is_bound([module])
    if (type(module).forward in PLAIN and not bound) or hasattr(module, "_hf_hook"):  # accelerate's hook moves tensors
        return True
    W = module.weight.detach()
    U, beside = _wave(*W.shape).to(W) * W.abs().mean(), {"bias": None, "training": False}
    try:
        with torch.no_grad():
            if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
                x = _seen(module).to(W.device if isinstance(module, nn.Embedding) else W)
                update = forward_with(module, {"weight": U, **beside}, x)
            else:
                x = _wave(4, W.shape[0 if transposed else 1]).to(W)
                x = torch.cat([x, -x])  # a ReLU, say, cuts off one of them
                update = x @ (U if transposed else U.T)
            base, both = (_of_itself(module, {"weight": w, "training": False}, x) for w in (W, W + U))
            return bool((both - base - update).norm() <= 0.05 * update.norm())
    except Exception:  # another forward pass may raise anything on such an input
        return False


PLAIN = tuple(kind.forward for kind in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
"""The forward passes that compute nothing but the product with the weight, and add the bias."""


def _of_itself(module: nn.Module, replaced: Mapping[str, Any], x: Tensor) -> Tensor:
    """Compute what the module gives with other attributes, also where its ``forward`` is its own; without its hooks."""
    if not is_bound([module]):
        return forward_with(module, replaced, x)
    with IN_PLACE:
        return _in_place(module, lambda module, *args: module.forward(*args), replaced, x)


def _seen(module: nn.Module) -> Tensor:
    """Make an input of an embedding or a convolution."""
    if isinstance(module, nn.Embedding):
        return torch.arange(min(3, module.num_embeddings))[None]
    size = [2 * dilation * length for dilation, length in zip(module.dilation, module.kernel_size, strict=True)]
    return _wave(1, module.in_channels, *size)


def looks_up(embedding: nn.Embedding) -> bool:
    """Say whether forward(X)·M = forward(X·M) for the weight X, so that B·A can be applied after the lookup and
    merged.
    """
    X = _wave(embedding.num_embeddings, 2).to(embedding.weight)
    ids, m = _seen(embedding).to(X.device), M.to(X)
    try:
        narrow, wide = forward_with(embedding, {"weight": X}, ids), forward_with(embedding, {"weight": X @ m}, ids)
    except Exception:  # another forward pass may raise anything on another width
        return False
    return wide.shape == (*ids.shape, 3) and torch.allclose(narrow @ m, wide, rtol=1e-2, atol=1e-2)


def convolves(module: nn.Module) -> bool:
    """Say whether a convolution without groups gives Mᵀ·forward(K) for the kernels Mᵀ·K, as those of PyTorch do: then
    B·A can be applied as two convolutions, and merged.

    A convolution that standardises its kernels, say, or that depends on the number of its outputs, does not.
    """
    if module.groups > 1 or type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return module.groups == 1
    with still(module, "weight"):
        device = "cpu" if module.weight.is_meta else module.weight.device
    x = _seen(module).to(device)
    K, m = _wave(2, module.in_channels, *module.kernel_size).to(device), M.to(device)
    try:
        narrow = forward_with(module, {"weight": K, "bias": None}, x)
        wide = forward_with(module, {"weight": torch.einsum("nm,n...->m...", m, K), "bias": None}, x)
    except Exception:  # another forward pass may raise anything on another height
        return False
    mixed = torch.einsum("nm,bn...->bm...", m, narrow) if narrow.shape[1] == 2 else narrow
    return wide.shape == mixed.shape and torch.allclose(mixed, wide, rtol=1e-2, atol=1e-2)


def _wave(*shape: int) -> Tensor:
    """Make numbers that differ, and that no generator draws."""
    return torch.arange(float(torch.Size(shape).numel())).square().cos().view(shape)
