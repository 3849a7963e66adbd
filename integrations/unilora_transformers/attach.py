"""attach, load: `unilora_torch`'s, with targets, a trained head and a check by default."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Adapter, Target
from unilora_transformers.check import check
from unilora_transformers.checkpointing import InputGradients
from unilora_transformers.targets import select_targets, task_heads

__all__ = ["attach", "finish", "load", "require_model"]


def attach(
    model: PreTrainedModel,
    targets: str | Iterable[str | Target] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    modules_to_save: str | Iterable[str] | None = None,
    example: Mapping[str, Any] | None = None,
    **options: Any,
) -> Adapter:
    """Freeze a model and put one trainable vector beside its linear layers.

    The model then runs once, to see that every target is reached and gives θ_d a gradient.

    Args:
        model: any transformers model; changed in place.
        targets: None for the query and value projections, under whichever names the model has them;
            ``"all-linear"``: every linear layer and Conv1D but the output embeddings and the task head;
            a regular expression for whole names, a list of names or endings, or a list of `Target`.
        exclude: taken away from ``targets``, by regular expression or list.
        modules_to_save: names of modules that train in full; by default the task head, if the model has one (a
            language model's head is none); ``()`` for no module.
        example: a batch of the model's inputs for the run; made up from the config unless given.
        **options: ``rank``, ``d``, ``seed``, ``grouping``, ``start`` and ``bound``, as in `unilora_torch.attach`.

    Returns:
        The adapter, also found at ``model.unilora``.

    Raises:
        TargetError: nothing to adapt, or something that cannot be adapted rightly; the model is unchanged.
        SpecError: rank or d out of range; the model is unchanged.
    """
    require_model(model)
    found = select_targets(model, targets, exclude)
    heads = task_heads(model) if modules_to_save is None else modules_to_save
    adapter = unilora_torch.attach(model, found, modules_to_save=heads, **options)
    try:
        check(model, adapter, example)
    except BaseException:
        adapter.detach()
        raise
    return finish(model, adapter)


def load(model: PreTrainedModel, path: str | os.PathLike) -> Adapter:
    """Read an adapter file and attach it to its base model; see `unilora_torch.load` for what it refuses.

    That every target is reached is checked by the first forward pass.
    """
    require_model(model)
    return finish(model, unilora_torch.load(model, path))


def finish(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    """What a transformers model needs once an adapter is on it."""
    gradients = InputGradients(model)
    adapter._handles += [gradients, model.register_forward_pre_hook(gradients)]
    return adapter


def require_model(model: object) -> None:
    """Refuse what is no transformers model.

    Raises:
        TargetError: with the remedy.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"expected a transformers model, got {type(model).__name__}; attach before torch.compile, PEFT or a "
            "parallel wrapper, and use unilora_torch.attach for other modules."
        )
