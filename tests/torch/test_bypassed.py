"""Which module reads the weight of a layer that is not called."""

import pytest
import torch
from torch import nn

import unilora_torch
from unilora_torch import Target
from unilora_torch.bypassed import through_readers

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight).tanh()


class Model(nn.Module):
    """Reads a layer's weight through a module of its own, as often and where ``use`` says."""

    def __init__(self, use):
        super().__init__()
        self.reader, self.use = Reader(), use

    def forward(self, x):
        if self.use == "called":
            return self.reader.layer(x)
        if self.use == "read by nothing":
            return x
        y = self.reader(x)
        if self.use == "read twice":
            y = self.reader(y)
        if self.use == "read after":
            y = y + nn.functional.linear(x, self.reader.layer.weight)
        return y


READERS = {
    "read once": ("reader", "layer.weight"),
    "read twice": ("reader", "layer.weight"),
    "read after": ("", "reader.layer.weight"),
    "called": ("reader.layer", None),
    "read by nothing": ("reader.layer", None),
}


@pytest.mark.parametrize("use", READERS)
def test_the_innermost_module_that_reads_all_of_it(use):
    model = Model(use)
    output, weight = model(X), model.reader.layer.weight
    (target,) = through_readers(model, [Target("q", "reader.layer", 6, 6)], lambda: model(X))
    assert (target.name, target.module, target.parameter) == ("q", *READERS[use])
    assert model.reader.layer.weight is weight
    assert torch.equal(model(X), output)
    if target.parameter:
        adapter = unilora_torch.attach(model, [target], d=20, start="paper")
        adapter.verify(X)
        assert not torch.equal(model(X), output)
