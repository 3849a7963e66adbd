"""Bank: many adapters on one frozen base, for inference; each row of a batch names its own adapter.

Row i of a layer's inputs leaves it as W x_i + Σ_k w_ik B_k A_k x_i, where (A_k, B_k) = P θ_k. A stored adapter is its
θ_d; adapters of one spec share P. When a layer runs, A and B of the batch's adapters are gathered for this layer only.
"""

import contextlib
import difflib
import itertools
import math
import numbers
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import AdapterFile, ProjectionSpec, TargetError, ValuesError
from unilora_core.header import BaseIdentity
from unilora_torch import base
from unilora_torch.calls import Handle
from unilora_torch.chains import Chains
from unilora_torch.gather import Gather
from unilora_torch.heads import check_modules
from unilora_torch.live import Entered
from unilora_torch.opened import Opened, open_file
from unilora_torch.rows import Batch, Block, HeadHook, LayerHook, Pairs, Rows
from unilora_torch.structure import Structure
from unilora_torch.targets import Target, is_conv
from unilora_torch.vector import attached, device_of
from unilora_torch.watch import CallerHook, by_caller

__all__ = ["Bank"]

Row = str | None | Mapping[str, float]
Hook = LayerHook | HeadHook | CallerHook


@dataclass(frozen=True, eq=False)
class Family:
    """The state that all adapters of one spec and the same targets share."""

    number: int
    spec: ProjectionSpec
    targets: tuple[Target, ...]
    projection: Gather


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapter in the bank: θ_d (d,) float32, and the state of each module that it saves."""

    family: Family
    theta_d: Tensor
    heads: Mapping[str, Mapping[str, Tensor]]


class Bank:
    """Many adapters on one frozen base, for inference.

    ::

        bank = unilora_torch.Bank(model)
        bank.add("fr", "fr.safetensors")
        with bank.rows(["fr", None, "de"]):
            output = model(**batch)

    Outside ``with bank.rows(…)`` the model is the base. The model's weights, names and `state_dict` stay as they are;
    each adapted layer has one forward hook, whatever the number of adapters. Move the model to its device first. Many
    threads can share a bank, each with rows of its own, also while one adds or removes adapters.

    Attributes:
        model: the base.
        entries: name → what is stored.
        families: spec and targets → what the adapters that have them share.
        live: what its hooks look at.
        structure: the hooked modules.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.entries: dict[str, Entry] = {}
        self.families: dict[tuple[ProjectionSpec, tuple[Target, ...]], Family] = {}
        self.live = Rows()
        self.structure = Structure(self.live, model, ())
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._hooked: tuple[set[Family], set[str]] = (set(), set())
        self._hooks: dict[tuple[type[Hook], str], tuple[Hook, Handle]] = {}
        self._identities: dict[tuple[tuple[str, ...], tuple[str, ...]], BaseIdentity | None] = {}

    def __repr__(self) -> str:
        return f"Bank(adapters: {len(self.entries):,}, specs: {len(self.families):,}, bytes: {self.nbytes:,})"

    # ---- what is stored -----------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self.entries)

    @property
    def nbytes(self) -> int:
        """The bytes that the bank holds: 4·d for each adapter, its heads, and 4·D and the scales for each spec."""
        shared = [tensor for family in self.families.values() for tensor in family.projection.tensors]
        own = [entry.theta_d for entry in self.entries.values()]
        heads = [t for entry in self.entries.values() for state in entry.heads.values() for t in state.values()]
        return sum(tensor.nbytes for tensor in [*shared, *own, *heads])

    def add(
        self,
        name: str,
        file: str | os.PathLike | AdapterFile,
        *,
        replace: bool = False,
        check_base: bool = True,
        any_rank: bool = False,
    ) -> None:
        """Store an adapter in the bank.

        Args:
            name: the name by which the rows call it.
            file: the path of an adapter file, or its contents.
            replace: whether to put it in the place of the adapter that has this name.
            check_base: whether to refuse a file that was made for a base with other values; see `unilora_torch.load`.
            any_rank: whether to take factors of any rank, not only up to `unilora_core.lora.largest_rank`.

        Raises:
            AdapterFileError: the file is damaged or of an unknown version.
            MismatchError: the file belongs to another model.
            TargetError: a layer cannot be adapted by row, or was replaced, or the model has an adapter attached.
            ValuesError: the name is taken, or θ_d holds NaN. In each case nothing has changed.
        """
        _check_bare(self.model)
        self.structure.check("Bank.add")
        if not isinstance(name, str) or not name:
            raise ValuesError(f"Bank.add: expected a name, got {name!r}.")
        if name in self.entries and not replace:
            raise ValuesError(f"Bank.add: {name!r} is taken; give replace=True to put another adapter in its place.")
        where, given = (f"adapter {name!r}", file) if isinstance(file, AdapterFile) else (str(file), None)
        found = open_file(where, self.model, file=given, any_rank=any_rank, known=self.families)
        check_modules(self.model, found.heads, where)
        if check_base:
            base.check_base(where, found.header.base, self._identity(found))
        family = self.families.get((found.spec, found.targets))
        family = family or _family(where, self.model, found, next(self._numbers))
        theta_d, heads = found.theta_d.to(family.projection.device), _like(self.model, found.heads)
        self.entries[name] = Entry(family, theta_d, heads)
        self._tidy()

    def remove(self, name: str) -> None:
        """Forget an adapter; what only it needed is freed.

        Raises:
            ValuesError: no adapter has this name.
        """
        _named(self.entries, name, "remove")
        del self.entries[name]
        self._tidy()

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            ValuesError: no adapter has this name, or the new one is taken.
        """
        entry = _named(self.entries, name, "rename")
        if new in self.entries or not isinstance(new, str) or not new:
            raise ValuesError(f"Bank.rename: {new!r} is taken or no name; {name!r} keeps its own.")
        del self.entries[name]
        self.entries[new] = entry

    def close(self) -> None:
        """Forget all adapters: the model has no hook of the bank any more."""
        self.entries.clear()
        self._tidy()

    # ---- a batch ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def rows(self, names: Iterable[Row], copies: int = 1) -> Iterator[None]:
        """Adapt row i of each batch by ``names[i]`` inside the ``with``, in this thread or asyncio task only.

        Args:
            names: for each row the name of an adapter, None for the base, or a mapping name → weight for the weighted
                sum of the updates of several adapters.
            copies: how often `generate` repeats each row, side by side: ``num_beams``, or ``num_return_sequences`` of a
                sampled output. Inputs may then have either the named rows or the repeated ones.

        Raises:
            ValuesError: a name is unknown, there is no row, a weight is no finite number, or an adapter in a mixture
                saves modules (a weighted sum of updates says nothing of them). The model's forward pass raises it for
                inputs whose first axis is not the named rows.
            TargetError: the model has an adapter attached, or a layer or head was replaced. The forward pass raises it
                where one is never called.
        """
        _check_bare(self.model)
        self.structure.check("Bank.rows")
        scope, entered = self.live.scope, Entered(self.live.scope, _read(self.entries, names, copies))
        try:
            try:
                scope.begin(entered)
                if not _covers(self._hooked, entered.value):  # another thread's `add` or `remove` is under way
                    self._tidy()
                yield
            finally:
                scope.end(entered)
        finally:  # again, where an interrupt kept the first from being done
            scope.end(entered)

    # ---- internals ----------------------------------------------------------------------------------------------

    def _identity(self, found: Opened) -> BaseIdentity | None:
        """Return `base.identity`, taken once for all adapters that save the same heads."""
        key = found.header.modules_to_save, found.fresh
        if key not in self._identities:
            self._identities[key] = base.identity(self.model, *key)
        return self._identities[key]

    @property
    def handles(self) -> list[Handle]:
        """The handles of its hooks."""
        return [handle for _, handle in self._hooks.values()]

    def _tidy(self) -> None:
        """Keep hooks only for what is stored or still named by rows, and no family without an adapter.

        Hooks that stay are not touched, so no thread that is calling the model meanwhile misses one.
        """
        with self._lock:
            entries, before = list(self.entries.values()), self._hooked
            families, heads = {each.family for each in entries}, {module for each in entries for module in each.heads}
            self._hooked = families & before[0], heads & before[1]  # rows that begin from here on see what may go
            for entered in list(self.live.scope.open):
                if (batch := entered.value) is not None:
                    families |= batch.families
                    heads |= batch.heads.keys()
            if (families, heads) != before:
                ordered = sorted(families, key=lambda each: each.number)
                self.families = {(family.spec, family.targets): family for family in ordered}
                self._set_hooks(heads)
            self._hooked = families, heads

    def _set_hooks(self, heads: Iterable[str]) -> None:
        wanted = _wanted(self.model, self.families.values(), heads)
        for key in self._hooks.keys() - wanted.keys():
            self._hooks.pop(key)[1].remove()
        for (kind, module), knows in wanted.items():
            if (kind, module) in self._hooks:
                self._hooks[kind, module][0].knows = knows
            else:
                self._hooks[kind, module] = _hooked(self.model, kind(self.live, module, knows))
        with contextlib.suppress(TargetError):  # of what was replaced: `rows` and `add` tell
            self.structure.take(name for kind, name in wanted if kind is not CallerHook)


def _check_bare(model: nn.Module) -> None:
    if attached(model):
        raise TargetError("Bank: the model has an adapter attached, whose update would be added; detach it first.")


def _covers(hooked: tuple[set[Family], set[str]], batch: Batch) -> bool:
    families, heads = hooked
    return batch.families <= families and batch.heads.keys() <= heads


def _hooked(model: nn.Module, hook: Any) -> tuple[Any, Handle]:
    """Register a hook on its module; a hook that only watches comes last, another one first, so that foreign hooks see
    what a merge gives.
    """
    first = not isinstance(hook, CallerHook)
    layer = model.get_submodule(hook.module)
    return hook, layer.register_forward_hook(hook, with_kwargs=True, prepend=first)


# ---- what is named --------------------------------------------------------------------------------------------------


def _named(entries: Mapping[str, Entry], name: Any, what: str) -> Entry:
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(str(name), entries, 3, 0.4) or list(entries)[:3]
    raise ValuesError(f"Bank.{what}: no adapter is named {name!r}; the nearest of {len(entries)} names are {near}.")


def _read(entries: Mapping[str, Entry], names: Iterable[Row], copies: int) -> Batch:
    """Return what the rows of a batch need, from their names; see `Bank.rows`."""
    if isinstance(names, str) or not (rows := list(names)):
        raise ValuesError(f"Bank.rows: expected a list with a name for each row of the batch, got {names!r}.")
    if not isinstance(copies, numbers.Integral) or copies < 1:
        raise ValuesError(f"Bank.rows: expected copies ≥ 1, got {copies!r}.")
    found: dict[str, Entry] = {}
    pairs: dict[Family, list[tuple[int, str, float]]] = {}
    heads: dict[str, dict[str, list[int]]] = {}
    for i, row in enumerate(rows):
        for name, weight in _mixture(i, row).items():
            entry = found[name] = found.get(name) or _named(entries, name, f"rows: row {i}")
            _check_weighted(i, row, name, weight, entry)
            pairs.setdefault(entry.family, []).append((i, name, float(weight)))
            for module in entry.heads:
                heads.setdefault(module, {}).setdefault(name, []).append(i)
    states = {
        module: [(found[name].heads[module], torch.tensor(mine)) for name, mine in by_name.items()]
        for module, by_name in heads.items()
    }
    layers = {target.module for family in pairs for target in family.targets}
    by_family = {family.number: _pairs(family, mine, found, len(rows)) for family, mine in pairs.items()}
    return Batch(len(rows), int(copies), by_family, states, frozenset(layers | states.keys()), frozenset(pairs))


def _mixture(i: int, row: Row) -> Mapping[str, float]:
    """Return the adapters of one row, name → weight."""
    if row is None:
        return {}
    if not isinstance(row, (str, Mapping)):
        raise ValuesError(f"Bank.rows: row {i}: expected a name, None, or name → weight, got {row!r}.")
    return {row: 1.0} if isinstance(row, str) else row


def _check_weighted(i: int, row: Row, name: str, weight: Any, entry: Entry) -> None:
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValuesError(f"Bank.rows: row {i}: the weight of {name!r} must be a finite number, got {weight!r}.")
    if entry.heads and isinstance(row, Mapping):
        raise ValuesError(
            f"Bank.rows: row {i}: {name!r} saves {', '.join(entry.heads)} in full, which has no weighted "
            "sum of updates; name one adapter for the row."
        )


def _pairs(family: Family, pairs: list[tuple[int, str, float]], found: Mapping[str, Entry], size: int) -> Pairs:
    rows, names, weights = zip(*pairs, strict=True)
    different, device = list(dict.fromkeys(names)), family.projection.device
    number = {name: k for k, name in enumerate(different)}
    which = torch.tensor([number[name] for name in names], device=device)
    return Pairs(
        table=family.projection.table(torch.stack([found[name].theta_d for name in different])),
        which=None if len(different) in (1, len(names)) else which,
        rows=None if rows == tuple(range(size)) else torch.tensor(rows, device=device),
        weights=None if set(weights) == {1.0} else torch.tensor(weights, device=device).view(-1, 1, 1),
    )


# ---- the model ------------------------------------------------------------------------------------------------------


def _wanted(
    model: nn.Module, families: Iterable[Family], heads: Iterable[str]
) -> dict[tuple[type[Hook], str], tuple[Any, ...]]:
    """Return what each hook must know, by its kind and module: the blocks of a layer, or what a caller calls."""
    blocks: dict[str, list[Block]] = {}
    for family in families:
        for target in family.targets:
            blocks.setdefault(target.module, []).append(_block(family, target))
    wanted: dict[tuple[type[Hook], str], tuple[Any, ...]] = {
        (LayerHook, module): tuple(mine) for module, mine in blocks.items()
    }
    wanted |= {(HeadHook, module): () for module in sorted(heads)}
    inside = by_caller(model, [module for _, module in wanted])
    return wanted | {(CallerHook, caller): modules for caller, modules in inside.items()}


def _block(family: Family, target: Target) -> Block:
    """Make the block of a target in its layer; its groups are a view of the family's, unless a file holds another
    order.
    """
    layout, names = family.spec.layout, Chains.of(family.spec, [target], {}).names[target.name]
    groups = family.projection.groups_at(layout.slices[name] for name in names)
    return Block(family.number, target, tuple(layout.shapes[name] for name in names), groups)


def _family(where: str, model: nn.Module, found: Opened, number: int) -> Family:
    if found.spec.frame != "pair" or found.spec.map.groups is None:
        raise TargetError(
            f"{where}: a bank serves pairs of A and B that are a gather of θ_d, and this adapter has the frame "
            f"{found.spec.frame!r} and the grouping {found.spec.grouping!r}; attach such an adapter alone."
        )
    for target in found.targets:
        _check_by_row(where, model, target)
    projection = Gather.of(found.spec).to(device_of(model, found.targets))
    return Family(number, found.spec, found.targets, projection)


def _like(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the saved state of each module, in the dtypes of the model's own."""
    own = {name: model.get_submodule(name).state_dict() for name in states}
    return {
        name: {key: state[key].to(like, copy=True) for key, like in own[name].items()} for name, state in states.items()
    }


def _check_by_row(where: str, model: nn.Module, target: Target) -> None:
    """Refuse a target that does not see the rows of the batch one by one."""
    if target.parameter is not None:
        raise TargetError(
            f"{where}: {target.name} is added to a weight, which all rows of a batch share; attach such an adapter "
            "alone."
        )
    if re.search(r"(^|\.)experts?(\.|$)", target.module):
        raise TargetError(
            f"{where}: {target.module} is an expert, which gets the tokens that are routed to it, not the rows of "
            "the batch; attach such an adapter alone."
        )
    layer = model.get_submodule(target.module)
    if isinstance(layer, nn.Embedding) or is_conv(layer):
        kind = "a convolution" if is_conv(layer) else "an embedding"
        raise TargetError(
            f"{where}: {target.module} is {kind}, which a bank cannot adapt by row; attach such an adapter alone."
        )
