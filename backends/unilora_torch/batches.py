"""The rows of a batch, read from their names: what the hooks of a bank need of what is stored."""

import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unilora_core import ValuesError
from unilora_torch.gather import Gather
from unilora_torch.rows import Batch, Factors, Pairs, Table
from unilora_torch.stored import Entry, Family, Values

__all__ = ["Row", "read_rows"]

Row = str | None | Mapping[str, float]


def _gathered(family: Family, thetas: Sequence[Tensor]) -> Table:
    """Return the table of these θ_d, of which each layer gathers its own pieces when it runs."""
    assert isinstance(family.projection, Gather)
    return Table(family.projection.table(torch.stack(list(thetas))))


def _projected(family: Family, thetas: Sequence[Tensor]) -> Factors:
    """Return all pieces of these θ_d, differentiable: the backward pass scatters once for each θ_d, not for each
    layer.
    """
    layout = family.spec.layout
    numbers = torch.stack([family.projection(theta_d, [slice(0, family.spec.D)]) for theta_d in thetas])
    parts = numbers.split([math.prod(shape) for shape in layout.shapes.values()], dim=1)
    return Factors(
        {name: part.view(-1, *shape) for part, (name, shape) in zip(parts, layout.shapes.items(), strict=True)}
    )


def read_rows(
    find: Callable[[int, str], tuple[Entry, Values]], names: Iterable[Row], copies: int, training: bool = False
) -> Batch:
    """Return what the rows of a batch need, from their names; see `Bank.rows`.

    Args:
        find: (row, name) → the adapter of a name.
        training: whether the θ_d get gradients.
    """
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
                found[name] = find(i, name)
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
    thetas = {name: values.theta_d for name, (_, values) in found.items()}
    by_family = {family.number: _pairs(family, mine, thetas, len(rows), training) for family, mine in pairs.items()}
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
    family: Family, pairs: list[tuple[int, str, float]], thetas: Mapping[str, Tensor], size: int, training: bool
) -> Pairs:
    order = {name: k for k, name in enumerate(dict.fromkeys(name for _, name, _ in pairs))}
    counts = Counter(name for _, name, _ in pairs)
    even = len(set(counts.values())) == 1 if training else len(order) in (1, len(pairs))  # serving: one compiled graph
    if even and len(order) > 1:  # then A and B of an adapter need no copy for each of its rows
        pairs = sorted(pairs, key=lambda pair: order[pair[1]])
    rows, names, weights = zip(*pairs, strict=True)
    device, at_once = family.device, training or not isinstance(family.projection, Gather)
    shares = None if set(weights) == {1.0} else torch.tensor(weights, dtype=torch.float32, device=device)
    return Pairs(
        (_projected if at_once else _gathered)(family, [thetas[name] for name in order]),
        which=None if even else torch.tensor([order[name] for name in names], device=device),
        rows=None if rows == tuple(range(size)) else torch.tensor(rows, device=device),
        weights=None if shares is None else shares.view(-1, 1, 1),
    )
