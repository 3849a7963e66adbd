"""The state of θ_d in an optimiser and a schedule, carried to another d: the state of its numbers, and its rate."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from unilora_core import ProjectionSpec, ValuesError, rates
from unilora_core.resizing import carried

__all__ = ["Change", "changes"]

POWERS = dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "ax"), 1)
"""The power of an optimiser's state: 1 where it is linear in θ_d or its gradient, 2 for mean squares
(`unilora_core.resizing`)."""
POWERS |= dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), 2)

GROUP = ("lr", "initial_lr", "max_lr", "min_lr")
"""The rates of a group of parameters; schedules put some of them there."""

SCHEDULE = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
"""The rates of a schedule, one for each group."""


class Change(NamedTuple):
    """A value that is to take its place."""

    place: Any
    key: Any
    value: Any

    def make(self) -> None:
        """Put the value in its place; more than once does no harm."""
        self.place[self.key] = self.value


def changes(
    what: str,
    before: ProjectionSpec,
    after: ProjectionSpec,
    theta_d: Tensor,
    optimizer: Optimizer | None,
    scheduler: Any,
) -> list[Change]:
    """Return what is to be put in an optimiser and its schedule; nothing has changed yet.

    Raises:
        ValuesError: the optimiser does not have θ_d, keeps something for its numbers that is not known here, has it in
            a group with others, whose rate would change, too, or has a schedule that is not given.
    """
    if optimizer is None:
        if scheduler is not None:
            raise ValuesError(f"{what}: a schedule without its optimiser; give both.")
        return []
    found = [i for i, group in enumerate(optimizer.param_groups) if any(p is theta_d for p in group["params"])]
    if not found:
        raise ValuesError(f"{what}: the optimiser does not have theta_d; give the one that trains this adapter.")
    state = list(_state(what, before, after, optimizer, theta_d))
    ratio = rates.theta_rate(after, 1.0) / rates.theta_rate(before, 1.0)
    return state if ratio == 1 else state + list(_rates(what, ratio, optimizer, found[0], scheduler))


def _state(
    what: str, before: ProjectionSpec, after: ProjectionSpec, optimizer: Optimizer, theta_d: Tensor
) -> Iterator[Change]:
    kept = optimizer.state.get(theta_d, {})
    for name, value in kept.items():
        numbers = isinstance(value, Tensor) and value.shape == theta_d.shape
        if numbers and name in POWERS and value.dtype in (torch.float32, torch.float64):
            yield Change(kept, name, carried(before, after, value, POWERS[name]))
        elif numbers or not (value is None or isinstance(value, (int, float)) or _single(value)):
            raise ValuesError(
                f"{what}: {type(optimizer).__name__} keeps {name!r} for theta_d, which cannot be carried over to "
                f"d = {after.d}; call {what} without the optimiser, and make a new one afterwards."
            )


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _rates(what: str, ratio: float, optimizer: Optimizer, i: int, scheduler: Any) -> Iterator[Change]:
    group = optimizer.param_groups[i]
    if len(group["params"]) > 1:
        raise ValuesError(
            f"{what}: theta_d is in a group of the optimiser with {len(group['params']) - 1} others, whose rate would "
            "change with its own; give it a group of its own: adapter.parameter_groups(lora_rate)."
        )
    if scheduler is None and "initial_lr" in group:
        raise ValuesError(
            f"{what}: the optimiser has a schedule, which would bring theta_d's old rate back; give it, too: "
            f"{what}(…, optimizer, scheduler)."
        )
    yield from (Change(group, name, group[name] * ratio) for name in GROUP if name in group)
    for each in _schedules(scheduler):
        lists = [found for name in SCHEDULE if isinstance(found := getattr(each, name, None), list)]
        yield from (Change(values, i, values[i] * ratio) for values in lists)


def _schedules(scheduler: Any) -> Iterator[Any]:
    """Yield a schedule, the schedules that it is made of, and the one that accelerate wraps."""
    if scheduler is not None:
        yield scheduler
        for inner in (getattr(scheduler, "scheduler", None), *getattr(scheduler, "_schedulers", ())):
            yield from _schedules(inner)
