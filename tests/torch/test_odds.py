"""What PyTorch offers beside plain modules: it works, or the project's own error says what to do."""

import io

import pytest
import torch
from small_models import adapted, assert_unchanged, mlp, snapshot
from torch import nn

import unilora_torch
from unilora_core import TargetError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("lazy", [nn.LazyLinear, nn.LazyBatchNorm1d])
@pytest.mark.parametrize("heads", [(), ("0",)])
def test_lazy_layers_are_to_be_run_first(lazy, heads):
    model = nn.Sequential(lazy(*([6] if lazy is nn.LazyLinear else [])), nn.Linear(6, 3))
    for targets in ("all-linear", ["1"]):
        with pytest.raises(TargetError, match=r"0\.weight: .*lazy.* run the model once on an example, then attach"):
            unilora_torch.attach(model, targets, d=9, modules_to_save=heads)
    model(X)
    unilora_torch.attach(model, ["1"], d=9, modules_to_save=heads)
    model(X).sum().backward()
    assert model.unilora.theta_d.grad.any()


def test_complex_weights_are_no_targets_and_no_hindrance(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.real, self.linear = nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.complex64)
            self.table = nn.Embedding(5, 6, dtype=torch.complex64)

        def forward(self, x):
            return self.real(x) + (self.linear(x.to(torch.complex64)) + self.table(torch.arange(4))).real

    model = Net()
    before = snapshot(model)
    for name in ("linear", "table"):
        with pytest.raises(TargetError, match=rf"{name}: its weight holds torch\.complex64, .* real; exclude it"):
            unilora_torch.attach(model, [name], d=9)
        assert_unchanged(model, before)
    _, adapter = adapted(model=model, targets=["real"], d=9)
    output = model(X)
    adapter.save(tmp_path / "adapter")
    adapter.merge()
    torch.testing.assert_close(model(X), output)
    adapter.detach()
    unilora_torch.load(model, tmp_path / "adapter")
    assert torch.equal(model(X), output)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_scripting_is_refused_and_tracing_keeps_the_outputs():
    model, _ = adapted(model=mlp().eval())
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"torch\.jit\.script: .*detach\(merge=True\), or use torch\.jit\.trace"):
        torch.jit.script(model)
    assert_unchanged(model, before)
    traced, held = torch.jit.trace(model, X), io.BytesIO()
    torch.jit.save(traced, held)
    held.seek(0)
    other = torch.randn(2, 6)
    torch.testing.assert_close(torch.jit.load(held)(other), model(other))


def test_a_symbolic_trace_keeps_the_outputs():
    model, _ = adapted(model=mlp().eval())
    output = model(X)
    assert torch.equal(torch.fx.symbolic_trace(model)(X), output)


@pytest.mark.parametrize("name", ["frozen", "frozen.inner"])
def test_a_head_that_is_called_as_what_a_file_keeps(name):
    """The tensors of a method that keeps singular vectors begin with ``frozen.``."""
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(6, 5))
    model.add_module("frozen", nn.Sequential())
    model.frozen.add_module("inner", nn.Linear(5, 3))
    before = snapshot(model)
    with pytest.raises(TargetError, match=rf"modules_to_save: {name}: .*frozen\..*rename"):
        unilora_torch.attach(model, ["fc"], method="lora-xs", rank=2, modules_to_save=[name])
    assert_unchanged(model, before)
    unilora_torch.attach(model, ["fc"], d=9, modules_to_save=[name])
