"""Training and running: checkpointing, submodules alone, exceptions, grad modes, autocast, dtypes, optimisers."""

import copy
import threading

import pytest
import torch
from small_models import Mlp, adapted, assert_same_run, mlp, naive_run, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import unilora_torch

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def inputs(requires_grad=False):
    """A reentrant checkpoint gives gradients only where an input has one."""
    return X.clone().requires_grad_(requires_grad)


def wanted(start="paper"):
    return run(*adapted(start), X)


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_forward_pass(reentrant, start, device):
    model, adapter = adapted(start, model=mlp(checkpointing=reentrant).to(device))
    assert_same_run(run(model, adapter, inputs(reentrant).to(device)), [value.to(device) for value in wanted(start)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_whole_model(reentrant, start):
    model, adapter = adapted(start)
    output = checkpoint(model, inputs(reentrant), use_reentrant=reentrant)
    output.square().sum().backward()
    assert_same_run((output, adapter.theta_d.grad), wanted(start))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the outer one runs without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_a_checkpoint(reentrant):
    model, adapter = adapted(model=mlp(checkpointing=reentrant))
    output = checkpoint(model, inputs(reentrant), use_reentrant=reentrant)
    output.square().sum().backward()
    assert_same_run((output, adapter.theta_d.grad), wanted())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_blocks_outside_the_forward_pass(reentrant):
    model, adapter = adapted()
    x = inputs(reentrant)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    output = model.head(x)
    output.square().sum().backward()
    assert_same_run((output, adapter.theta_d.grad), wanted())


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forward_passes_before_one_backward(reentrant):
    model, adapter = adapted(model=mlp(checkpointing=reentrant))
    x = inputs(reentrant)
    loss = model(x).square().sum() + model(x).square().sum()
    loss.backward()
    torch.testing.assert_close(adapter.theta_d.grad, 2 * wanted()[1], rtol=1e-5, atol=1e-5)


# ---- where the factors come from ------------------------------------------------------------------------------------


def count_projections(adapter, monkeypatch):
    calls = []
    whole = type(adapter).forward
    monkeypatch.setattr(type(adapter), "forward", lambda self, *of: calls.append(1) or whole(self, *of))
    return calls


def test_one_projection_serves_a_forward_pass(monkeypatch):
    model, adapter = adapted()
    calls = count_projections(adapter, monkeypatch)
    model(X)
    assert calls == [1]


def test_a_submodule_called_alone_gives_the_same_numbers(start):
    model, adapter = adapted(start)
    x = X
    for block in model.blocks:
        x = block(x)
    output = model.head(x)
    output.square().sum().backward()
    assert_same_run((output, adapter.theta_d.grad), wanted(start))


def test_forward_called_without_the_hooks_of_the_root():
    model, adapter = adapted()
    output = model.forward(X)
    output.square().sum().backward()
    assert_same_run((output, adapter.theta_d.grad), wanted())


class Recursive(nn.Module):
    """Calls itself between two targets."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, depth=2):
        x = self.first(x).tanh()
        if depth:
            x = self(x, depth - 1)
        return self.last(x)


def test_a_model_that_calls_itself(start):
    base, x = Recursive(), torch.randn(3, 4)
    model, adapter = adapted(start, model=copy.deepcopy(base), d=9)
    assert_same_run(run(model, adapter, x), naive_run(base, adapter, x))
    adapter.verify(x)


def test_an_exception_in_forward_leaves_nothing_behind():
    model, adapter = adapted()
    for layer in (model, model.blocks[1], model.blocks[1].down, model.head):
        handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(X)
        handle.remove()
        assert adapter.live.here.factors is None
    assert_same_run(run(model, adapter, X), wanted())


def test_a_change_of_theta_d_is_seen_at_once():
    model, adapter = adapted()
    before = model(X)
    with torch.no_grad():
        adapter.theta_d.mul_(2)
    assert not torch.allclose(model(X), before)
    assert not torch.allclose(model.blocks[0](X), adapted()[0].blocks[0](X))


# ---- grad modes and functional calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model, adapter = adapted()
    with mode():
        output = model.eval()(X)
    assert not output.requires_grad
    assert torch.equal(output, wanted()[0])
    assert_same_run(run(model.train(), adapter, X), wanted())


def test_adapter_attached_and_merged_under_inference_mode():
    with torch.inference_mode():
        model, adapter = adapted()
        output = model(X)
        adapter.merge()
        torch.testing.assert_close(model(X), output)


def test_functional_call_and_gradients_of_each_example(start):
    model, adapter = adapted(start)
    theta_d = adapter.theta_d.detach()

    def loss(theta_d, x):
        return torch.func.functional_call(model, {"unilora.theta_d": theta_d}, (x,)).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(theta_d, X), wanted(start)[1])
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(theta_d, X)
    torch.testing.assert_close(each.sum(0), wanted(start)[1], rtol=1e-4, atol=1e-4)


def test_vmap_over_inputs():
    model, _ = adapted()
    torch.testing.assert_close(torch.func.vmap(model)(X), wanted()[0])


def penalty(model):
    """|∂ loss/∂ input|²."""
    x = inputs(requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return slope.square().sum()


def test_a_gradient_penalty_against_finite_differences(start):
    model, adapter = adapted(start)
    (gradient,) = torch.autograd.grad(penalty(model), adapter.theta_d)
    step = 1e-3 * nn.functional.normalize(gradient, dim=0)
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            adapter.theta_d.add_(sign * step)
        values.append(penalty(model).item())
    assert (values[0] - values[1]) / 2 == pytest.approx(float(gradient @ step), rel=1e-2)


def test_threads_share_a_model():
    """Inference from several threads: each gets the right numbers, whoever opened the forward pass."""
    model, _ = adapted(model=mlp(depth=6))
    output = model(X)
    wrong = []

    def work():
        for _ in range(30):
            with torch.no_grad():
                if not torch.allclose(model(X), output, rtol=1e-5, atol=1e-6):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 6e-3), (torch.float64, 1e-6)])
def test_narrow_and_wide_bases(dtype, tolerance, start, device):
    base = mlp().to(dtype).to(device)
    model, adapter = adapted(start, model=copy.deepcopy(base))
    x = X.to(dtype).to(device)
    output, gradient = run(model, adapter, x)
    assert output.dtype == dtype
    assert gradient.dtype == torch.float32
    assert_same_run((output, gradient), naive_run(base, adapter, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, start):
    model, adapter = adapted(start)
    with torch.autocast("cpu", dtype=dtype):
        output = model(X)
    output.float().square().sum().backward()
    assert output.dtype == dtype
    assert adapter.theta_d.grad.dtype == torch.float32
    assert_same_run((output, adapter.theta_d.grad), wanted(start), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_autocast_with_checkpointing(reentrant):
    model, adapter = adapted(model=mlp(checkpointing=reentrant))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs(reentrant))
    output.float().square().sum().backward()
    assert_same_run((output, adapter.theta_d.grad), wanted(), rtol=5e-2, atol=5e-2)


def test_a_layer_in_another_dtype_than_its_input():
    """A head kept in float32 behind a bf16 body, as quantised models have it."""
    model = mlp().bfloat16()
    model.head.float()
    model.head.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    model, adapter = adapted(model=model)
    output, gradient = run(model, adapter, X.bfloat16())
    assert output.dtype == torch.float32
    assert gradient.any()


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_training_lowers_the_loss_and_leaves_the_base_alone(optimiser, start, device):
    model = mlp(width=16).to(device)
    base = copy.deepcopy(model.state_dict())
    adapter = unilora_torch.attach(model, d=100, start=start, bound=0.5)
    opt = optimiser(adapter.parameter_groups(1e-3))
    x = torch.randn(32, 16).to(device)
    y = torch.randint(0, 3, (32,)).to(device)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.items())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "unilora.theta_d")


def test_a_saved_module_trains_in_full():
    model = mlp(width=16)
    adapter = unilora_torch.attach(model, d=20, modules_to_save=["head"], start="paper", bound=0.5)
    assert [t.module for t in adapter.targets] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    before = model.head.weight.detach().clone()
    opt = torch.optim.AdamW(adapter.parameter_groups(1e-3, head_rate=1e-2))
    model(torch.randn(3, 16)).square().sum().backward()
    opt.step()
    assert (model.head.weight - before).abs().min() > 5e-3


def test_accumulated_gradients_and_clipping():
    model, adapter = adapted()
    for _ in range(2):
        model(X).square().sum().backward()
    torch.testing.assert_close(adapter.theta_d.grad, 2 * wanted()[1])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert adapter.theta_d.grad.norm() <= 1.001


def test_resuming_from_a_state_dict():
    model, adapter = adapted()
    state = copy.deepcopy(model.state_dict())
    other = Mlp()
    unilora_torch.attach(other, d=40, start="paper", bound=0.3)
    other.load_state_dict(state)
    assert torch.equal(other(X), model(X))
    assert torch.equal(other.unilora.theta_d, adapter.theta_d)


def test_dropout_and_train_mode_are_the_models_own():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    model, adapter = adapted(model=model, d=9)
    assert model.training
    assert adapter.training
    model.eval()
    assert torch.equal(model(X), model(X))
