"""Chains of any length: one factor, two or three, beside every kind of layer, alone and as blocks."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from unilora_torch.chains import joined, product
from unilora_torch.paths import ConvPath, EmbeddingPath, LowRankPath, WeightPath
from unilora_torch.targets import Target, block_of, shaped

SIZES = {1: (), 2: (2,), 3: (3, 2)}
"""The widths inside a chain of so many factors."""


def chain(length, width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [width, *SIZES[length], height]
    return tuple(torch.randn(b, a, generator=generator) for a, b in itertools.pairwise(sizes))


@dataclass
class Given:
    """What a path looks at, with these chains by the name of the target."""

    chains: dict[str, tuple[Tensor, ...]]

    def acts(self):
        return True

    def reach(self, module):
        pass

    def chain_of(self, target):
        return self.chains[target.name]


@pytest.mark.parametrize("length", SIZES)
def test_blocks_that_are_joined(length):
    rows, heights = (1, 4, 9), (3, 2, 4)
    chains = [chain(length, 5, height, seed) for seed, height in enumerate(heights)]
    wanted = torch.zeros(15, 5)
    for row, height, each in zip(rows, heights, chains, strict=True):
        wanted[row : row + height] = product(each)
    found = joined(chains, rows, 15)
    assert len(found) == length
    torch.testing.assert_close(product(found), wanted)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 12), LowRankPath, lambda: torch.randn(2, 3, 5)),
    "embedding": (lambda: nn.Embedding(5, 12), EmbeddingPath, lambda: torch.tensor([[0, 3], [4, 1]])),
    "convolution": (lambda: nn.Conv2d(3, 12, 2, padding=1), ConvPath, lambda: torch.randn(2, 3, 4, 4)),
}


@pytest.mark.parametrize("blocks", [((0, 12),), ((0, 4), (7, 5))], ids=["whole", "blocks"])
@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_chain_beside_a_layer_is_its_product_in_the_weight(kind, length, blocks):
    torch.manual_seed(0)
    make, path, example = LAYERS[kind]
    layer, x, transposed = make(), example(), kind == "embedding"
    width = layer.weight[0].numel() if not transposed else len(layer.weight)
    targets = tuple(Target(f"{row}", "layer", width, height, row, transposed) for row, height in blocks)
    live = Given({target.name: chain(length, width, target.out_features, target.first_row) for target in targets})
    output = layer(x)
    found = path(live, targets)(layer, (x,), {}, output)
    with torch.no_grad():
        for target in targets:
            block_of(layer.weight, target).add_(shaped(product(live.chain_of(target)), target, layer.weight))
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, output)


@pytest.mark.parametrize("length", SIZES)
def test_a_chain_inside_a_weight(length):
    layer = nn.Linear(5, 12)
    target = Target("q", "", 5, 4, 6, parameter="weight")
    path = WeightPath(Given({"q": chain(length, 5, 4)}), (target,))
    wanted = layer.weight.detach().clone()
    block_of(wanted, target).add_(product(chain(length, 5, 4)))
    path.open(layer, None)
    torch.testing.assert_close(layer.__dict__["weight"], wanted)
    path.close(layer)
    assert "weight" not in layer.__dict__
