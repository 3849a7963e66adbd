"""attach, load and from_pretrained: those of `unilora_torch`, with default targets, a trained head and a check."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import Unpack

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Adapter, Target
from unilora_torch.base import with_fresh
from unilora_torch.heads import inside
from unilora_torch.options import AttachOptions, LoadOptions, check_attach
from unilora_transformers.bypassed import through_readers
from unilora_transformers.check import check
from unilora_transformers.checkpointing import watch_checkpointing
from unilora_transformers.fresh import (
    added_rows,
    fresh_parts,
    fresh_weights,
    refuse_rows,
    saved_with,
    warn_of_fresh,
)
from unilora_transformers.output_embeddings import watch_output_embeddings
from unilora_transformers.quantised_training import TrainableQuantised
from unilora_transformers.rollouts import Guard
from unilora_transformers.saving import Checkpoints, PretrainedMethods, build_base, find_files
from unilora_transformers.targets import select_targets, task_heads

__all__ = ["attach", "finish", "from_pretrained", "load", "require_model"]


def attach(
    model: PreTrainedModel,
    targets: str | Iterable[str | Target] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    method: str = "uni-lora",
    modules_to_save: str | Iterable[str] | None = None,
    example: Mapping[str, Any] | None = None,
    **options: Unpack[AttachOptions],
) -> Adapter:
    """Freeze a model and put one trainable vector beside its linear layers.

    The model then runs once in evaluation and once in training mode, to check that every target is reached and gives
    θ_d a gradient. That run finds layers whose weight the model uses without calling them (WavLM's projections): their
    weight is W + ΔW while the module that uses it runs. The runs leave no trace on the model.

    Args:
        model: any transformers model; changed in place.
        targets: None for the query and value projections, under whichever names the model has them;
            ``"all-linear"``: every linear layer and Conv1D except the output embeddings and the task head;
            a regular expression for whole names, a list of names or endings, or a list of `Target`.
        exclude: the names to remove from ``targets``, as a regular expression or a list.
        method: ``"uni-lora"``, or another of `unilora_core.methods.METHODS`: ``"lora"``, ``"vera"``, ``"lora-xs"``, …
        modules_to_save: names of modules or parameters that train in full; by default the task head, if the model has
            one (a language model's head is none). Weights that come from no checkpoint, such as BERT's pooler from a
            masked language model, are added. ``()`` means none: a file then fits only a base with the same fresh
            values.
        example: a batch of the model's inputs for the run; by default it is made up from the config.
        **options: ``rank``, ``d``, ``seed``, ``grouping``, ``start``, ``bound``, ``name`` and ``groups``, as in
            `unilora_torch.attach`, and the options of the method, such as ``vectors=64`` of VB-LoRA.

    Returns:
        The adapter, also found at ``model.unilora``.

    Raises:
        TargetError: there is nothing to adapt, or something cannot be adapted rightly, such as a quantised weight by a
            method that is made of its singular vectors; the model is unchanged.
        SpecError: a method or an option is unknown, or rank or d is out of range; the model is unchanged.
    """
    require_model(model)
    check_attach(method, options)
    found = select_targets(model, targets, exclude)
    fresh = fresh_weights(model)
    heads = _heads(model, modules_to_save, fresh)
    adapter = unilora_torch.attach(model, found, method=method, modules_to_save=heads, **options)
    adapter.base = with_fresh(adapter.base, model, (name for name in fresh if not inside(name, heads)))
    finish(model, adapter)
    try:
        check(model, adapter, example)
    except TargetError:
        adapter.detach()
        readers = through_readers(model, found, example)
        if readers == found:
            raise
        return attach(model, readers, method=method, modules_to_save=modules_to_save, example=example, **options)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def load(model: PreTrainedModel, path: str | os.PathLike, **options: Unpack[LoadOptions]) -> Adapter:
    """Read an adapter file and attach it to its base model.

    `unilora_torch.load` says what the options are, and what is refused. The first forward pass checks that every target
    is reached.
    """
    require_model(model)
    adapter = unilora_torch.load(model, path, **options)
    warn_of_fresh(model, adapter, os.fspath(path))
    return finish(model, adapter)


def from_pretrained(
    name: str | os.PathLike,
    model: PreTrainedModel | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a base model with the adapters that `save_pretrained` or a trainer wrote.

    Args:
        name: a local folder, such as a trainer's checkpoint, or a repository on the hub.
        model: the base model, changed in place; by default the one that the adapter file names is loaded.
        revision, token: the revision of the adapter's repository, and a token for it.
        **options: the options of the base model's own `from_pretrained`: dtype, device_map, quantization_config, …

    Returns:
        The model; its adapter is ``model.unilora``. Of several adapters the first acts, `unilora_torch.switch` chooses.

    Raises:
        TypeError: there are options for loading, but a base model is given.
        FileNotFoundError: there is no adapter.
        NotADirectoryError: ``name`` is a file, which `load` takes.
        AdapterFileError, MismatchError, TargetError: as in `load`; or the file does not name its base model.
    """
    files = find_files(name, revision, token)
    if model is not None and options:
        raise TypeError(f"from_pretrained: {sorted(options)} are for loading the base model, but a model is given.")
    if model is None:
        model = build_base(next(iter(files.values())), options)
    for adapter, path in files.items():
        unilora_torch.switch(model, ())  # each adapter may bring a head of its own
        load(model, path, name=adapter)
    unilora_torch.switch(model, next(iter(files)))
    return model


def _heads(model: PreTrainedModel, named: str | Iterable[str] | None, fresh: Iterable[str]) -> tuple[str, ...]:
    """Return what trains in full: what is named, or the task head, and what comes from no checkpoint; nothing for
    ``()``.
    """
    chosen = task_heads(model) if named is None else (named,) if isinstance(named, str) else tuple(named)
    if not chosen and named is not None:
        return ()
    rows = added_rows(model)
    saved = saved_with(chosen, fresh_parts(model, (name for name in fresh if name not in rows)))
    refuse_rows(model, rows, saved)
    return saved


def finish(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    """Add what a transformers model and its trainers need once an adapter is on it."""
    adapter.handles += watch_checkpointing(model)
    adapter.handles += [Checkpoints(model), PretrainedMethods(model), TrainableQuantised(model, adapter), Guard(model)]
    adapter.handles += watch_output_embeddings(model, adapter)
    return adapter


def require_model(model: object) -> None:
    """Refuse an object that is no transformers model.

    Raises:
        TargetError: it is none; the error has the remedy.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"expected a transformers model, got {type(model).__name__}; attach before torch.compile, PEFT or a "
            "parallel wrapper, and use unilora_torch.attach for other modules."
        )
