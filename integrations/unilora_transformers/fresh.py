"""Fresh weights: no checkpoint gave them values; they were made anew beside those that were loaded, and are in no other
file.

transformers marks what it loads. A frozen weight without the mark has random values that another run does not have, so
it trains in full and is saved with θ_d, as a new classifier is. Rows that were added to a vocabulary are such values in
large tables: whoever attaches an adapter says what happens to them.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from unilora_core import TargetError
from unilora_torch import Adapter
from unilora_torch.checks import is_plain
from unilora_torch.heads import inside, listed
from unilora_torch.vector import attached

__all__ = ["added_rows", "fresh_parts", "fresh_weights", "refuse_rows", "saved_with", "warn_of_fresh"]

MARK = "_is_hf_initialized"
"""The attribute of a parameter whose values `from_pretrained` read from a checkpoint, or tied to one that it read."""


def fresh_weights(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the parameters that come from no checkpoint; none in a model that was made from a config
    alone.

    Parameters that transformers itself expects to be missing (computed tables) are left out. So are quantised and
    offloaded ones: they were loaded, and have lost their mark.
    """
    own = tuple(attached(model))
    named = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if is_plain(parameter) and not parameter.is_meta and not inside(name, own)
    }
    names = {name for name, parameter in named.items() if not getattr(parameter, MARK, False)}
    if len(names) == len(named):  # a model from a config, or a copy, has no marks
        names = _not_in_checkpoint(model)
    names |= added_rows(model).keys()
    expected = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or r"(?!)")
    return tuple(name for name in named if name in names and not expected.search(name))


def fresh_parts(model: nn.Module, weights: Iterable[str]) -> tuple[str, ...]:
    """Return the outermost modules of which all parameters are among these, and those parameters that lie beside
    others.
    """
    weights, parts = tuple(weights), list[str]()
    for name, module in model.named_modules():
        mine = {f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)}
        if name and mine and mine <= set(weights) and not inside(name, parts):
            parts.append(name)
    return (*parts, *(name for name in weights if not inside(name, parts)))


def added_rows(model: PreTrainedModel) -> dict[str, int]:
    """Return the first added row of each weight that got rows for added tokens; empty unless the checkpoint is on this
    machine and tells it.
    """
    tables = _vocabulary_weights(model)
    if not tables or not _resized(model):
        return {}
    ours = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    sizes = {name: theirs for name, theirs, *_ in _loading_info(model).get("mismatched_keys", ())}
    grown = {
        name: shape[0] for name, shape in sizes.items() if shape[1:] == ours[name][1:] and shape[0] < ours[name][0]
    }
    first = {id(model.get_parameter(name)): rows for name, rows in grown.items()}
    return {name: first[id(table)] for name, table in tables.items() if id(table) in first}


def _vocabulary_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the input embeddings, if they came from a checkpoint, and what is tied to them or to the output
    embeddings.
    """
    try:
        modules = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return {}
    layers = [module for module in modules if isinstance(module, nn.Module)]  # Perceiver's embeddings are a parameter
    own = {id(each) for layer in layers for each in layer.parameters(recurse=False)}
    table = getattr(modules[0], "weight", None)
    if table is None or not getattr(table, MARK, False):
        return {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) in own}


def _resized(model: PreTrainedModel) -> bool:
    """Say whether the model has another number of tokens than its checkpoint."""
    config = model.config
    if not model.name_or_path:
        return False
    try:
        stored = type(config).from_pretrained(
            model.name_or_path, revision=getattr(config, "_commit_hash", None) or "main", local_files_only=True
        )
        return stored.get_text_config().vocab_size != config.get_text_config().vocab_size
    except Exception:  # transformers may raise anything where there is none, or no vocabulary
        return False


def refuse_rows(model: PreTrainedModel, rows: Mapping[str, int], saved: Iterable[str]) -> None:
    """Refuse rows of added tokens that would stay as they are, and be in no file.

    Raises:
        TargetError: there are such rows; the error has the remedy.
    """
    left = {name: first for name, first in rows.items() if not inside(name, saved)}
    if left:
        name, first = next(iter(left.items()))
        modules = tuple(dict.fromkeys(each.rpartition(".")[0] for each in left))
        raise TargetError(
            f"{', '.join(left)}: the rows from {first} to {len(model.get_parameter(name)) - 1} belong to added tokens; "
            "no checkpoint gave them values, and frozen they would be in no file. To train these tables and save them "
            f"whole: modules_to_save={modules!r}, and what else trains in full. To keep them as they are: save the "
            "resized model, load it from there and attach; or modules_to_save=(), for a file that fits these rows only."
        )


def saved_with(named: Iterable[str], parts: Iterable[str]) -> tuple[str, ...]:
    """Return what is named and what is fresh, each once: nothing that lies inside another."""
    found = dict.fromkeys((*named, *parts))
    return tuple(name for name in found if not inside(name, found.keys() - {name}))


def warn_of_fresh(model: PreTrainedModel, adapter: Adapter, where: str) -> None:
    """Warn of fresh weights that a file, or a folder, neither holds nor identifies."""
    told = adapter.base.fresh if adapter.base else {}
    left = [name for name in fresh_weights(model) if not inside(name, (*adapter.modules_to_save, *told))]
    if left:
        warnings.warn(
            f"{where}: no checkpoint gave {listed(fresh_parts(model, left))} values, and they are not in here, either: "
            "they are random, and may not be those that it was trained beside.",
            stacklevel=3,
        )


def _not_in_checkpoint(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that the model's checkpoint lacks, or has in another shape."""
    info = _loading_info(model) if model.name_or_path else {}
    return {*info.get("missing_keys", ()), *(name for name, *_ in info.get("mismatched_keys", ()))}


def _loading_info(model: PreTrainedModel) -> dict[str, Any]:
    """Return what transformers finds where it loads the model's checkpoint, without reading values; empty where the
    checkpoint is not on this machine.
    """
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # it changes names and shapes
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            loaded: Any = type(model).from_pretrained(
                model.name_or_path,
                config=config,
                revision=getattr(config, "_commit_hash", None) or "main",
                device_map="meta",
                ignore_mismatched_sizes=True,
                local_files_only=True,
                output_loading_info=True,
            )
            return loaded[1]
    except Exception:  # whatever transformers raises where there is none
        return {}
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
