"""torch.compile: one graph, no recompilation, the same numbers."""

import os

import pytest
import torch
from small_models import adapted, assert_same_run, mlp, run
from torch import nn
from versions import TRACES_CONTEXTS

import unilora_core
import unilora_torch
from unilora_core import Layout, ProjectionSpec

pytestmark = pytest.mark.traces

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_one_graph_gives_the_same_numbers(start):
    model, adapter = adapted(start)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_run(run(compiled, adapter, X), run(*adapted(start), X))


def test_no_recompilation_over_twenty_steps():
    model = mlp()
    adapter = unilora_torch.attach(model, d=40, start="paper", bound=0.3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    opt = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            loss = compiled(X).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_compiled_submodule(start):
    model, adapter = adapted(start)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_same_run(run(model, adapter, X), run(*adapted(start), X))
    block = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    assert_same_run([block(X)], [adapted(start)[0].blocks[0](X)])


def test_a_submodule_compiled_before_any_forward_pass():
    model, _ = adapted("paper")
    block = torch.compile(model.blocks[0], fullgraph=True, backend="eager")
    assert_same_run([block(X)], [adapted("paper")[0].blocks[0](X)])


def test_checkpointing_in_a_compiled_model():
    model, adapter = adapted(model=mlp(checkpointing=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_run(run(compiled, adapter, X), run(*adapted(), X))


@TRACES_CONTEXTS
def test_merging_and_disabling_after_compilation():
    model, adapter = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(X)
    with adapter.disabled():
        assert torch.equal(compiled(X), mlp()(X))
    adapter.merge()
    torch.testing.assert_close(compiled(X), output)
    adapter.unmerge()
    assert torch.equal(compiled(X), output)


class Bypassed(nn.Module):
    """Uses a layer's weight, not the layer."""

    def __init__(self):
        super().__init__()
        self.used, self.bypassed = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return nn.functional.linear(self.used(x), self.bypassed.weight)


def test_a_bypassed_target_is_found_while_tracing():
    model, _ = adapted(model=Bypassed(), d=9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="bypassed: the model's forward pass never calls this module"):
        compiled(X)


@pytest.mark.skipif(not os.environ.get("UNILORA_SLOW"), reason="inductor takes half a minute; UNILORA_SLOW=1 runs it")
def test_inductor(device):
    model, adapter = adapted(model=mlp(depth=1).to(device))
    x = X.to(device)
    compiled = torch.compile(model, fullgraph=True)
    assert_same_run(run(compiled, adapter, x), run(model, adapter, x))


def test_export_keeps_the_adapted_outputs():
    model, _ = adapted()
    model.eval()
    program = torch.export.export(model, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.parametrize("grouping", ["balanced", "iid", "numpy-shuffle"])
def test_a_compiled_projection_gives_the_bits_of_the_core(grouping):
    spec = ProjectionSpec(Layout([("m.A", (3, 71))]), d=17, seed=5, grouping=grouping)
    compiled = torch.compile(unilora_torch.project, fullgraph=True, backend="aot_eager")
    theta_D = compiled(spec.init(xp=torch), spec.groups(xp=torch), spec.scale(xp=torch))
    assert theta_D.numpy().tobytes() == unilora_core.project(spec, spec.init()).tobytes()
