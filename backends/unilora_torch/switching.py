"""Switching: which adapters of a model act and train, and what they are called."""

from collections.abc import Iterable, Mapping

from torch import nn

from unilora_core import TargetError
from unilora_torch.heads import check_apart
from unilora_torch.live import alone
from unilora_torch.merging import check_unmerge, unmerge
from unilora_torch.vector import Vector, attached, check_name

__all__ = ["rename", "switch"]


def switch(model: nn.Module, to: str | Iterable[str] | Mapping[str, float]) -> None:
    """Choose which adapters of a model act, and train; the others are off and frozen.

    Each adapter has modules to save of its own. They are kept with an adapter that is switched off, and put back when
    it is switched on.

    Args:
        to: a name; several names, whose updates add up; names with the weights of their updates; or ``()`` for the
            base model alone.

    Raises:
        TargetError: there is no adapter of that name, two of them save one module, a layer was replaced since one was
            put on, or another thread is calling the model. Nothing has changed then.
    """
    weights = {to: 1.0} if isinstance(to, str) else dict(to) if isinstance(to, Mapping) else dict.fromkeys(to, 1.0)
    there = attached(model)
    for name in weights:
        if name not in there:
            raise TargetError(f"switch: the model has no adapter {name!r}; it has {list(there) or 'none'}.")
    check_apart({name: there[name].modules_to_save for name in weights})
    for name, vector in there.items():
        check_unmerge(vector, "switch")
        if name in weights:
            vector.structure.check("switch")
    with alone(model, (vector.live for vector in there.values()), "switch"):
        try:
            _switch(there, weights)
        except BaseException:  # what has begun is brought to its end
            _switch(there, weights)
            raise


def _switch(there: Mapping[str, Vector], weights: Mapping[str, float]) -> None:
    for name in there.keys() - weights.keys():
        _off(there[name])
    for name, strength in weights.items():
        _on(there[name], strength)


def _off(vector: Vector) -> None:
    unmerge(vector)
    if vector.kept_heads is None:
        vector.kept_heads = {name: tensor.detach().clone() for name, tensor in vector.heads().items()}
    vector.live.on = False
    _train(vector, False)


def _on(vector: Vector, strength: float) -> None:
    unmerge(vector)
    if vector.kept_heads is not None:
        vector.model.load_state_dict(vector.kept_heads, strict=False)
        vector.kept_heads = None
    vector.live.on, vector.live.strength = True, strength
    _train(vector, True)


def _train(vector: Vector, trains: bool) -> None:
    vector.theta_d.requires_grad_(trains)
    for parameter in vector.saved_parameters().values():
        parameter.requires_grad_(trains)


def rename(vector: Vector, name: str) -> None:
    """Give an adapter another name among the model's submodules; see `Adapter.rename`."""
    model = vector.model
    check_name(model, name)
    renamed = {key: child for key, child in model._modules.items() if child is not vector} | {name: vector}
    model._modules = renamed  # one assignment, so that an interrupt leaves one name
