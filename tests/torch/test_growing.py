"""Another d while training: the same function, optimisers and schedules that go on, and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from methods import METHODS, attached, loss, moved, reference, run
from small_models import adapted, assert_same_run, mlp
from torch import nn
from torch.optim import lr_scheduler as schedules

import unilora_torch
from unilora_core import MismatchError, SpecError, TargetError, ValuesError, read_adapter
from unilora_core.resizing import carried, grown
from unilora_torch import growing
from unilora_torch.switching import switch

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
EVERY = [method for method in METHODS if method != "vb-lora"]
PLACES = ("linear", "blocks of a linear", "transposed, beside", "embedding", "convolution", "attention", "experts")
SMALL = {"tinylora": 2}


def near(x):
    return 1e-6 * max(1.0, x.abs().max().item())


def balanced(method, *args, d=8, **kwargs):
    return moved(method, *args, grouping="balanced", d=SMALL.get(method, d), **kwargs)


def trained(optimiser, steps=3, scheduler=None, **options):
    """A model with an adapter, some steps of an optimiser that has θ_d and the head, and these two."""
    model, adapter = adapted(start="identity", targets=["up", "down"], modules_to_save=["head"], **options)
    optimizer = optimiser(adapter.parameter_groups(1e-2))
    made = scheduler(optimizer) if scheduler else None
    for _ in range(steps):
        step(model, optimizer, made)
    return model, adapter, optimizer, made


def step(model, optimizer, scheduler=None):
    optimizer.zero_grad()
    loss(model(X)).backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


# ---- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("start", ["paper", "identity"])
def test_the_function_stays_and_the_gradient_is_that_of_the_new_P(method, start):
    base, model, adapter, x = balanced(method, start=start)
    before, theta_d, d = run(model, adapter, x), adapter.theta_d, adapter.spec.d
    adapter.grow(2)
    assert adapter.theta_d is theta_d
    assert (len(theta_d), adapter.spec.d, adapter.spec.first.d) == (2 * d, 2 * d, d)
    assert theta_d.requires_grad
    assert theta_d.grad is None
    assert_same_run(run(model, adapter, x), reference(base, adapter, x))
    torch.testing.assert_close(model(x), before[0], rtol=0, atol=near(before[0]))
    adapter.shrink(2)
    for found, wanted in zip(run(model, adapter, x), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=near(wanted))


@pytest.mark.parametrize("method", ["uni-lora", "gpart", "tinylora", "vera"])
@pytest.mark.parametrize("place", PLACES)
def test_wherever_the_update_goes(method, place):
    base, model, adapter, x = balanced(method, place, d=4)
    before = model(x).detach()
    adapter.grow(adapter.spec.D // adapter.spec.d)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert_same_run(run(model, adapter, x), reference(base, adapter, x))


@pytest.mark.parametrize("start", ["identity", "zero"])
def test_a_fresh_adapter_stays_the_base_exactly(start):
    base, model, adapter, x = attached(
        "gpart" if start == "zero" else "uni-lora", grouping="balanced", d=6, start=start
    )
    for factor in (2, 3):
        adapter.grow(factor)
        assert torch.equal(model(x), base(x))
    adapter.shrink(3)
    assert torch.equal(model(x), base(x))


def test_a_graph_that_is_still_alive_does_not_matter():
    """PyTorch would hand its accumulator, of the old size, to the next graph."""
    model, adapter = adapted()
    value = loss(model(X))
    value.backward()
    for change in (adapter.grow, adapter.shrink):
        change(2)
        again = loss(model(X))
        again.backward()
        assert adapter.theta_d.grad.shape == adapter.theta_d.shape
        torch.testing.assert_close(again, value)


def test_hooks_of_theta_d_stay():
    model, adapter = adapted()
    seen = []
    adapter.theta_d.register_hook(lambda grad: seen.append(len(grad)))
    adapter.theta_d.register_post_accumulate_grad_hook(lambda theta_d: seen.append(len(theta_d.grad)))
    loss(model(X)).backward()
    adapter.grow(2)
    loss(model(X)).backward()
    assert seen == [40, 40, 80, 80]


@pytest.mark.traces
def test_a_compiled_model():
    torch.compiler.reset()
    model, adapter = adapted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    run(compiled, adapter, X)
    for change in (adapter.grow, adapter.grow, adapter.shrink):
        change(2)
        assert_same_run(run(compiled, adapter, X), run(model, adapter, X))
    torch.compiler.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_grows_by_itself(copied):
    model, adapter = adapted()
    twin = copied(model)
    twin.unilora.grow(2)
    assert (adapter.spec.d, twin.unilora.spec.d) == (40, 80)
    torch.testing.assert_close(twin(X), model(X), rtol=0, atol=1e-6)
    torch.testing.assert_close(copied(twin)(X), model(X), rtol=0, atol=1e-6)


def test_one_that_is_switched_off_or_beside_another():
    model, adapter = adapted()
    unilora_torch.attach(model, name="other", d=20, start="paper", bound=0.3)
    both = model(X)
    adapter.grow(2)
    torch.testing.assert_close(model(X), both, rtol=0, atol=1e-6)
    switch(model, "other")
    alone = model(X)
    adapter.grow(2)
    assert torch.equal(model(X), alone)
    assert not adapter.theta_d.requires_grad
    switch(model, ("unilora", "other"))
    torch.testing.assert_close(model(X), both, rtol=0, atol=1e-6)


def test_merged_and_detached_afterwards():
    base, (model, adapter) = mlp(), adapted()
    wanted = model(X)
    adapter.grow(2)
    adapter.verify(X)
    adapter.merge()
    torch.testing.assert_close(model(X), wanted)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(X), base(X))


def test_a_model_elsewhere(device):
    model, adapter = adapted(model=mlp().to(device))
    before = model(X.to(device))
    adapter.grow(2)
    assert adapter.theta_d.device.type == device
    torch.testing.assert_close(model(X.to(device)), before, rtol=0, atol=1e-6)


# ---- optimisers -----------------------------------------------------------------------------------------------------


OPTIMISERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "SGD without": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AMSGrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, centered=True, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "ASGD": torch.optim.ASGD,
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_optimisers_go_on(optimiser):
    """Their state has θ_d's size, the head's is what it was, and the loss goes on falling."""
    model, adapter, optimizer, _ = trained(OPTIMISERS[optimiser])
    before = dict(optimizer.state[model.head.weight])
    rates = [group["lr"] for group in optimizer.param_groups]
    first = loss(model(X)).item()
    adapter.grow(2, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rates[0] * 2**-0.75), rates[1]]
    assert optimizer.param_groups[0]["params"] == [adapter.theta_d]
    assert all(optimizer.state[model.head.weight][name] is value for name, value in before.items())
    for value in optimizer.state[adapter.theta_d].values():
        assert not isinstance(value, torch.Tensor) or value.shape in ((80,), ())
    for _ in range(3):
        step(model, optimizer)
    assert loss(model(X)).item() < first
    adapter.shrink(4, optimizer)
    step(model, optimizer)


def test_the_step_after_is_the_old_direction_by_the_new_rate():
    """Of a momentum, and of Adam's two moments: where no gradient comes, θ_D goes on as it did, times 2^-¾."""
    for optimiser in (lambda groups: torch.optim.SGD(groups, momentum=0.9), torch.optim.Adam):
        steps = []
        for grows in (False, True):
            _, adapter, optimizer, _ = trained(optimiser)
            if grows:
                adapter.grow(2, optimizer)
            before = theta_D(adapter)
            adapter.theta_d.grad = torch.zeros_like(adapter.theta_d)
            optimizer.step()
            steps.append(theta_D(adapter) - before)
        np.testing.assert_allclose(steps[1], steps[0] * 2**-0.75, rtol=1e-3, atol=1e-7)


def theta_D(adapter):
    """P θ_d in float64."""
    spec = adapter.spec
    return (adapter.theta_d.detach().numpy().astype(np.float64) * spec.scale(dtype=np.float64))[spec.groups()]


@pytest.mark.parametrize("factor", [2, 4])
def test_a_step_of_a_quadratic(factor):
    """½‖P θ_d - t‖²: the gradient is Pᵀ(P θ_d - t), and what SGD and Adam make of it after a growth is written out."""
    target = torch.randn(adapted()[1].spec.D, generator=torch.Generator().manual_seed(5))
    for adam in (False, True):
        _, adapter = adapted(start="paper")
        make = torch.optim.Adam if adam else lambda groups: torch.optim.SGD(groups, momentum=0.9)
        optimizer = make([{"params": [adapter.theta_d], "lr": 0.05}])

        def gradient(adapter=adapter):
            parts = torch.cat([part.flatten() for part in adapter().values()])
            value = 0.5 * (parts - target).square().sum()
            (grad,) = torch.autograd.grad(value, adapter.theta_d)
            return grad

        for _ in range(4):
            adapter.theta_d.grad = gradient()
            optimizer.step()
        before, kept = adapter.spec, {k: v.clone() for k, v in optimizer.state[adapter.theta_d].items() if k != "step"}
        adapter.grow(factor, optimizer)
        start, g, rate = adapter.theta_d.detach().clone(), gradient(), 0.05 * factor**-0.75
        P = torch.zeros(before.D, adapter.spec.d)
        P[torch.arange(before.D), torch.from_numpy(adapter.spec.groups()).long()] = 1
        P = P * torch.from_numpy(adapter.spec.scale())
        torch.testing.assert_close(g, P.T @ (P @ start - target))
        adapter.theta_d.grad = g.clone()
        optimizer.step()
        if adam:
            m = 0.9 * carried(before, adapter.spec, kept["exp_avg"]) + 0.1 * g
            v = 0.999 * kept["exp_avg_sq"].repeat(factor) + 0.001 * g * g
            moved_by = rate * (m / (1 - 0.9**5)) / ((v / (1 - 0.999**5)).sqrt() + 1e-8)
        else:
            moved_by = rate * (0.9 * carried(before, adapter.spec, kept["momentum_buffer"]) + g)
        torch.testing.assert_close(adapter.theta_d.detach(), start - moved_by, rtol=1e-4, atol=1e-6)


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "two lambdas": lambda o: schedules.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.8**step]),
    "steps": lambda o: schedules.StepLR(o, 2),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: schedules.OneCycleLR(o, [0.1, 0.2], total_steps=20),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=4), schedules.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "chain": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], o),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on(name):
    """Every rate to come is what it would have been, times the rule's factor, and the head's is what it would be."""
    expected, found = [], []
    for grows, rates in ((False, expected), (True, found)):
        model, adapter, optimizer, scheduler = trained(torch.optim.Adam, scheduler=SCHEDULES[name])
        if grows:
            adapter.grow(2, optimizer, scheduler)
            factors = np.array([2**-0.75, 1])
            assert scheduler.get_last_lr() == [pytest.approx(g["lr"]) for g in optimizer.param_groups]
        for _ in range(6):
            step(model, optimizer, scheduler)
            rates.append([group["lr"] for group in optimizer.param_groups])
    np.testing.assert_allclose(found, np.array(expected) * factors, rtol=1e-6)


def test_a_schedule_of_plateaus():
    model, adapter, optimizer, _ = trained(torch.optim.Adam)
    scheduler = schedules.ReduceLROnPlateau(optimizer, patience=0, min_lr=1e-3)
    before = optimizer.param_groups[0]["lr"]
    adapter.grow(2, optimizer, scheduler)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before * 2**-0.75 * 0.1)
    assert scheduler.min_lrs == [pytest.approx(1e-3 * 2**-0.75), 1e-3]


def test_a_rate_without_a_rule_stays():
    """Where ΔW itself is made, no rate grows with D/d; so a group may have others, too."""
    _, model, adapter, x = balanced("gpart")
    optimizer = torch.optim.Adam([adapter.theta_d, torch.ones(1, requires_grad=True)], lr=0.1)
    scheduler = schedules.StepLR(optimizer, 1)
    adapter.grow(2, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    loss(model(x)).backward()
    optimizer.step()
    scheduler.step()


def test_a_rate_that_is_a_tensor():
    _, adapter = adapted()
    optimizer = torch.optim.Adam([adapter.theta_d], lr=torch.tensor(0.1))
    adapter.grow(2, optimizer)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 * 2**-0.75)


# ---- refused --------------------------------------------------------------------------------------------------------


class Strange(torch.optim.Optimizer):
    """It keeps something that nobody knows."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["hessian"] = torch.ones_like(parameter)


def refused(adapter, error, text, *args):
    """Refused by name, and nothing has changed."""
    model, before, theta_d = adapter.model, adapter.spec, adapter.theta_d.detach().clone()
    wanted = model(X)
    for what in ("grow", "shrink"):
        with pytest.raises(error, match=text.replace("WHAT", what)):
            getattr(adapter, what)(2, *args)
    assert adapter.spec is before
    assert torch.equal(adapter.theta_d, theta_d)
    assert torch.equal(model(X), wanted)


def test_merged():
    _, adapter = adapted()
    adapter.merge()
    refused(adapter, TargetError, "^WHAT: the adapter is merged; unmerge it first")


@pytest.mark.parametrize("grouping", ["iid", "numpy-shuffle", "local", "fastfood"])
def test_another_grouping(grouping):
    _, adapter = adapted(grouping=grouping)
    refused(adapter, SpecError, f"^WHAT: the grouping '{grouping}' has another P for another d.*'balanced'")


def test_past_D():
    _, adapter = adapted(rank=4, d=100)
    with pytest.raises(SpecError, match=r"^grow: 9 times d = 100 would be more than min.D, 2.31. = \d+; the largest"):
        adapter.grow(9)


def test_optimisers_that_cannot_go_on():
    model, adapter = adapted()
    head = list(model.head.parameters())
    refused(adapter, ValuesError, "^WHAT: the optimiser does not have theta_d", torch.optim.Adam(head))
    strange = Strange([adapter.theta_d])
    strange.step()
    refused(adapter, ValuesError, r"^WHAT: Strange keeps 'hessian' for theta_d.*make a new one afterwards", strange)
    shared = torch.optim.Adam([adapter.theta_d, *head])
    refused(
        adapter, ValuesError, "^WHAT: theta_d is in a group of the optimiser with 2 others.*parameter_groups", shared
    )
    optimizer = torch.optim.Adam([adapter.theta_d])
    scheduler = schedules.StepLR(optimizer, 1)
    optimizer.step()
    refused(adapter, ValuesError, r"^WHAT: the optimiser has a schedule.* WHAT\(…, optimizer, scheduler\)", optimizer)
    refused(adapter, ValuesError, "^WHAT: a schedule without its optimiser", None, scheduler)
    newton = torch.optim.LBFGS([adapter.theta_d])
    newton.step(lambda: loss(model(X)).detach() if adapter.theta_d.grad is not None else backward(model))
    refused(adapter, ValuesError, "^WHAT: LBFGS keeps '", newton)


def backward(model):
    value = loss(model(X))
    value.backward()
    return value


@pytest.fixture
def processes():
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_for_several_processes(processes):
    model, adapter = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    refused(adapter, TargetError, "^WHAT: the model is wrapped in a DistributedDataParallel, which keeps the size")
    loss(wrapped(X)).backward()
    del wrapped
    adapter.grow(2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss(wrapped(X)).backward()
    assert len(adapter.theta_d.grad) == 80


@pytest.mark.filterwarnings("ignore:.*NO_SHARD")  # what one process can do
def test_wrapped_by_fsdp_1(processes):
    model, adapter = adapted()
    fsdp, strategy = torch.distributed.fsdp.FullyShardedDataParallel, torch.distributed.fsdp.ShardingStrategy.NO_SHARD
    wrapped = fsdp(model, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=strategy)
    refused(adapter, TargetError, "^WHAT: the model is wrapped in a FullyShardedDataParallel, which keeps the size")
    loss(wrapped(X)).backward()
    assert adapter.theta_d.grad.abs().max() > 0


def test_sharded_over_processes(processes):
    model, adapter = adapted()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(model.unilora, mesh=mesh)
    for change in (adapter.grow, adapter.shrink):
        with pytest.raises(
            TargetError, match=r"theta_d is spread over processes, in parts that fit its d; .*before the"
        ):
            change(2)


def test_an_interrupt_in_between_brings_it_to_its_end(monkeypatch):
    model, adapter, optimizer, _ = trained(torch.optim.Adam)
    before, failures, put = model(X), iter([KeyboardInterrupt()]), growing._replace

    def replace(*args):
        put(*args)
        for failure in failures:
            raise failure

    monkeypatch.setattr(growing, "_replace", replace)
    with pytest.raises(KeyboardInterrupt):
        adapter.grow(2, optimizer)
    assert adapter.spec.d == len(adapter.theta_d) == 80
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-6)
    step(model, optimizer)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uni-lora", "gpart", "lora-xs"])
def test_a_file_of_it(tmp_path, method):
    base, model, adapter, x = balanced(method, d=6)
    adapter.grow(4 if method == "uni-lora" else 2)
    adapter.save(tmp_path / "a")
    again = copy.deepcopy(base)
    loaded = unilora_torch.load(again, tmp_path / "a")
    assert (loaded.spec, loaded.spec.first.d) == (adapter.spec, 6)
    assert torch.equal(again(x), model(x))
    loaded.shrink(2)
    loaded.grow(2)


def test_a_plain_lora_of_it(tmp_path):
    model, adapter = adapted()
    adapter.grow(2)
    adapter.export_lora(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size > 4 * adapter.spec.D


def test_files_in_the_place_of_it(tmp_path):
    """Of its d, wherever that began; of another d the adapter has to get it first."""
    model, adapter = adapted(model=mlp(), d=20)
    adapter.grow(2)
    adapter.save(tmp_path / "grown")
    other, theirs = adapted(model=mlp(), d=40)
    wanted, here = model(X), other(X)
    theirs.save(tmp_path / "plain")
    theirs.swap(tmp_path / "grown")
    assert torch.equal(other(X), wanted)
    assert theirs.spec == adapter.spec
    theirs.swap(tmp_path / "plain")
    assert torch.equal(other(X), here)
    adapter.grow(2)
    with pytest.raises(MismatchError, match=r"same d as the attached adapter's .80., the file has 40"):
        adapter.swap(tmp_path / "grown")
    growing.resize(adapter, read_adapter(tmp_path / "grown").spec.d)
    adapter.swap(tmp_path / "grown")
    assert torch.equal(model(X), wanted)


def test_a_bank_of_it(tmp_path):
    model, adapter = adapted(model=mlp(), d=20)
    adapter.grow(2)
    adapter.save(tmp_path / "grown")
    wanted = model(X).detach()
    adapter.detach()
    bank = unilora_torch.Bank(model)
    bank.add("grown", tmp_path / "grown")
    with bank.rows(["grown"] * len(X)):
        torch.testing.assert_close(model(X), wanted)


# ---- when to grow ---------------------------------------------------------------------------------------------------


def steps(growth, losses):
    found = []
    for value in losses:
        growth.step(value)
        found.append(growth.adapter.spec.d)
    return found


def test_it_doubles_where_the_loss_rests_while_that_pays():
    model, adapter = adapted(d=10)
    before = model(X)
    growth = unilora_torch.Growth(adapter, until=100, gain=0.1)
    assert steps(growth, [5.0, 4.0, 3.0, 2.9]) == [10, 10, 10, 20]
    assert steps(growth, [2.6, 2.5, 2.0, 1.9, 1.8]) == [20, 40, 40, 80, 80]
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-6)


def test_it_ends_where_a_doubling_did_not_pay():
    _, adapter = adapted(d=10)
    growth = unilora_torch.Growth(adapter, until=100)
    assert [growth.step(value) for value in (2.0, 1.999, 1.995, 1.0, 1.0)] == [False, True, False, False, False]
    assert (adapter.spec.d, growth.over) == (20, True)


def test_it_ends_at_its_bound():
    _, adapter = adapted(d=10)
    growth = unilora_torch.Growth(adapter, until=39)
    assert [growth.step(value) for value in (2.0, 2.0, 1.0, 1.0)] == [False, True, False, False]
    assert (adapter.spec.d, growth.over) == (20, True)


def test_negative_losses_rest_too():
    _, adapter = adapted(d=10)
    growth = unilora_torch.Growth(adapter, until=39)
    assert [growth.step(value) for value in (-1.0, -2.0, -2.001)] == [False, False, True]


def test_it_takes_the_optimiser_along():
    model, adapter, optimizer, scheduler = trained(torch.optim.Adam, scheduler=SCHEDULES["lambda"], d=20)
    growth = unilora_torch.Growth(adapter, 40, optimizer=optimizer, scheduler=scheduler)
    assert [growth.step(1.0), growth.step(1.0)] == [False, True]
    step(model, optimizer, scheduler)


def test_it_goes_on_from_its_state():
    _, adapter = adapted(d=10)
    growth = unilora_torch.Growth(adapter, until=100)
    for value in (2.0, 2.0):
        growth.step(value)
    _, twin = adapted(d=10)
    again = unilora_torch.Growth(twin, until=100)
    again.load_state_dict(growth.state_dict())
    assert twin.spec == adapter.spec
    assert [growth.step(1.99), growth.over] == [again.step(1.99), again.over] == [False, True]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"until": 19}, SpecError, r"Growth: expected 2·d = 20 ≤ until ≤ D = \d+, got until = 19"),
        ({"until": 10**6}, SpecError, "got until = 1000000"),
        ({"until": 40, "gain": 1.0}, SpecError, "expected 0 < gain < 1, a part of the loss, got 1.0"),
        ({"until": 40, "gain": 0}, SpecError, "expected 0 < gain < 1"),
    ],
)
def test_a_growth_that_cannot_be(options, error, text):
    _, adapter = adapted(d=10)
    with pytest.raises(error, match=text):
        unilora_torch.Growth(adapter, **options)
    with pytest.raises(SpecError, match="grow: the grouping 'iid' has another P"):
        unilora_torch.Growth(adapted(d=10, grouping="iid")[1], 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_none(value):
    _, adapter = adapted(d=10)
    growth = unilora_torch.Growth(adapter, 40)
    with pytest.raises(ValuesError, match=f"Growth.step: expected a finite loss, got {value}; training diverged"):
        growth.step(value)
    assert grown(adapter.spec).d == 20
