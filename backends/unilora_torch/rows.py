"""The hooks of `unilora_torch.bank`: they give each row of a batch the update of its own adapters."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from unilora_core import TargetError, ValuesError
from unilora_torch.chains import Chains
from unilora_torch.live import PerThread, Scope
from unilora_torch.replaced import call_with
from unilora_torch.targets import Target

__all__ = ["Batch", "Block", "Factors", "HeadHook", "Hook", "LayerHook", "Pairs", "Rows", "Table"]


@dataclass(frozen=True, eq=False)
class Block:
    """One target in its layer, as the hooks need it.

    Attributes:
        family: the number of the family of adapters that have it.
        pieces: the names and shapes of the pieces of its chain.
        groups: int32, the groups of the pieces one after the other: places in a table of the family; None without one.
        chains: the function from pieces to chains.
    """

    family: int
    target: Target
    pieces: Mapping[str, tuple[int, ...]]
    groups: Tensor | None
    chains: Chains


@dataclass(frozen=True, eq=False)
class Table:
    """The table that groups point into, (u, d) or (u, 2d) float32 for u adapters; see `gather.Gather.table`."""

    numbers: Tensor

    def pieces(self, block: Block) -> Mapping[str, Tensor]:
        """Gather the pieces of a block by name, (u, *shape) each."""
        assert block.groups is not None
        numbers = self.numbers.index_select(1, block.groups.long())
        parts = numbers.split([math.prod(shape) for shape in block.pieces.values()], dim=1)
        return {name: part.view(-1, *block.pieces[name]) for part, name in zip(parts, block.pieces, strict=True)}


@dataclass(frozen=True, eq=False)
class Factors:
    """All pieces of u adapters by name, (u, *shape) each, projected at once: one gradient for all layers."""

    by_name: Mapping[str, Tensor]

    def pieces(self, block: Block) -> Mapping[str, Tensor]:
        """Return the pieces of a block by name, (u, *shape) each."""
        return {name: self.by_name[name] for name in block.pieces}


@dataclass(frozen=True, eq=False)
class Pairs:
    """The work of one family in a batch: m pairs of a row and an adapter, u adapters among them.

    Attributes:
        source: the numbers of the u adapters.
        which: (m,) the adapter of each pair; None: the pairs of an adapter follow each other, m/u of each.
        rows: (m,) the row of each pair; None: all rows in order.
        weights: (m, 1, 1) float32; None: all are 1.
    """

    source: Table | Factors
    which: Tensor | None
    rows: Tensor | None
    weights: Tensor | None

    def chain(self, block: Block, like: Tensor) -> list[Tensor]:
        """Compute the chain, A (m, r, in) and B (m, out, r) of a pair, made in float32, in the dtype and on the device
        of ``like``.

        Where the pairs of an adapter follow each other, m is u here. A frozen factor that all share has no such axis.
        """
        factors = (factor.to(like) for factor in block.chains(self.source.pieces(block), block.target))
        which = self.which
        return [factor if which is None or factor.dim() == 2 else factor.index_select(0, which) for factor in factors]


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of a batch, as the hooks need them.

    Attributes:
        size: the number of rows that were named.
        copies: how often `generate` repeats each.
        pairs: number of a family → its pairs.
        heads: module → the state and the rows of each adapter that saves this module.
        modules: every layer and head that must run.
        families: the families of the bank that these rows need.
    """

    size: int
    copies: int
    pairs: Mapping[int, Pairs]
    heads: Mapping[str, list[tuple[Mapping[str, Tensor], Tensor]]]
    modules: frozenset[str]
    families: frozenset[Any]

    def check(self, x: Tensor, features: int, module: str) -> None:
        """Refuse inputs whose rows are not the named rows. ``features``: trailing axes of one vector.

        Raises:
            ValuesError: they are not; the error has the shape.
        """
        leading = x.dim() - features
        if (leading > 0 and x.shape[0] == self.size) or (leading > 1 and x.shape[0] == self.size * self.copies):
            return
        raise ValuesError(
            f"{module}: expected inputs whose first axis is the {self.size} rows that were named"
            + (f", or {self.size * self.copies} with the {self.copies} copies of each" if self.copies > 1 else "")
            + f", got shape {tuple(x.shape)}. Name each row of the batch, and give copies=… where generate repeats it; "
            "a layer whose inputs mix rows with positions cannot be adapted by row."
        )


class _Here(PerThread):
    """The state of one thread: whether it is inside a head of an adapter."""

    def __init__(self) -> None:
        self.inside = False


@dataclass(eq=False)
class Rows:
    """The state that the hooks of a bank read.

    Attributes:
        scope: the scope that holds the `Batch` of each ``with bank.rows(…)``.
        reached: the layers and heads that have run since the bank was made.
    """

    remedy: ClassVar[str] = "It cannot be adapted by row."
    scope: Scope = field(default_factory=partial(Scope, strict=True))
    reached: set[str] = field(default_factory=set)
    here: _Here = field(default_factory=_Here)

    @property
    def batch(self) -> Batch | None:
        """The rows of the batch at hand; None means that the model is the base."""
        return None if self.here.inside else self.scope.get()

    def acts(self) -> bool:
        """Say whether rows are named here and now."""
        return self.batch is not None

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def reach(self, module: str) -> None:
        """Note that a module has run."""
        self.reached.add(module)

    def again(self, modules: Iterable[str]) -> None:
        """Wait once more for these modules to run."""
        self.reached.difference_update(modules)

    def missed(self, modules: tuple[str, ...]) -> list[str]:
        """Return the modules that the rows of this batch need, and that have not run."""
        batch = self.batch
        needed = frozenset() if batch is None else batch.modules - self.reached
        return [module for module in modules if module in needed]

    def bypassed(self, *_: Any) -> tuple[str, list[str]]:
        """Return no module: a bank looks at what has run, whatever the mode."""
        return "", []

    def outside(self, run: Callable[[], Any]) -> Any:
        """Return the result of a call that no hook of the bank acts on."""
        try:
            try:
                self.here.inside = True
                return run()
            finally:
                self.here.inside = False
        finally:  # again, where an interrupt kept the first from being done
            self.here.inside = False


class Hook:
    """The base class of hooks: the rows, the name of its module, and what its kind must know."""

    def __init__(self, rows: Rows, module: str, knows: tuple):
        self.rows, self.module, self.knows = rows, module, knows


class LayerHook(Hook):
    """The forward hook of one layer: it adds to each row the update of its adapters, and knows the layer's `Block`s."""

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """Return the new output, or None where no row has an adapter here."""
        batch = self.rows.batch
        if batch is None:
            return None
        self.rows.reach(self.module)
        mine = [(block, batch.pairs[block.family]) for block in self.knows if block.family in batch.pairs]
        if not mine:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        batch.check(x, 1, self.module)
        positions = x.shape[:-1].numel() // batch.size  # the copies of a row, which lie side by side, become its own
        x = x.reshape(batch.size, positions, x.shape[-1])
        total = output.reshape(batch.size, positions, output.shape[-1]).clone()
        for block, pairs in mine:
            *first, last = pairs.chain(block, x)
            rows = None if pairs.rows is None else pairs.rows.to(x.device)
            hidden = x if rows is None else x.index_select(0, rows)
            for factor in first:
                hidden = _by_adapter(hidden, factor)
            if pairs.weights is not None:
                hidden = hidden * pairs.weights.to(x.device)
            update = _by_adapter(hidden.to(x.dtype), last).to(total.dtype)
            outputs = total.narrow(-1, block.target.first_row, block.target.out_features)
            outputs.add_(update) if rows is None else outputs.index_add_(0, rows, update)
        return total.view(output.shape)


def _by_adapter(x: Tensor, factor: Tensor) -> Tensor:
    """Compute x (m, T, in) times the factor (u, out, in) of each m/u rows, or times one factor (out, in) of all."""
    if factor.dim() == 2:
        return x @ factor.mT
    each = x.reshape(len(factor), len(x) // len(factor) * x.shape[1], x.shape[-1])
    return (each @ factor.mT).view(*x.shape[:2], factor.shape[-2])


class HeadHook(Hook):
    """The forward hook of a module that some adapters save in full: it runs their rows through their own module."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """Return the new output, or None where no row has a head of its own."""
        batch = self.rows.batch
        if batch is None:
            return None
        self.rows.reach(self.module)
        if not (heads := batch.heads.get(self.module)):
            return None
        if not isinstance(output, Tensor):
            raise TargetError(
                f"{self.module}: expected a tensor as the output of a module that adapters save, got "
                f"{type(output).__name__}; rows of other adapters cannot be put into it. Attach such an adapter alone."
            )
        named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        now = dict(itertools.chain(*named))
        for state, rows in heads:
            state = {key: tensor.to(now[key].dtype) for key, tensor in state.items()}  # the model may be cast later

            def own(x: Any, rows: Tensor = rows) -> Any:
                if not isinstance(x, Tensor):
                    return x
                batch.check(x, int(x.is_floating_point()), self.module)
                return x.index_select(0, _repeated(rows, x.shape[0] // batch.size).to(x.device))

            args_of, kwargs_of = tree_map(own, args), tree_map(own, kwargs)
            result = self.rows.outside(partial(call_with, module, state, args_of, kwargs_of))
            rows = _repeated(rows, output.shape[0] // batch.size).to(output.device)
            output = output.index_copy(0, rows, result)
        return output


class OutputHook(Hook):
    """The forward hook of the model: layers that are computed again for these outputs find their rows again."""

    def __call__(self, _module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
        """Mark the outputs."""
        self.rows.scope.mark(output)


def _repeated(rows: Tensor, copies: int) -> Tensor:
    """Return the places of these rows where each row of the batch is repeated, side by side."""
    return (rows[:, None] * copies + torch.arange(copies)).flatten()
