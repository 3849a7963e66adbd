"""Tenants: adapters of a bank that train together; each row of a batch trains its own, in one pass through the base.

Each tenant has a parameter of its own, θ_d and heads, so any optimiser of PyTorch keeps rates, steps and moments for
each: one without a row in a batch gets no gradient, and is not moved.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import TargetError, ValuesError, rates
from unilora_core.header import write_identity, write_targets
from unilora_torch import base
from unilora_torch.batches import read_rows
from unilora_torch.frozen import tensors_of
from unilora_torch.hooked import Hooked
from unilora_torch.saving import rows_of, write
from unilora_torch.stored import Store, Values, named

__all__ = ["Tenants"]


class Tenants(nn.Module):
    """Adapters of a bank that train together; `Bank.trainable` makes it.

    ::

        tenants = bank.trainable(["fr", "de"])
        optimizer = torch.optim.AdamW(tenants.parameter_groups({"fr": 1e-3, "de": 2e-4}))
        with tenants.rows(names):                       # one name for each row of the batch
            logits = model(x)
        losses = tenants.losses(names, nn.functional.cross_entropy(logits, y, reduction="none"))
        sum(losses.values()).backward()                 # each tenant gets the gradient that it would get alone
        optimizer.step()

    The numbers are the bank's own: ``bank.rows`` serves them as they are at the moment. The base is no submodule, so a
    `state_dict` has the tenants' numbers alone, in the order of `names`.

    Attributes:
        names: the names of the tenants.
        model: the base; its parameters are frozen until `close`.
        theta: θ_d (d,) float32 of each tenant, in their order.
        heads: the trained parameters of each tenant's heads, those of one tenant after those of the one before.
    """

    def __init__(self, store: Store, hooked: Hooked, names: Iterable[str]):
        """Take these adapters of the store; see `Bank.trainable`."""
        super().__init__()
        self.names = _checked_names(names)
        self._store, self._hooked, self._model = store, hooked, (store.model,)
        self._entries = {name: named(store.entries, name, "trainable") for name in self.names}
        self._values = {name: _as_parameters(store.model, store.pin(name)) for name in self.names}
        self.theta = nn.ParameterList(self._values[name].theta_d for name in self.names)
        self.heads = nn.ParameterList(p for name in self.names for p in _heads_of(self._values[name]))
        self._open = True
        if not hooked.training:
            hooked.frozen = [p for p in store.model.parameters() if p.requires_grad]
        hooked.training += 1
        for parameter in hooked.frozen:
            parameter.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The base."""
        return self._model[0]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Return θ_d of a tenant, and the parameters of its heads.

        Raises:
            ValuesError: no tenant has this name.
        """
        values = self._values_of(name, "parameters_of")
        return [values.theta_d, *_heads_of(values)]  # type: ignore[list-item]

    def parameter_groups(
        self, lora_rate: float | Mapping[str, float], head_rate: float | Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        """Make the groups for a torch optimiser: tenants of one rate in one group, θ_d without weight decay.

        Args:
            lora_rate: the learning rate that LoRA would have, for all or by name; see `Adapter.learning_rate`.
            head_rate: the rate of the heads, likewise; ``lora_rate`` unless given.

        Raises:
            ValuesError: a tenant has no rate.
        """
        thetas: dict[float, list[Tensor]] = {}
        heads: dict[float, list[Tensor]] = {}
        for name in self.names:
            rate = _rate(lora_rate, name)
            theta, *head = self.parameters_of(name)
            thetas.setdefault(rates.theta_rate(self._entries[name].family.spec, rate), []).append(theta)
            if head:
                heads.setdefault(rate if head_rate is None else _rate(head_rate, name), []).extend(head)
        groups: list[dict[str, Any]] = [{"params": ps, "lr": rate, "weight_decay": 0.0} for rate, ps in thetas.items()]
        return groups + [{"params": ps, "lr": rate} for rate, ps in heads.items()]

    def stop(self, name: str) -> None:
        """Stop training a tenant: its rows run as before, and its numbers stay. Rows of others are not concerned.

        Raises:
            ValuesError: no tenant has this name.
        """
        for parameter in self.parameters_of(name):
            parameter.requires_grad_(False)
            parameter.grad = None

    def rows(self, names: Iterable[str], copies: int = 1) -> contextlib.AbstractContextManager[None]:
        """Adapt row i of each batch by tenant ``names[i]`` inside the ``with``; the output has its gradient.

        θ_d is projected when it is entered, once for all layers, so enter it anew after each step of the optimiser.

        Raises:
            ValuesError: a row names no tenant; see also `Bank.rows`.
            TargetError: a layer or a head was replaced.
        """
        self._hooked.structure.check("Tenants.rows")
        listed = list(names)
        for i, name in enumerate(listed):
            if not isinstance(name, str) or name not in self._values:
                raise ValuesError(
                    f"Tenants.rows: row {i}: {name!r} is no tenant that trains here; expected one of {len(self.names)} "
                    f"names such as {self.names[0]!r}. Leave the row out of the batch, or name it in bank.trainable."
                )
        batch = read_rows(lambda _, name: (self._entries[name], self._values[name]), listed, copies, training=True)
        return self._hooked.serving(self._store, batch)

    def forward(self, tenant: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what the base gives for rows of these tenants.

        Args:
            tenant: (rows,) integers, the places of their names in `names`.
            *args, **kwargs: what the base takes.
        """
        with self.rows(self.named_by(tenant)):
            return self.model(*args, **kwargs)

    def named_by(self, tenant: Tensor) -> list[str]:
        """Return the names at these places of `names`.

        Raises:
            ValuesError: there is no such place.
        """
        places = tenant.tolist()
        if wrong := [i for i in places if not 0 <= i < len(self.names)]:
            raise ValuesError(f"Tenants: tenant {wrong[0]}: expected a number below {len(self.names)}.")
        return [self.names[i] for i in places]

    def losses(self, names: Iterable[str], values: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the mean of each tenant's rows, whose sum has the gradient that each tenant would get alone.

        Args:
            names: of each row.
            values: (rows, …), a loss for each row, or for each of its tokens.
            weights: the same shape; 0 leaves a value out, such as that of a token of padding. None: all are 1. A tenant
                with no value left has the loss 0.

        Raises:
            ValuesError: there are other numbers of rows, or weights of another shape.
        """
        places: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            places.setdefault(name, []).append(i)
        if (count := sum(map(len, places.values()))) != len(values):
            raise ValuesError(f"Tenants.losses: expected a loss for each of {count} rows, got {tuple(values.shape)}.")
        if weights is not None and weights.shape != values.shape:
            raise ValuesError(
                f"Tenants.losses: expected weights of the shape {tuple(values.shape)} of the values, got "
                f"{tuple(weights.shape)}."
            )
        weights = torch.ones_like(values) if weights is None else weights.to(values)
        totals = {name: weights[at].sum() for name, at in places.items()}
        counted = {name: torch.where(total == 0, 1, total) for name, total in totals.items()}
        return {name: (values[at] * weights[at]).sum() / counted[name] for name, at in places.items()}

    def save(self, name: str, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """Write a tenant as an adapter file of its own, atomically, at any time; `load` and `Bank.add` read it.

        Args:
            metadata: more strings for the header.

        Raises:
            ValuesError: no tenant has this name, or θ_d or a head holds NaN or infinity; an old file is kept.
        """
        values, entry = self._values_of(name, "save"), self._entries[name]
        family = entry.family
        written = write_targets(rows_of(family.spec, family.targets), entry.heads)
        written |= write_identity(base.identity(self.model, entry.heads, entry.fresh)) | dict(metadata or {})
        heads = {f"{module}.{key}": tensor for module, state in values.heads.items() for key, tensor in state.items()}
        tensors = heads | tensors_of(family.spec, family.chains.frozen)
        write(path, family.spec, values.theta_d, tensors, written)

    def close(self) -> None:
        """Let the base's parameters train again that did before, unless other tenants train beside it; the bank goes on
        serving what was trained.
        """
        self._hooked.training -= self._open
        self._open = False
        if not self._hooked.training:
            for parameter in self._hooked.frozen:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> "Tenants":
        """Set the mode of the base, too."""
        self.model.train(mode)
        return super().train(mode)

    def _values_of(self, name: str, what: str) -> Values:
        if name not in self._values:
            raise ValuesError(f"Tenants.{what}: no tenant is named {name!r}; there are {len(self.names)}.")
        return self._values[name]

    def _apply(self, fn: Any, recurse: bool = True) -> "Tenants":  # noqa: ARG002
        """Stay where and what it is: the bank serves these numbers, and θ_d stays float32.

        Raises:
            TargetError: it would move to another device.
        """
        if any(fn(parameter.data).device != parameter.device for parameter in self.parameters()):
            raise TargetError("Tenants: move the model to its device before the bank is made, which serves it there.")
        return self


def _checked_names(names: Iterable[str]) -> tuple[str, ...]:
    found = () if isinstance(names, str) else tuple(names)
    if not found:
        raise ValuesError(f"Bank.trainable: expected a list of names, got {names!r}.")
    if twice := [name for i, name in enumerate(found) if name in found[:i]]:
        raise ValuesError(f"Bank.trainable: {twice[0]!r} is named twice; name each tenant once.")
    return found


def _as_parameters(model: nn.Module, values: Values) -> Values:
    """Return the same memory as parameters; buffers of heads stay tensors."""
    heads: dict[str, dict[str, Tensor]] = {}
    for module, state in values.heads.items():
        trained = dict(model.get_submodule(module).named_parameters(remove_duplicate=False))
        heads[module] = {key: nn.Parameter(t) if key in trained else t for key, t in state.items()}
    return Values(nn.Parameter(values.theta_d), heads)


def _heads_of(values: Values) -> list[nn.Parameter]:
    return [t for state in values.heads.values() for t in state.values() if isinstance(t, nn.Parameter)]


def _rate(given: float | Mapping[str, float], name: str) -> float:
    if isinstance(given, Mapping) and name not in given:
        raise ValuesError(f"Tenants.parameter_groups: {name!r} has no learning rate; give one for each tenant.")
    return given[name] if isinstance(given, Mapping) else given
