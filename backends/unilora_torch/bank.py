"""Bank: many adapters on one frozen base, for inference; each row of a batch names its own.

Row i of a layer's inputs leaves it as W x_i + Σ_k w_ik B_k A_k x_i, where (A_k, B_k) = P θ_k. A stored adapter is its
θ_d; adapters of one spec share P. When a layer runs, A and B of the batch's adapters are gathered, of this layer only.
"""

import contextlib
import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import AdapterFile, ProjectionSpec, TargetError, ValuesError, read_adapter
from unilora_torch import base
from unilora_torch.adapter import adapters, device_of
from unilora_torch.attach import check_fits, contents, tensors_of
from unilora_torch.checks import check_targets
from unilora_torch.heads import check_heads, head_state
from unilora_torch.reach import by_caller
from unilora_torch.rows import Batch, CallerHook, HeadHook, LayerHook, Part, Rows, Share
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
    each adapted layer has one forward hook, whatever the number of adapters. Move the model to its device first. A bank
    belongs to one thread at a time.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._stored: dict[str, _Stored] = {}
        self._shelves: dict[tuple[ProjectionSpec, tuple[Target, ...]], _Shelf] = {}
        self._made = 0
        self._hooked: tuple[set[_Shelf], set[str]] = (set(), set())
        self._handles: list[Any] = []
        self._identities: dict[tuple[str, ...], Mapping[str, str]] = {}
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
        self, name: str, file: str | os.PathLike | AdapterFile, *, replace: bool = False, check_base: bool = True
    ) -> None:
        """Store an adapter.

        Args:
            name: what the rows call it.
            file: the path of an adapter file, or its contents.
            replace: put it in the place of the adapter that has this name.
            check_base: refuse a file that was made for a base with other values; see `unilora_torch.load`.

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
        where, file = (f"adapter {name!r}", file) if isinstance(file, AdapterFile) else (str(file), read_adapter(file))
        theta_d = _checked(where, file)
        targets, modules_to_save = contents(where, file, self.model)
        shelf = self._shelves.get((file.spec, targets)) or self._new_shelf(where, file.spec, targets)
        heads = self._heads(where, file, modules_to_save)
        if check_base:
            base.check_base(where, file.metadata, self._identity(modules_to_save))
        self._stored[name] = _Stored(shelf, theta_d.to(shelf.tables.scale.device), heads)
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
        """Inside the ``with``, row i of each batch that the model gets is adapted by ``names[i]``.

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
        batch, before = self._read(names, copies), self._rows.batch
        self._rows.batch = batch
        try:
            yield
        finally:
            self._rows.batch = before

    def _read(self, names: Iterable[Row], copies: int) -> Batch:
        if isinstance(names, str) or not (rows := list(names)):
            raise ValuesError(f"Bank.rows: expected a list with a name for each row of the batch, got {names!r}.")
        if not isinstance(copies, int) or copies < 1:
            raise ValuesError(f"Bank.rows: expected copies ≥ 1, got {copies!r}.")
        pairs: dict[_Shelf, list[tuple[int, str, float]]] = {}
        heads: dict[str, dict[str, list[int]]] = {}
        for i, row in enumerate(rows):
            for name, weight in _mixture(i, row).items():
                stored = self._get(name, f"rows: row {i}")
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
        shares = {shelf.number: self._share(shelf, mine, len(rows)) for shelf, mine in pairs.items()}
        states = {
            module: [(self._stored[name].heads[module], torch.tensor(mine)) for name, mine in by_name.items()]
            for module, by_name in heads.items()
        }
        layers = {target.module for shelf in pairs for target in shelf.targets}
        return Batch(len(rows), copies, shares, states, frozenset(layers | states.keys()))

    def _share(self, shelf: _Shelf, pairs: list[tuple[int, str, float]], size: int) -> Share:
        rows, names, weights = zip(*pairs, strict=True)
        different, device = list(dict.fromkeys(names)), shelf.tables.scale.device
        number = {name: k for k, name in enumerate(different)}
        return Share(
            table=shelf.table([self._stored[name].theta_d for name in different]),
            which=None
            if len(different) in (1, len(names))
            else torch.tensor([number[n] for n in names], device=device),
            rows=None if rows == tuple(range(size)) else torch.tensor(rows, device=device),
            weights=None if set(weights) == {1.0} else torch.tensor(weights, device=device).view(-1, 1, 1),
        )

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
            check_fits(where, self.model, target)
            _check_by_row(where, self.model, target)
        check_targets(self.model, targets)
        self._made += 1
        return _Shelf(self._made, spec, targets, Tables.of(spec).to(device_of(self.model, targets)))

    def _heads(self, where: str, file: AdapterFile, names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        """The saved state of each module, in the dtypes of the model's own."""
        stored = tensors_of(file)
        states = {name: head_state(where, self.model, name, stored) for name in names}
        check_heads(self.model, names)
        own = {name: self.model.get_submodule(name).state_dict() for name in names}
        return {
            name: {key: state[key].to(like, copy=True) for key, like in own[name].items()}
            for name, state in states.items()
        }

    def _identity(self, heads: tuple[str, ...]) -> Mapping[str, str]:
        """`base.identity`, taken once for all adapters that save the same heads."""
        if heads not in self._identities:
            self._identities[heads] = base.identity(self.model, heads)
        return self._identities[heads]

    def _tidy(self) -> None:
        """Hooks for what is stored, and no shelf that nothing lies on. Unless that has changed, no hook is touched."""
        stored = self._stored.values()
        shelves, heads = {each.shelf for each in stored}, {module for each in stored for module in each.heads}
        if (shelves, heads) == self._hooked:
            return
        self._hooked = shelves, heads
        self._shelves = {
            (shelf.spec, shelf.targets): shelf for shelf in sorted(shelves, key=lambda shelf: shelf.number)
        }
        for handle in self._handles:
            handle.remove()
        parts: dict[str, list[Part]] = {}
        for shelf in self._shelves.values():
            for target in shelf.targets:
                parts.setdefault(target.module, []).append(_part(shelf, target))
        hooks: list[tuple[str, LayerHook | HeadHook]] = [
            (module, LayerHook(self._rows, module, tuple(mine))) for module, mine in parts.items()
        ]
        hooks += [(module, HeadHook(self._rows, module)) for module in sorted(heads)]
        self._handles = [
            self.model.get_submodule(module).register_forward_hook(hook, with_kwargs=True) for module, hook in hooks
        ]
        inside = by_caller(self.model, [module for module, _ in hooks])
        self._handles += [caller.register_forward_hook(CallerHook(self._rows, modules)) for caller, modules in inside]


def _mixture(i: int, row: Row) -> Mapping[str, float]:
    """Name → weight of one row."""
    if row is None:
        return {}
    if not isinstance(row, (str, Mapping)):
        raise ValuesError(f"Bank.rows: row {i}: expected a name, None, or name → weight, got {row!r}.")
    return {row: 1.0} if isinstance(row, str) else row


def _part(shelf: _Shelf, target: Target) -> Part:
    """A target in its layer; its groups are a view of the shelf's, unless a file holds another order."""
    layout, groups = shelf.spec.layout, shelf.tables.groups
    A, B = (layout.slices[f"{target.name}.{factor}"] for factor in "AB")
    own = groups[A.start : B.stop] if A.stop == B.start else torch.cat([groups[A], groups[B]])
    return Part(shelf.number, target, layout.shapes[f"{target.name}.A"][0], own)


def _checked(where: str, file: AdapterFile) -> Tensor:
    theta_d = torch.tensor(file.theta_d)
    if theta_d.shape != (file.spec.d,) or theta_d.dtype != torch.float32 or not theta_d.isfinite().all():
        raise ValuesError(
            f"{where}: expected theta_d ({file.spec.d},) float32 without NaN and infinity, got "
            f"{tuple(theta_d.shape)} {theta_d.dtype}, {int((~theta_d.isfinite()).sum())} of them NaN or infinite."
        )
    return theta_d


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
