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
"""The classes that keep copies of θ_d, or hooks, of the size that it had."""


def grow(vector: Vector, factor: int = 2, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
    """Split each number of θ_d in ``factor``: the model computes what it did, and has more numbers to train.

    Call it between steps: a gradient that is there is dropped. θ_d stays the same parameter, with another size.

    Args:
        optimizer: the optimiser, which goes on: its state of θ_d is split, too, and its rate follows
            `Adapter.learning_rate`.
        scheduler: the schedule of its rates, if there is one.

    Raises:
        SpecError: the map's P does not nest (only ``balanced`` does), or d would be more than D; the error has the
            remedy.
        ValuesError: the optimiser does not have θ_d in a group of its own, or keeps state that is not known here.
        TargetError: the adapter is merged, another thread is calling the model, or DDP, FSDP or DeepSpeed has θ_d. In
            each case nothing has changed.
    """
    _resize(vector, grown(vector.spec, factor), optimizer, scheduler, "grow")


def shrink(vector: Vector, factor: int = 2, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
    """Join ``factor`` numbers of θ_d to one each, by the least squares fit: the model computes nearly what it did.

    It undoes `grow`, and has its arguments and errors.
    """
    _resize(vector, shrunk(vector.spec, factor), optimizer, scheduler, "shrink")


def resize(vector: Vector, d: int) -> None:
    """Give θ_d another number of values, as a growth or a shrinking does; nothing is done where it has d.

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
    """Refuse a state in which other objects than the adapter have numbers that belong to its d."""
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
    """Return the class of what the model is wrapped in; "" where it is not wrapped. Nothing on the model says so."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    gc.collect()  # a dropped wrapper may be in a reference cycle
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
    """Give a parameter other numbers, maybe another count of them; all who hold the parameter hold these. Its gradient
    is dropped.

    An earlier graph that is still alive keeps the node that adds up gradients, with the old size, and the next graph
    would get it. PyTorch drops that node where the dtype changes, so the dtype changes for a moment.
    """
    parameter.grad = None
    put = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # not a subclass's, which may cast
    put(parameter, value.half())
    put(parameter, value)


class Growth:
    """A schedule of d: it begins with a small d, and doubles it where the held-out loss has come to rest, while that
    pays.

    A d has come to rest when the loss of an evaluation is not lower than the best so far by ``gain``. Then d doubles,
    if the doubling before it has made the loss lower by as much; if it has not, d stays.

    Attributes:
        until: the largest d.
        gain: the fraction of the loss by which it must fall.
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
        """Make a schedule; ``optimizer`` and ``scheduler`` are as in `grow`.

        Raises:
            SpecError: the map does not nest, or ``until`` is less than twice d or more than D.
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
        """Take the loss of an evaluation into account, and say whether d has doubled now.

        Raises:
            ValuesError: the loss is NaN or infinite. `grow` may raise its errors, too.
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
        """Return what `load_state_dict` takes: d, and what the decisions depend on."""
        return {"d": self.adapter.spec.d, "best": self.best, "paid": self.paid, "over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. The adapter gets its d; θ_d, optimiser and schedule are loaded after that."""
        resize(self.adapter, state["d"])
        self.best, self.paid, self.over = state["best"], state["paid"], state["over"]
