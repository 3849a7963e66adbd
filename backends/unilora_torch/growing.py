"""Another d for an adapter that trains: the same function with more numbers, or nearly the same with fewer."""

import gc
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unilora_core import ProjectionSpec, SpecError, TargetError, ValuesError
from unilora_core.resizing import grown, moved, resized, shrunk
from unilora_torch.carrying import Change, changes
from unilora_torch.projection import Projection
from unilora_torch.vector import Vector, projection_of

__all__ = ["Growth", "grow", "resize", "shrink"]

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Classes that keep copies of θ_d, or hooks, of the size that it had."""


def grow(vector: Vector, factor: int = 2, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
    """Split each number of θ_d in ``factor``: the model computes what it did, and has more numbers to train.

    Between steps: a gradient that is there is dropped. θ_d stays the parameter that it is, its size is another.

    Args:
        optimizer: goes on; what it keeps of θ_d is split, too, and its rate follows `Adapter.learning_rate`.
        scheduler: of its rates, if there is one.

    Raises:
        SpecError: a map whose P does not nest (all but ``balanced``), or more numbers than D; with the remedy.
        ValuesError: the optimiser does not have θ_d in a group of its own, or keeps what is not known here.
        TargetError: the adapter is merged, another thread is calling the model, or DDP, FSDP or DeepSpeed has θ_d. In
            each case nothing has changed.
    """
    _resize(vector, grown(vector.spec, factor), optimizer, scheduler, "grow")


def shrink(vector: Vector, factor: int = 2, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
    """Join ``factor`` numbers of θ_d to one each, by the least squares fit: the model computes nearly what it did.

    The opposite of `grow`, which it takes back, with its arguments and errors.
    """
    _resize(vector, shrunk(vector.spec, factor), optimizer, scheduler, "shrink")


def resize(vector: Vector, d: int) -> None:
    """Give θ_d d numbers, as a growth or a shrinking does; nothing is done where it has them.

    Raises:
        SpecError: see `unilora_core.resizing.resized`.
        TargetError: see `grow`.
    """
    if d != vector.spec.d:
        _resize(vector, resized(vector.spec, d), None, None, "resize")


def _resize(vector: Vector, spec: ProjectionSpec, optimizer: Optimizer | None, scheduler: Any, what: str) -> None:
    _check(vector, what)
    with vector.alone(what):  # all that can fail comes first
        projection, theta_d = projection_of(spec, vector.groups), moved(vector.spec, spec, vector.theta_d.detach())
        beside = changes(what, vector.spec, spec, vector.theta_d, optimizer, scheduler)
        try:
            _put(vector, spec, projection, theta_d, beside)
        except BaseException:  # what has begun is brought to its end
            _put(vector, spec, projection, theta_d, beside)
            raise


def _check(vector: Vector, what: str) -> None:
    """Refuse a state in which other things than the adapter have numbers that belong to its d."""
    if vector.live.merged:
        raise TargetError(f"{what}: the adapter is merged; unmerge it first.")
    vector.structure.check(what)
    if hasattr(vector.theta_d, "full_tensor") or hasattr(vector.theta_d, "ds_shape"):
        raise TargetError(f"{what}: theta_d is spread over processes, in parts that fit its d; {_anew(what)}")
    if wrapper := _wrapper(vector):
        raise TargetError(
            f"{what}: the model is wrapped in a {wrapper}, which keeps the size that theta_d had; {_anew(what)}"
        )


def _wrapper(vector: Vector) -> str:
    """The class of what the model is wrapped in; nothing at the model tells."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    gc.collect()  # one that was dropped may be in a circle
    kinds = ((type(each).__name__, each) for each in gc.get_objects())
    found = (kind for kind, each in kinds if kind in WRAPPERS and any(m is vector for m in each.modules()))
    return next(found, "")


def _anew(what: str) -> str:
    return f"{what} before the model is wrapped, or save the adapter and wrap a model that loads it."


def _put(
    vector: Vector, spec: ProjectionSpec, projection: Projection, theta_d: Tensor, beside: Iterable[Change]
) -> None:
    vector.spec, vector.projection, vector.placed = spec, projection, None
    _replace(vector.theta_d, theta_d)
    vector._settle()
    for change in beside:
        change.make()


def _replace(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter other numbers, another size of them, too; whoever holds it holds these. Its gradient is dropped.

    A graph of before that is still alive keeps the node that adds up gradients, with its size, and the next graph would
    get it. PyTorch lets go of it where the dtype changes, so that it does so for a moment.
    """
    parameter.grad = None
    put = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # not a subclass's, which may cast
    put(parameter, value.half())
    put(parameter, value)


class Growth:
    """Begins with a small d, and doubles it where the held-out loss has come to rest, while that pays.

    A d has come to rest when the loss of an evaluation is not lower than the best so far by ``gain``. Then d doubles,
    if the doubling before it has made the loss lower by as much; if it has not, d stays.

    Attributes:
        until: d is never more.
        gain: the part of the loss by which it must fall.
        best: the best loss so far.
        paid: whether the loss has fallen since d doubled last.
        over: whether d stays as it is from now on.
    """

    def __init__(
        self,
        adapter: Vector,
        until: int,
        gain: float = 0.01,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
    ):
        """``optimizer`` and ``scheduler``: as in `grow`.

        Raises:
            SpecError: a map that does not nest, or ``until`` is less than twice d or more than D.
        """
        grown(adapter.spec)
        d, D = adapter.spec.d, adapter.spec.D
        if not 2 * d <= until <= D:
            raise SpecError(f"Growth: expected 2·d = {2 * d} ≤ until ≤ D = {D}, got until = {until}.")
        if not 0 < gain < 1:
            raise SpecError(f"Growth: expected 0 < gain < 1, a part of the loss, got {gain}.")
        self.adapter, self.until, self.gain = adapter, until, gain
        self.optimizer, self.scheduler = optimizer, scheduler
        self.best, self.paid, self.over = math.inf, True, False

    def step(self, held_out_loss: float) -> bool:
        """Take the loss of an evaluation into account; whether d has doubled now.

        Raises:
            ValuesError: the loss is NaN or infinite; and what `grow` raises.
        """
        if not math.isfinite(held_out_loss):
            raise ValuesError(f"Growth.step: expected a finite loss, got {held_out_loss}; training diverged.")
        if self.best == math.inf or held_out_loss < self.best - self.gain * abs(self.best):
            self.best, self.paid = held_out_loss, True
            return False
        self.over = self.over or not self.paid or 2 * self.adapter.spec.d > self.until
        if not self.over:
            grow(self.adapter, 2, self.optimizer, self.scheduler)
            self.paid = False
        return not self.over

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: d, and what the decisions depend on."""
        return {"d": self.adapter.spec.d, "best": self.best, "paid": self.paid, "over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. The adapter gets its d; θ_d, optimiser and schedule are loaded after that."""
        resize(self.adapter, state["d"])
        self.best, self.paid, self.over = state["best"], state["paid"], state["over"]
