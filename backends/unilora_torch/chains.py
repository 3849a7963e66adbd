"""What is built of a target's numbers: its factors, by name, and the chain that they make.

A chain is (F_1, …, F_k) in the order in which x meets them: the update of a layer is F_k·…·F_1, and beside it runs
``for F in chain: x = linear(x, F)``. Every target has the chain (A, B); nothing else in this package knows their names.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from unilora_torch.targets import Target

__all__ = ["chain_of", "factor_names", "joined", "product"]

T = TypeVar("T")


def factor_names(target: Target) -> tuple[str, ...]:
    """The names of a target's factors in the layout, in the order of its chain."""
    return f"{target.name}.A", f"{target.name}.B"


def chain_of(factors: Mapping[str, T], target: Target) -> tuple[T, ...]:
    """The chain of one target, of the factors by name."""
    return tuple([factors[name] for name in factor_names(target)])


def product(chain: Sequence[Tensor]) -> Tensor:
    """F_k·…·F_1, (…, out, in)."""
    update = chain[0]
    for factor in chain[1:]:
        update = factor @ update
    return update


def joined(chains: Sequence[Sequence[Tensor]], rows: Sequence[int], height: int) -> tuple[Tensor, ...]:
    """One chain for the blocks of one layer, (height, in) as a product, which is zero outside of the blocks.

    The first factors stand one below the other, the others on a diagonal, the last ones in their rows.

    Args:
        chains: of the blocks, all of one length, in the order of their rows.
        rows: where each block starts.
        height: the layer's outputs, at least where the last block ends.
    """
    last = [chain[-1] for chain in chains]
    width = last[0].shape[1] if len(chains[0]) == 1 else 0  # of what fills the rows between: a lone factor takes x
    spread, row = [], 0
    for factor, first_row in zip(last, rows, strict=True):
        spread += [factor.new_zeros(first_row - row, width), factor]
        row = first_row + factor.shape[0]
    spread.append(last[0].new_zeros(height - row, width))
    if len(chains[0]) == 1:
        return (torch.cat(spread),)
    first, *middle = zip(*[chain[:-1] for chain in chains], strict=True)
    return torch.cat(first), *[torch.block_diag(*factors) for factors in middle], torch.block_diag(*spread)
