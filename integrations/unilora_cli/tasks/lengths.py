"""How many tokens a model takes at once, found by running it: without weights, and with positions that are real."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["fit_length"]

SHORT = 16
"""Tokens that any model takes."""

LARGEST = 2**20
"""Numbers of a tensor whose values are computed: positions and masks of a row have less, where they are no squares."""

aten = torch.ops.aten


def fit_length(config: Any, wanted: int) -> int:
    """Tokens per example: as wanted, but no more than the model has positions for.

    Those that its config states are the most; where some are reserved, as in RoBERTa and its kin, less run.
    """
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = min(wanted, stated) if isinstance(stated, int) and stated > 0 else wanted
    kind = _class_of(config)
    if kind is None or not any("position" in name for name in config.get_text_config().to_dict()):
        return most
    with _Values(), torch.device("meta"), torch.no_grad():
        try:
            model = kind._from_config(copy.deepcopy(config)).eval()
        except Exception:  # a config that asks for a missing package, say, which loading the model will tell
            return most
        return _longest(model, most)


def _longest(model: nn.Module, most: int) -> int:
    least, gap = min(most, SHORT), 1
    if _runs(model, most) or not _runs(model, least):  # the last: what stops it is not the length
        return most
    while most - gap > least and not _runs(model, most - gap):
        gap *= 2
    least, most = max(least, most - gap), most - gap // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if _runs(model, middle) else (least, middle)
    return least


def _class_of(config: Any) -> Any:
    """The model's class in transformers; None where it has none, such as for code beside the weights.

    It is imported here, since what a module makes at its import must be no tensor without values.
    """
    from transformers import MODEL_MAPPING

    kinds = MODEL_MAPPING.get(type(config), None)
    return kinds[0] if isinstance(kinds, tuple) else kinds


def _runs(model: Any, length: int) -> bool:
    """Whether one row of so many tokens runs."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokens = torch.full((1, length), 1 if pad == 0 else 0)
    more = {"decoder_input_ids": tokens} if getattr(model.config, "is_encoder_decoder", False) else {}
    try:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **more)
    except Exception:  # an index or a shape that does not fit; each model says it in its own way
        return False
    return True


class _Values(TorchDispatchMode):
    """Beside tensors without values, those that follow from none: positions, which must be rows of their tables.

    Attributes:
        known: tensor of the meta device → the same on the CPU, where it follows from such alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0] in self.known:
            return self.known[args[0]].item()
        self._check(func, args)
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.is_meta and made.numel() <= LARGEST:
            with contextlib.suppress(KeyError):
                self.known[made] = func(*self._real(args), **self._real(kwargs))
        return made

    def _real(self, values: Any) -> Any:
        """The arguments on the CPU; KeyError where one has no values."""
        values = tree_map_only(Tensor, lambda t: self.known[t] if t.is_meta else t, values)
        return tree_map_only(torch.device, lambda _: torch.device("cpu"), values)

    def _check(self, func: Any, args: Any) -> None:
        """Refuse an index beyond its table, which no kernel of the meta device looks at."""
        if func is aten.embedding.default:
            self._within(args[1], args[0].shape[0])
        elif func in (aten.gather.default, aten.index_select.default):
            self._within(args[2], args[0].shape[args[1]])
        elif func is aten.index.Tensor:
            for index, size in zip(args[1], args[0].shape, strict=False):
                self._within(index, size)

    def _within(self, index: Any, size: int) -> None:
        real = self.known.get(index) if isinstance(index, Tensor) else None
        if real is not None and real.dtype is not torch.bool and real.numel() and int(real.max()) >= size:
            raise IndexError(f"index {int(real.max())} of {size}")
