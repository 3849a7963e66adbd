"""Bank: many adapters on one frozen base, for inference; each row of a batch names its own.

Row i of a layer's inputs leaves it as W x_i + Σ_k w_ik B_k A_k x_i, where (A_k, B_k) = P θ_k. A stored adapter is its
θ_d; adapters of one spec share P. When a layer runs, A and B of the batch's adapters are gathered, of this layer only.
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
from unilora_torch.adapter import adapters, device_of
from unilora_torch.calls import Handle
from unilora_torch.live import Entered
from unilora_torch.opened import open_file
from unilora_torch.reach import by_caller
from unilora_torch.rows import Batch, CallerHook, HeadHook, Hook, LayerHook, Part, Rows, Share
from unilora_torch.tables import Tables
from unilora_torch.targets import Target, is_conv

__all__ = ["Bank"]

Row = str | None | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Shelf:
    """What all adapters of one spec and the same targets share."""

    number: int
    spec: ProjectionSpec
    targets: tuple[Target, ...]
    tables: Tables

    def table(self, thetas: list[Tensor]) -> Tensor:
        """What the groups point into: (u, d) float32, θ_d·s of each adapter, then (θ_d - θ_d⁰)·s for the identity."""
        theta_d, scale, origin = torch.stack(thetas), self.tables.scale, self.tables.origin
        return theta_d * scale if origin is None else torch.cat([theta_d * scale, (theta_d - origin) * scale], dim=1)


@dataclass(frozen=True, eq=False)
class _Stored:
    """One adapter: θ_d (d,) float32, and the state of each module that it saves."""

    shelf: _Shelf
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
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._stored: dict[str, _Stored] = {}
        self._shelves: dict[tuple[ProjectionSpec, tuple[Target, ...]], _Shelf] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._hooked: tuple[set[_Shelf], set[str]] = (set(), set())
        self._hooks: dict[tuple[type[Hook], str], tuple[Hook, Handle]] = {}
        self._identities: dict[tuple[str, ...], BaseIdentity | None] = {}
        self._rows = Rows()

    def __repr__(self) -> str:
        return f"Bank(adapters: {len(self._stored):,}, specs: {len(self._shelves):,}, bytes: {self.nbytes:,})"

    # ---- what is stored -----------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._stored)

    @property
    def nbytes(self) -> int:
        """What the bank holds: 4·d bytes for each adapter, its heads, and 4·D bytes and the scales for each spec."""
        tables = [table for shelf in self._shelves.values() for table in shelf.tables if table is not None]
        own = [stored.theta_d for stored in self._stored.values()]
        heads = [t for stored in self._stored.values() for state in stored.heads.values() for t in state.values()]
        return sum(tensor.nbytes for tensor in [*tables, *own, *heads])

    def add(
        self,
        name: str,
        file: str | os.PathLike | AdapterFile,
        *,
        replace: bool = False,
        check_base: bool = True,
        any_rank: bool = False,
    ) -> None:
        """Store an adapter.

        Args:
            name: what the rows call it.
            file: the path of an adapter file, or its contents.
            replace: put it in the place of the adapter that has this name.
            check_base: refuse a file that was made for a base with other values; see `unilora_torch.load`.
            any_rank: take factors of any rank, not only up to `unilora_core.lora.largest_rank`.

        Raises:
            AdapterFileError: the file is damaged or of an unknown version.
            MismatchError: the file belongs to another model.
            TargetError: a layer that cannot be adapted by row, or the model has an adapter attached.
            ValuesError: the name is taken, or θ_d holds NaN. In each case nothing has changed.
        """
        self._check_bare()
        if not isinstance(name, str) or not name:
            raise ValuesError(f"Bank.add: expected a name, got {name!r}.")
        if name in self._stored and not replace:
            raise ValuesError(f"Bank.add: {name!r} is taken; give replace=True to put another adapter in its place.")
        where, given = (f"adapter {name!r}", file) if isinstance(file, AdapterFile) else (str(file), None)
        found = open_file(where, self.model, file=given, any_rank=any_rank, known=self._shelves)
        if check_base:
            base.check_base(where, found.header.base, self._identity(found.header.modules_to_save))
        shelf = self._shelves.get((found.spec, found.targets)) or self._new_shelf(where, found.spec, found.targets)
        self._stored[name] = _Stored(shelf, found.theta_d.to(shelf.tables.scale.device), self._heads(found.heads))
        self._tidy()

    def remove(self, name: str) -> None:
        """Forget an adapter; what only it needed is freed.

        Raises:
            ValuesError: no adapter has this name.
        """
        self._get(name, "remove")
        del self._stored[name]
        self._tidy()

    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            ValuesError: no adapter has this name, or the new one is taken.
        """
        stored = self._get(name, "rename")
        if new in self._stored or not isinstance(new, str) or not new:
            raise ValuesError(f"Bank.rename: {new!r} is taken or no name; {name!r} keeps its own.")
        del self._stored[name]
        self._stored[new] = stored

    def close(self) -> None:
        """Forget all adapters: the model has no hook of the bank any more."""
        self._stored.clear()
        self._tidy()

    # ---- a batch ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def rows(self, names: Iterable[Row], copies: int = 1) -> Iterator[None]:
        """Inside the ``with``, row i of each batch that the model gets is adapted by ``names[i]``; in this thread or
        asyncio task only.

        Args:
            names: for each row the name of an adapter; None for the base; or name → weight for the weighted sum of the
                updates of several adapters.
            copies: how often `generate` repeats each row, side by side: ``num_beams``, or ``num_return_sequences`` of a
                sampled output. Inputs may then have the named rows or the repeated ones.

        Raises:
            ValuesError: an unknown name, no row, a weight that is no finite number, or a mixture of adapters of which
                one saves modules (a weighted sum of updates says nothing of them). Also by the model's forward pass:
                inputs of which the first axis is not the named rows.
            TargetError: the model has an adapter attached; by the forward pass: a layer or a head is never called.
        """
        self._check_bare()
        scope, entered = self._rows.scope, Entered(self._rows.scope, self._read(names, copies))
        try:
            try:
                scope.begin(entered)
                if not self._hooks_for(entered.value):  # another thread's `add` or `remove` is under way
                    self._tidy()
                yield
            finally:
                scope.end(entered)
        finally:  # again, where an interrupt kept the first from being done
            scope.end(entered)

    def _read(self, names: Iterable[Row], copies: int) -> Batch:
        if isinstance(names, str) or not (rows := list(names)):
            raise ValuesError(f"Bank.rows: expected a list with a name for each row of the batch, got {names!r}.")
        if not isinstance(copies, int) or copies < 1:
            raise ValuesError(f"Bank.rows: expected copies ≥ 1, got {copies!r}.")
        found: dict[str, _Stored] = {}
        pairs: dict[_Shelf, list[tuple[int, str, float]]] = {}
        heads: dict[str, dict[str, list[int]]] = {}
        for i, row in enumerate(rows):
            for name, weight in _mixture(i, row).items():
                stored = found[name] = found.get(name) or self._get(name, f"rows: row {i}")
                if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
                    raise ValuesError(
                        f"Bank.rows: row {i}: the weight of {name!r} must be a finite number, got {weight!r}."
                    )
                if stored.heads and isinstance(row, Mapping):
                    raise ValuesError(
                        f"Bank.rows: row {i}: {name!r} saves {', '.join(stored.heads)} in full, which has no weighted "
                        "sum of updates; name one adapter for the row."
                    )
                pairs.setdefault(stored.shelf, []).append((i, name, float(weight)))
                for module in stored.heads:
                    heads.setdefault(module, {}).setdefault(name, []).append(i)
        shares = {shelf.number: _share(shelf, mine, found, len(rows)) for shelf, mine in pairs.items()}
        states = {
            module: [(found[name].heads[module], torch.tensor(mine)) for name, mine in by_name.items()]
            for module, by_name in heads.items()
        }
        layers = {target.module for shelf in pairs for target in shelf.targets}
        return Batch(len(rows), copies, shares, states, frozenset(layers | states.keys()), frozenset(pairs))

    # ---- internals ----------------------------------------------------------------------------------------------

    def _check_bare(self) -> None:
        if adapters(self.model):
            raise TargetError("Bank: the model has an adapter attached, whose update would be added; detach it first.")

    def _get(self, name: object, what: str) -> _Stored:
        if name in self._stored:
            return self._stored[name]
        near = difflib.get_close_matches(str(name), self._stored, 3, 0.4) or list(self._stored)[:3]
        raise ValuesError(
            f"Bank.{what}: no adapter is named {name!r}; the nearest of {len(self._stored)} names are {near}."
        )

    def _new_shelf(self, where: str, spec: ProjectionSpec, targets: tuple[Target, ...]) -> _Shelf:
        for target in targets:
            _check_by_row(where, self.model, target)
        return _Shelf(next(self._numbers), spec, targets, Tables.of(spec).to(device_of(self.model, targets)))

    def _heads(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The saved state of each module, in the dtypes of the model's own."""
        own = {name: self.model.get_submodule(name).state_dict() for name in states}
        return {
            name: {key: state[key].to(like, copy=True) for key, like in own[name].items()}
            for name, state in states.items()
        }

    def _identity(self, heads: tuple[str, ...]) -> BaseIdentity | None:
        """`base.identity`, taken once for all adapters that save the same heads."""
        if heads not in self._identities:
            self._identities[heads] = base.identity(self.model, heads)
        return self._identities[heads]

    @property
    def _handles(self) -> list[Handle]:
        return [handle for _, handle in self._hooks.values()]

    def _hooks_for(self, batch: Batch) -> bool:
        shelves, heads = self._hooked
        return batch.shelves <= shelves and batch.heads.keys() <= heads

    def _tidy(self) -> None:
        """Hooks for what is stored or still named by rows, and no shelf that nothing lies on.

        Hooks that stay are not touched, so nobody who is calling the model meanwhile misses one.
        """
        with self._lock:
            stored, before = list(self._stored.values()), self._hooked
            shelves, heads = {each.shelf for each in stored}, {module for each in stored for module in each.heads}
            self._hooked = shelves & before[0], heads & before[1]  # rows that begin from here on see what may go
            for entered in list(self._rows.scope.open):
                if (batch := entered.value) is not None:
                    shelves |= batch.shelves
                    heads |= batch.heads.keys()
            if (shelves, heads) != before:
                self._shelves = {
                    (shelf.spec, shelf.targets): shelf for shelf in sorted(shelves, key=lambda each: each.number)
                }
                self._set_hooks(heads)
            self._hooked = shelves, heads

    def _set_hooks(self, heads: Iterable[str]) -> None:
        wanted = self._wanted(heads)
        for key in self._hooks.keys() - wanted.keys():
            self._hooks[key][1].remove()
            del self._hooks[key]
        for (kind, module), knows in wanted.items():
            if (kind, module) in self._hooks:
                self._hooks[kind, module][0].knows = knows
            else:
                hook: Any = kind(self._rows, module, knows)
                handle = self.model.get_submodule(module).register_forward_hook(hook, with_kwargs=True)
                self._hooks[kind, module] = hook, handle

    def _wanted(self, heads: Iterable[str]) -> dict[tuple[type[Hook], str], tuple]:
        """Kind of hook and module → what the hook knows: the parts of a layer, or what a caller calls."""
        parts: dict[str, list[Part]] = {}
        for shelf in self._shelves.values():
            for target in shelf.targets:
                parts.setdefault(target.module, []).append(_part(shelf, target))
        wanted: dict[tuple[type[Hook], str], tuple] = {
            (LayerHook, module): tuple(mine) for module, mine in parts.items()
        }
        wanted |= {(HeadHook, module): () for module in sorted(heads)}
        inside = by_caller(self.model, [module for _, module in wanted])
        return wanted | {(CallerHook, caller): modules for caller, modules in inside.items()}


def _mixture(i: int, row: Row) -> Mapping[str, float]:
    """Name → weight of one row."""
    if row is None:
        return {}
    if not isinstance(row, (str, Mapping)):
        raise ValuesError(f"Bank.rows: row {i}: expected a name, None, or name → weight, got {row!r}.")
    return {row: 1.0} if isinstance(row, str) else row


def _share(shelf: _Shelf, pairs: list[tuple[int, str, float]], found: Mapping[str, _Stored], size: int) -> Share:
    rows, names, weights = zip(*pairs, strict=True)
    different, device = list(dict.fromkeys(names)), shelf.tables.scale.device
    number = {name: k for k, name in enumerate(different)}
    which = torch.tensor([number[name] for name in names], device=device)
    return Share(
        table=shelf.table([found[name].theta_d for name in different]),
        which=None if len(different) in (1, len(names)) else which,
        rows=None if rows == tuple(range(size)) else torch.tensor(rows, device=device),
        weights=None if set(weights) == {1.0} else torch.tensor(weights, device=device).view(-1, 1, 1),
    )


def _part(shelf: _Shelf, target: Target) -> Part:
    """A target in its layer; its groups are a view of the shelf's, unless a file holds another order."""
    layout, groups = shelf.spec.layout, shelf.tables.groups
    A, B = (layout.slices[f"{target.name}.{factor}"] for factor in "AB")
    own = groups[A.start : B.stop] if A.stop == B.start else torch.cat([groups[A], groups[B]])
    return Part(shelf.number, target, layout.shapes[f"{target.name}.A"][0], own)


def _check_by_row(where: str, model: nn.Module, target: Target) -> None:
    """Refuse what does not see the rows of the batch one by one."""
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
