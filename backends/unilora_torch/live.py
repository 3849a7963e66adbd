"""The live state that the hooks of an adapter read: whether it acts here and now, its factors, and what no pass has
reached.

No state of a pass lies on the model, or where another thread sees it. θ_D of a pass belongs to its thread and ends with
the call of the model (`Live.around`). Whether an adapter is off belongs to a context (`Scope`). What changes the
weights that all threads see runs `alone`.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unilora_core import TargetError
from unilora_torch.calls import runs_elsewhere
from unilora_torch.structure import Structure
from unilora_torch.targets import Target
from unilora_torch.watch import Reach, looked_up

__all__ = ["Entered", "Live", "Numbers", "PerThread", "Scope", "Streamed", "alone"]


class PerThread(threading.local):
    """Attributes of which every thread has its own. A copy, also by pickle, begins anew."""

    def __reduce__(self) -> tuple:
        return type(self), ()


class Entered:
    """One ``with`` of a `Scope`: it holds its value until it is over."""

    def __init__(self, scope: "Scope", value: Any):
        self.scope, self.value, self.over = scope, value, False


_ENTERED: ContextVar[tuple[Entered, ...]] = ContextVar("unilora_torch", default=())


@dataclass(frozen=True, eq=False)
class Mark:
    """The value that held in a pass; the hooks on its outputs keep it."""

    value: Any


class Scope:
    """A value that holds inside a ``with``, for the thread or the asyncio task that entered it; and again where
    gradient checkpointing computes layers of that pass a second time, in whatever thread the backward pass runs.

    Attributes:
        strict: whether a layer is refused that is computed again for a pass without a mark.
        used: whether it was ever entered; until then a compiled graph need not look.
        open: every ``with`` that is not over, in whatever context.
        passes: number of a backward pass → the mark of the forward pass whose gradients it has come to.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict, self.used = strict, False
        self.open: set[Entered] = set()
        self.passes: WeakValueDictionary[int, Mark] = WeakValueDictionary()

    def __reduce__(self) -> tuple:
        return type(self), (self.strict,)

    def mark(self, outputs: Any) -> None:
        """Let the value that holds now hold again in the backward pass of these outputs of the model, from where their
        gradients come.
        """
        if not self.used or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        mark = Mark(self.get())

        def begin(_gradient: Tensor) -> None:
            self.passes[torch._C._current_graph_task_id()] = mark

        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(begin)

    def get(self) -> Any:
        """Return the value of the latest ``with`` that is not over in this context; None where there is none.

        Raises:
            TargetError: a layer is computed again, and the value that held in its pass cannot be known.
        """
        if not self.used:
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and (mark := self.passes.get(torch._C._current_graph_task_id())):
            return mark.value
        for entered in reversed(_ENTERED.get()):
            if entered.scope is self and not entered.over:
                return entered.value
        if not compiling:
            self._check()
        return None

    def _check(self) -> None:
        """Refuse a layer that autograd computes again for a pass that nobody marked."""
        if torch._C._current_graph_task_id() == -1:
            return
        own = isinstance(threading.current_thread(), threading._DummyThread)
        if self.strict or (own and self.open):
            raise TargetError(
                "gradient checkpointing computes a layer again, and the layer cannot know whether disabled() or "
                "rows(…) held in its pass: call the model itself, not a part of it, and checkpoint its layers, not the "
                "whole model, or those inside of others. Outputs are to be tensors in tuples, lists or dictionaries."
            )

    @contextlib.contextmanager
    def holds(self, value: Any) -> Iterator[None]:
        """Let the value hold inside the ``with``. Scopes that overlap may end in any order, and in any context."""
        entered = Entered(self, value)
        try:
            try:
                self.begin(entered)
                yield
            finally:
                self.end(entered)
        finally:  # again, where an interrupt kept the first from being done
            self.end(entered)

    def begin(self, entered: Entered) -> None:
        """Let a value hold, until its `end`."""
        self.used = True
        self.open.add(entered)
        _ENTERED.set((*_ENTERED.get(), entered))

    def end(self, entered: Entered) -> None:
        """End a value that was begun; more than once does no harm."""
        entered.over, entered.value = True, None
        self.open.discard(entered)
        _ENTERED.set(tuple(each for each in _ENTERED.get() if not each.over))


class _Here(PerThread):
    """The state that belongs to one thread.

    Attributes:
        factors: the factors of the pass under way.
        watched: a mapping that takes what each pass makes of the numbers, by target; None: nobody watches.
        changing: whether this thread makes the change under way.
        looked_up: whether a parameter of a module was looked up in the pass under way, as far as that is watched.
    """

    def __init__(self) -> None:  # runs in each thread at its first access
        self.factors: Mapping[str, Tensor] | None = None
        self.watched: dict[str, list[Tensor]] | None = None
        self.changing = False
        self.looked_up: Callable[[str], bool] = nobody


def nobody(_module: str) -> bool:
    """Say that no module is watched."""
    return False


def mode_of(training: bool, gradients: bool, device: str) -> str:
    """Say in words what may decide which modules a model calls."""
    return (
        f"in {'training' if training else 'evaluation'} ({'with' if gradients else 'without'} gradients, on {device})"
    )


@dataclass(frozen=True)
class Streamed:
    """A request to an adapter for the product of an update with x, where the update's weight is never made."""

    x: Tensor
    target: Target


class Numbers(Protocol):
    """A protocol: the source of the numbers, which is `unilora_torch.vector.Vector`."""

    theta_d: nn.Parameter
    structure: Structure

    @property
    def whole(self) -> bool:
        """Whether all factors are computed at once, when a pass begins."""

    def __call__(self, of: Any = None) -> Any:
        """Compute all factors; with a target its factors; with `Streamed` a product."""

    def chain(self, factors: Mapping[str, Tensor], target: Target) -> tuple[Tensor, ...]:
        """Make the chain of one target from its factors."""


class Live:
    """The live state that the hooks of one adapter read.

    Attributes:
        adapter: the source of the numbers.
        reached: which modules of targets have run, in each mode.
        on: whether the adapter is switched on.
        off: the scope that holds where the adapter is disabled.
        merged: whether the weights hold B·A.
        strength: the factor on B·A.
        change: the name of the change that one thread is making to the weights or hooks; None: no change.
    """

    remedy: ClassVar[str] = "Exclude it, or choose other targets."

    def __init__(self, adapter: Numbers, modules: Iterable[str]):
        self.adapter, self.reached = adapter, Reach(modules)
        self.on, self.merged, self.strength = True, False, 1.0
        self.off, self.here = Scope(), _Here()
        self.change: str | None = None
        self.claims: dict[str, object] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"change": None, "claims": {}}

    @property
    def enabled(self) -> bool:
        """Whether the adapter is switched on, and not disabled in this context."""
        return self.on and self.off.get() is None

    def acts(self) -> bool:
        """Say whether B·A is to be added to the outputs.

        Raises:
            TargetError: another thread is changing the model.
        """
        if self.change is not None and not self.here.changing:
            raise TargetError(_busy("the model was called", self.change))
        return not self.merged and self.enabled

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def reach(self, module: str) -> None:
        """Note that a module has run."""
        self.reached.note(module)

    def again(self, modules: Iterable[str]) -> None:
        """Wait once more for these modules to run."""
        self.reached.again(modules)

    def missed(self, modules: tuple[str, ...]) -> list[str]:
        """Return the modules that have run in no mode; see `Reach.missed`."""
        return self.reached.missed(modules)

    def bypassed(self, modules: tuple[str, ...], compiling: bool) -> tuple[str, list[str]]:
        """Return the mode, and the modules that it bypasses; for a graph that is traced, all that have not run."""
        used = self.here.looked_up
        return self.reached.mode, self.reached.bypassed(modules, (lambda _: True) if compiling else used)

    @torch.compiler.assume_constant_result
    def begin(self, training: bool, gradients: bool, device: str) -> None:
        """Begin a pass in some mode."""
        self.reached.begin(mode_of(training, gradients, device))

    def chain_of(self, target: Target) -> tuple[Tensor, ...]:
        """Compute the factors of one target in the order in which x meets them, A (r, in) and B (out, r); the last one
        times `strength`.

        Inside the model's forward pass they are views of one θ_D, projected once for all targets. Elsewhere (a
        submodule called alone, or recomputed by gradient checkpointing) they are projected alone. Autograd saves the
        same tensors in both cases, so that non-reentrant checkpointing accepts the one for the other.
        """
        here = self.here
        factors = self.adapter(target) if here.factors is None else here.factors
        chain = self.adapter.chain(factors, target)
        if self.strength != 1:
            chain = (*chain[:-1], chain[-1] * self.strength)
        if here.watched is not None:
            self.watch(target, chain)
        return chain

    def update(self, x: Tensor, target: Target) -> Tensor:
        """Compute the update's own product with x, times `strength`, where its weight is never made."""
        update = self.adapter(Streamed(x, target))
        update = update if self.strength == 1 else update * self.strength
        self.watch(target, [update])
        return update

    def watch(self, target: Target, tensors: Iterable[Tensor]) -> None:
        """Note tensors on which the outputs depend through this target alone, if anybody watches."""
        if self.here.watched is not None:
            mine = self.here.watched.setdefault(target.name, [])
            mine += [tensor for tensor in tensors if tensor.requires_grad]

    def open(self, module: nn.Module, _args: Any) -> None:
        """Begin a pass: the pre-hook of the model."""
        if torch.compiler.is_compiling():
            self.begin(module.training, torch.is_grad_enabled(), self.adapter.theta_d.device.type)
        self.here.factors = self.adapter() if self.acts() and self.adapter.whole else None

    def close(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """End a pass: the forward hook of the model; a compiled model has nothing else that ends it."""
        self.here.factors = None
        self.off.mark(output)

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict[str, list[Tensor]]]:
        """Yield a mapping that takes, inside the ``with``, what this thread's passes make of each target's numbers."""
        seen: dict[str, list[Tensor]] = {}
        try:
            self.here.watched = seen
            yield seen
        finally:
            self.here.watched = None

    def around(self, run: Callable[[nn.Module], Any], module: nn.Module) -> Any:
        """Run a call of the model: θ_D is dropped when it ends, whatever ends it."""
        before = self.here.factors
        try:
            try:
                self.here.factors = None
                return self._looking(run, module)
            finally:
                self.here.factors = before
        finally:
            self.here.factors = before

    def _looking(self, run: Callable[[nn.Module], Any], module: nn.Module) -> Any:
        """Run a call of the model and watch whose weights are used, as far as its mode is new."""
        if not self.acts():
            return run(module)
        mode = mode_of(module.training, torch.is_grad_enabled(), self.adapter.theta_d.device.type)
        watched = self.reached.begin(mode)
        try:
            modules = self.adapter.structure.modules
            with looked_up(modules, watched) if watched else contextlib.nullcontext(nobody) as self.here.looked_up:
                output = run(module)
        finally:
            self.here.looked_up = nobody
        self.reached.ended.add(mode)
        return output


@contextlib.contextmanager
def alone(model: nn.Module, lives: Iterable[Live], what: str) -> Iterator[None]:
    """Keep other threads from calling or changing the model inside the ``with``.

    Args:
        lives: the live state of all adapters of the model.
        what: the name of the change, for the error of refused calls.

    Raises:
        TargetError: another thread is calling or changing the model; nothing has changed then.
    """
    lives = tuple(lives)
    if all(live.here.changing for live in lives):
        yield
        return
    token = object()
    try:
        try:
            _claim(model, lives, what, token)
            yield
        finally:
            _release(lives, token)
    finally:  # again, where an interrupt kept the first from being done
        _release(lives, token)


def _claim(model: nn.Module, lives: tuple[Live, ...], what: str, token: object) -> None:
    for live in lives:
        if live.claims.setdefault("by", token) is not token:
            raise TargetError(_busy(what, live.change or "a change"))
    for live in lives:  # new calls are refused from here on; then calls that began before are looked for
        live.change, live.here.changing = what, True
    if runs_elsewhere(model):
        raise TargetError(
            f"{what}: another thread is calling the model, whose weights and hooks would change under it; nothing has "
            "changed. Do it while no pass is under way."
        )


def _release(lives: tuple[Live, ...], token: object) -> None:
    for live in lives:
        if live.claims.get("by") is token:
            live.change, live.here.changing = None, False
            live.claims.clear()


def _busy(what: str, change: str) -> str:
    return f"{what} while another thread is in the midst of {change}; do it before or after. Nothing has changed."
