"""The rows of a batch, read from their names: what the hooks of a bank need of what is stored."""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from unilora_core import ValuesError
from unilora_torch.rows import Batch, Pairs
from unilora_torch.stored import Entry, Family, Store, Values, named

__all__ = ["Row", "read_rows"]

Row = str | None | Mapping[str, float]


def read_rows(store: Store, names: Iterable[Row], copies: int) -> Batch:
    """Return what the rows of a batch need, from their names; see `Bank.rows`."""
    if isinstance(names, str) or not (rows := list(names)):
        raise ValuesError(f"Bank.rows: expected a list with a name for each row of the batch, got {names!r}.")
    if not isinstance(copies, numbers.Integral) or copies < 1:
        raise ValuesError(f"Bank.rows: expected copies ≥ 1, got {copies!r}.")
    found: dict[str, tuple[Entry, Values]] = {}
    pairs: dict[Family, list[tuple[int, str, float]]] = {}
    heads: dict[str, dict[str, list[int]]] = {}
    for i, row in enumerate(rows):
        for name, weight in _mixture(i, row).items():
            if name not in found:
                entry = named(store.entries, name, f"rows: row {i}")
                found[name] = entry, store.values(name, entry)
            entry, _ = found[name]
            _check_weighted(i, row, name, weight, entry)
            pairs.setdefault(entry.family, []).append((i, name, float(weight)))
            for module in entry.heads:
                heads.setdefault(module, {}).setdefault(name, []).append(i)
    states = {
        module: [(found[name][1].heads[module], torch.tensor(mine)) for name, mine in by_name.items()]
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


def _pairs(
    family: Family, pairs: list[tuple[int, str, float]], found: Mapping[str, tuple[Entry, Values]], size: int
) -> Pairs:
    rows, names, weights = zip(*pairs, strict=True)
    different, device = list(dict.fromkeys(names)), family.projection.device
    number = {name: k for k, name in enumerate(different)}
    which = torch.tensor([number[name] for name in names], device=device)
    return Pairs(
        table=family.projection.table(torch.stack([found[name][1].theta_d for name in different])),
        which=None if len(different) in (1, len(names)) else which,
        rows=None if rows == tuple(range(size)) else torch.tensor(rows, device=device),
        weights=None if set(weights) == {1.0} else torch.tensor(weights, device=device).view(-1, 1, 1),
    )
