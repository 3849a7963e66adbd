"""The identity of a base model: enough of its values to tell another one apart, in any dtype and quantised or not.

Targets are checked by name and width, but a fine-tuned, permuted or reinitialised base has those, too. So a file keeps
the shapes of the base's embeddings and some two hundred of its values: of vectors (norms, biases) and embeddings, which
quantisation leaves alone. Rounding to bfloat16 or float16 moves a value by less than `TOLERANCE`.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unilora_core import MismatchError

__all__ = ["check_base", "identity"]

KEY = "base"
TOLERANCE = 2**-7
"""Two roundings to bfloat16, relative to the value."""
VECTORS, EMBEDDINGS = 64, 4
"""How many of each are sampled, spread evenly over their names in order."""


def identity(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, str]:
    """The header's entry for a base model; empty where values are on other processes (FSDP, ZeRO-3).

    Takes a few small copies from the device, and no pass over the weights.

    Args:
        exclude: modules whose values are not the base's, such as a trained head.
    """
    inside = tuple(f"{name}." for name in exclude)
    named = {name: value for name, value in model.named_parameters() if not name.startswith(inside)}
    if any(value.numel() == 0 or hasattr(value, "full_tensor") for value in named.values()):
        return {}
    modules = ((f"{name}.weight", module) for name, module in model.named_modules())
    tables = {name for name, module in modules if isinstance(module, nn.Embedding)}
    vectors = {name: value for name, value in named.items() if value.dim() == 1 and value.is_floating_point()}
    embeddings = {name: value for name, value in named.items() if name in tables and value.dim() == 2}
    facts = {
        "class": type(model).__name__,
        "name": getattr(model, "name_or_path", "") or None,
        "embeddings": sorted(list(value.shape) for value in embeddings.values()),
        "values": _pack(_sample(vectors, VECTORS) + _sample(embeddings, EMBEDDINGS)),
    }
    return {KEY: json.dumps(facts)}


def check_base(where: str, metadata: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the base that a file was made for with the one at hand.

    Args:
        metadata: of the file; without an entry (another program wrote it) nothing is compared.
        found: `identity` of the model.

    Raises:
        MismatchError: with both names, and what differs.
    """
    if KEY not in metadata or KEY not in found:
        return
    theirs, ours = json.loads(metadata[KEY]), json.loads(found[KEY])
    if difference := _difference(theirs, ours):
        raise MismatchError(
            f"{where}: it was made for {_name(theirs)}, the model is {_name(ours)}, and {difference}; load the base "
            "that it was trained on, or say check_base=False if this one is meant."
        )


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if theirs["embeddings"] != ours["embeddings"]:
        return (
            f"its embeddings have the shapes {theirs['embeddings']} there, {ours['embeddings']} here (a vocabulary "
            "that was resized, or not)"
        )
    a, b = _unpack(theirs["values"]), _unpack(ours["values"])
    if a.shape != b.shape:
        return f"it has {a.size} values to compare there, {b.size} here (other norms or biases)"
    known = np.isfinite(a) & np.isfinite(b)
    far = np.abs(a - b) > TOLERANCE * np.maximum(np.abs(a), np.abs(b)) + 1e-6
    if wrong := int(np.count_nonzero(far & known)):
        return f"{wrong} of {int(known.sum())} values of its norms, biases and embeddings are others"
    return ""


def _name(facts: Mapping[str, Any]) -> str:
    return f"{facts['name']!r} ({facts['class']})" if facts["name"] else f"a {facts['class']}"


def _sample(tensors: Mapping[str, Tensor], count: int) -> list[float]:
    """Values of evenly spaced tensors, at evenly spaced places in each; NaN where a tensor has no values here."""
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
    """As bfloat16, in base64."""
    bits = torch.tensor(list(values), dtype=torch.bfloat16).view(torch.int16).numpy().astype("<i2")
    return base64.b64encode(bits.tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    bits = np.frombuffer(base64.b64decode(text), "<i2").astype(np.int16)
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
