"""The identity of a base model: enough of its values to tell it from others, in any dtype and quantised or not.

Targets are checked by name and width, but a fine-tuned, permuted or reinitialised base has the same names and widths.
So a file keeps the shapes of the base's embeddings and some two hundred of its values: of vectors (norms, biases) and
embeddings, which quantisation leaves alone. A file also keeps a few values of each weight that comes from no checkpoint
and is not trained: another run makes others. `unilora_core.identity` compares them.
"""

import base64
import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from unilora_core import MismatchError
from unilora_core.header import BaseIdentity
from unilora_core.identity import difference, name_of
from unilora_torch.heads import inside

__all__ = ["Identities", "check_base", "identity", "with_fresh"]

VECTORS, EMBEDDINGS = 64, 4
"""The number of vectors and of embeddings that are sampled, spread evenly over their names in order."""


def identity(model: nn.Module, exclude: Iterable[str] = (), fresh: Iterable[str] = ()) -> BaseIdentity | None:
    """Return what identifies a base model, for files; None where values are on other processes (FSDP, ZeRO-3).

    It takes a few small copies from the device, and no pass over the weights.

    Args:
        exclude: modules and parameters whose values are not the base's, such as a trained head.
        fresh: the names of weights that come from no checkpoint. Each is identified by values of its own, if the model
            has it and it is not excluded.
    """
    exclude = tuple(exclude)
    named = {name: value for name, value in model.named_parameters() if not inside(name, exclude)}
    if any(value.numel() == 0 or hasattr(value, "full_tensor") for value in named.values()):
        return None
    modules = ((f"{name}.weight", module) for name, module in model.named_modules())
    tables = {name for name, module in modules if isinstance(module, nn.Embedding)}
    vectors = {name: value for name, value in named.items() if value.dim() == 1 and value.is_floating_point()}
    embeddings = {
        name: value for name, value in named.items() if name in tables and value.dim() == 2 and not value.is_complex()
    }
    return BaseIdentity(
        kind=type(model).__name__,
        name=str(getattr(model, "name_or_path", "") or "").encode(errors="replace").decode() or None,
        embeddings=tuple(sorted((len(value), value.shape[1]) for value in embeddings.values())),
        values=_pack(_sample(vectors, VECTORS) + _sample(embeddings, EMBEDDINGS)),
        ends=_pack(_sample({name: value[-1] for name, value in embeddings.items()}, EMBEDDINGS)),
        fresh=_fresh(model, (name for name in fresh if not inside(name, exclude))),
    )


class Identities:
    """The identities of one model, each taken once for all files that save the same heads, until its values change."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._seen: tuple[tuple[int, int], ...] = ()
        self._taken: dict[tuple[tuple[str, ...], tuple[str, ...]], BaseIdentity | None] = {}

    def __call__(self, exclude: tuple[str, ...], fresh: tuple[str, ...]) -> BaseIdentity | None:
        """Return `identity` of these."""
        now = tuple((id(p), 0 if p.is_inference() else p._version) for p in self.model.parameters())
        if now != self._seen:
            self._taken, self._seen = {}, now
        if (exclude, fresh) not in self._taken:
            self._taken[exclude, fresh] = identity(self.model, exclude, fresh)
        return self._taken[exclude, fresh]


def with_fresh(base: BaseIdentity | None, model: nn.Module, names: Iterable[str]) -> BaseIdentity | None:
    """Return the identity of a model that also identifies these weights, which come from no checkpoint."""
    return base and dataclasses.replace(base, fresh=_fresh(model, names))


def _fresh(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: _pack(_spread(named[name].detach().flatten())) for name in names if name in named}


def _spread(values: Tensor) -> list[float]:
    """Return some of the values, with the last, which is in the last of the rows."""
    chosen = values[np.linspace(0, len(values) - 1, 16).astype(int).tolist()]
    return [float("nan")] * len(chosen) if values.is_meta else chosen.float().tolist()


def check_base(where: str, theirs: BaseIdentity | None, ours: BaseIdentity | None) -> None:
    """Compare the base that a file was made for with the one at hand.

    Args:
        theirs: the identity in the file; None (another program wrote it) means that nothing is compared.
        ours: the `identity` of the model.

    Raises:
        MismatchError: they differ; the error has both names, and what differs.
    """
    if theirs is not None and ours is not None and (how := difference(theirs, ours)):
        raise MismatchError(
            f"{where}: it was made for {name_of(theirs)}, the model is {name_of(ours)}, and {how}; load the base "
            "that it was trained on, or say check_base=False if this one is meant."
        )


def _sample(tensors: Mapping[str, Tensor], count: int) -> list[float]:
    """Return values at evenly spaced places of evenly spaced tensors; NaN where a tensor has no values here."""
    names = sorted(tensors)
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)]
    return [value for name in chosen for value in _few(tensors[name].detach())]


def _few(tensor: Tensor) -> list[float]:
    if tensor.dim() == 2:
        tensor = tensor[_places(len(tensor), 8)]
    values = tensor[..., _places(tensor.shape[-1], 2)].flatten()
    return [float("nan")] * values.numel() if tensor.is_meta else values.float().tolist()


def _places(size: int, count: int) -> list[int]:
    return [size * i // count for i in range(min(size, count))]


def _pack(values: Iterable[float]) -> str:
    """Return the values as bfloat16, in base64."""
    bits = torch.tensor(list(values), dtype=torch.bfloat16).view(torch.int16).numpy().astype("<i2")
    return base64.b64encode(bits.tobytes()).decode()
