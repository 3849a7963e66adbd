"""How many tokens a model takes at once."""

import copy
from typing import Any

import torch

__all__ = ["fit_length"]


def fit_length(config: Any, wanted: int) -> int:
    """Return the tokens per example: as wanted, but no more than the model has positions for.

    RoBERTa and its kin number positions from behind the row of their table that is for padding, so fewer are left than
    their config states.
    """
    from transformers import MODEL_MAPPING

    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = min(wanted, stated) if isinstance(stated, int) and stated > 0 else wanted
    kind = MODEL_MAPPING.get(type(config), None)  # none for code beside the weights
    if kind is None:
        return most
    try:
        with torch.device("meta"):
            model = (kind[0] if isinstance(kind, tuple) else kind)._from_config(copy.deepcopy(config))
    except Exception:  # a config that asks for a missing package, say, which loading the model will tell
        return most
    found = (module for name, module in model.named_modules() if "position" in name.rpartition(".")[2])
    tables = [table for table in found if hasattr(table, "weight") and isinstance(vars(table).get("padding_idx"), int)]
    return min([most, *(len(table.weight) - table.padding_idx - 1 for table in tables)])
