"""Whatever ends a pass, a merge or a detach in its midst: what comes next begins from the truth, bit for bit."""

import contextlib
import gc
import os
import random
import sys

import pytest
import torch
from kinds import KINDS
from small_models import adapted, assert_unchanged, hooks, mlp, move, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import unilora_torch
from unilora_torch import Bank

ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError)
PLACES = 50 if os.environ.get("UNILORA_SLOW") else 8
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def what_python_itself_leaves():
    """An exception on the very line that leaves a ``with`` keeps it from ending: torch.no_grad(), an open file."""
    yield
    torch.set_grad_enabled(True)
    gc.collect()


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


class Interrupted(TorchDispatchMode):
    """Raises instead of the n-th operation; with n = 0 it counts them."""

    def __init__(self, n=0, end=KeyboardInterrupt):
        super().__init__()
        self.n, self.end, self.count = n, end, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            raise self.end
        return func(*args, **(kwargs or {}))


class Stopped:
    """Raises at the n-th line of our own code."""

    def __init__(self, n=0, end=KeyboardInterrupt):
        self.n, self.end, self.count = n, end, 0

    def trace(self, frame, event, _):
        if "unilora_" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise self.end
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def places(run, how, count=PLACES, seed=0):
    """Run it again and again, each time ended at another place."""
    with how() as whole:
        run()
    assert whole.count  # else there is no place, and nothing is tried
    rng = random.Random(seed)
    chosen = range(1, whole.count + 1) if whole.count <= count else sorted(rng.sample(range(1, whole.count + 1), count))
    for n in chosen:
        end = rng.choice(ENDS)
        grad = torch.is_grad_enabled()
        with contextlib.suppress(*ENDS), how(n, end):
            run()
        torch.set_grad_enabled(grad)
        yield f"{end.__name__} at {n} of {whole.count}"


def spread(whole):
    """Some of the places of a run, from its first on."""
    assert whole.count
    return range(1, whole.count + 1, max(1, whole.count // PLACES))


WAYS = pytest.mark.parametrize("how", [Interrupted, Stopped])


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


# ---- passes ---------------------------------------------------------------------------------------------------------


def truth(model, adapter, x):
    """Everything that must be as before: outputs, the base's, a gradient, attributes, tensors, hooks."""
    adapter.theta_d.grad = None
    output = model(x)
    output.square().sum().backward()
    gradient, adapter.theta_d.grad = adapter.theta_d.grad, None
    with torch.no_grad(), adapter.disabled():
        base = model(x)
    tensors = list(model.state_dict().values())
    attributes = [sorted(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return [output.detach().clone(), base, gradient, *(tensor.clone() for tensor in tensors)], (
        attributes,
        modes,
        hooks(model),
        list(model.state_dict()),
        adapter.enabled,
        adapter.merged,
    )


def assert_true(model, adapter, x, wanted, where):
    tensors, rest = truth(model, adapter, x)
    assert rest == wanted[1], where
    assert len(tensors) == len(wanted[0]), where
    for found, expected in zip(tensors, wanted[0], strict=True):
        assert torch.equal(found, expected), where
    assert adapter.live.here.factors is None
    assert not adapter.live.off.open


@WAYS
def test_a_pass(kind, how):
    model, adapter, x = kind.made()
    wanted = truth(model, adapter, x)

    def forward():
        model(x)

    def step():
        model(x).square().sum().backward()

    def off():
        with torch.no_grad(), adapter.disabled():
            model(x)

    for run in (forward, step, off):
        for where in places(run, how):
            assert "in_proj_weight" not in vars(getattr(model, "at", model))
            assert_true(model, adapter, x, wanted, f"{run.__name__}: {where}")


def test_a_submodule_alone_after_a_pass_that_was_interrupted(start):
    """θ_D of a pass that did not end is used by nobody, however θ_d was changed since."""
    model, adapter = adapted(start)
    handle = model.head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(X)
    handle.remove()
    adapter.theta_d.data.add_(0.1)
    other, fresh = adapted(start)
    fresh.theta_d.data.add_(0.1)
    assert torch.equal(model.blocks[0](X), other.blocks[0](X))
    model.blocks[0](X).sum().backward()
    assert adapter.theta_d.grad.any()


def test_an_error_in_the_hook_of_somebody_else(kind):
    model, adapter, x = kind.made()
    wanted = truth(model, adapter, x)

    def ends(*_):
        raise KeyboardInterrupt

    for module in [module for module in model.modules() if not isinstance(module, unilora_torch.Adapter)]:
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            for prepend in (False, True):
                handle = register(ends, prepend=prepend)
                with contextlib.suppress(KeyboardInterrupt):
                    model(x)
                handle.remove()
                assert_true(model, adapter, x, wanted, type(module).__name__)


# ---- what changes a model -------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("name", ["linear", "attention", "experts", "convolution"])
def test_merge_and_unmerge(name, how):
    model, adapter, x = KINDS[name].made()
    wanted = truth(model, adapter, x)
    adapter.merge()
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    adapter.unmerge()

    def run():
        adapter.merge()
        adapter.unmerge()

    for where in places(run, how):
        for key, value in model.state_dict().items():
            assert torch.equal(value, merged[key] if adapter.merged else wanted[0][3 + list(merged).index(key)]), where
        adapter.unmerge()
        assert_true(model, adapter, x, wanted, where)


@WAYS
def test_disabled_of_a_merged_adapter(how):
    model, adapter, x = KINDS["attention"].made()
    adapter.merge()
    with torch.no_grad():
        wanted = model(x)

        def run():
            with adapter.disabled():
                model(x)

        for where in places(run, how):
            assert adapter.merged, where
            assert torch.equal(model(x), wanted), where
            assert adapter.live.change is None, where


@pytest.mark.parametrize(("merge", "how"), [(False, Stopped), (True, Interrupted), (True, Stopped)])
@pytest.mark.parametrize("name", ["linear", "attention"])
def test_detach(name, merge, how):
    base = KINDS[name].model()
    model, adapter, x = KINDS[name].made()
    with how() as whole:
        adapter.detach(merge=merge)
    detached, gone = {key: value.clone() for key, value in model.state_dict().items()}, hooks(model)
    assert gone == hooks(base)
    for n in spread(whole):
        model, adapter, x = KINDS[name].made()
        wanted = truth(model, adapter, x)
        with contextlib.suppress(KeyboardInterrupt), how(n):
            adapter.detach(merge=merge)
        if unilora_torch.adapters(model):  # not begun
            adapter.unmerge()
            assert_true(model, adapter, x, wanted, n)
            adapter.detach(merge=merge)
        assert all(torch.equal(value, detached[key]) for key, value in model.state_dict().items()), n
        assert hooks(model) == gone
        assert [parameter.requires_grad for parameter in model.parameters()] == [True] * len(list(base.parameters()))
        assert "_call_impl" not in vars(model)


@WAYS
def test_verify(how):
    model, adapter, x = KINDS["attention"].made()
    model.at.eval()
    wanted = truth(model, adapter, x)
    for where in places(lambda: adapter.verify(x), how):
        assert_true(model, adapter, x, wanted, where)
        assert adapter.live.here.watched is None


@WAYS
def test_switch(how):
    model = mlp()
    for name, seed in (("one", 0), ("two", 1)):
        unilora_torch.switch(model, ())
        move(unilora_torch.attach(model, name=name, d=20, seed=seed, modules_to_save=["head"]), seed)
        with torch.no_grad():
            model.head.weight.add_(seed + 1)
    wanted = {}
    for name in ("one", "two"):
        unilora_torch.switch(model, name)
        wanted[name] = model(X).detach()

    def run():
        unilora_torch.switch(model, "one")
        unilora_torch.switch(model, "two")

    for where in places(run, how):
        (acts,) = [name for name, adapter in unilora_torch.adapters(model).items() if adapter.enabled]
        assert torch.equal(model(X), wanted[acts]), where
        for name in ("one", "two"):
            unilora_torch.switch(model, name)
            assert torch.equal(model(X), wanted[name]), where


@WAYS
def test_swap(how, tmp_path):
    paths, wanted = {}, []
    for seed in (0, 1):
        model, adapter = adapted(model=mlp(), seed=seed, modules_to_save=["head"])
        with torch.no_grad():
            model.head.bias.add_(seed)
        paths[seed] = tmp_path / f"{seed}.safetensors"
        adapter.save(paths[seed])
        wanted.append(model(X).detach())

    def run():
        adapter.swap(paths[0])
        adapter.swap(paths[1])

    for where in places(run, how):
        assert torch.equal(model(X), wanted[adapter.spec.seed]), where


@WAYS
def test_grow(how):
    """θ_d, P and the optimiser are of one d, whichever it is."""
    model, adapter = adapted(model=mlp())
    optimizer = torch.optim.Adam(adapter.parameter_groups(1e-3))
    model(X).sum().backward()
    optimizer.step()
    wanted = model(X).detach()

    def run():
        if adapter.spec.d == 40:
            adapter.grow(2, optimizer)
        adapter.shrink(2, optimizer)

    for where in places(run, how):
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5, msg=str(where))
        sizes = {len(adapter.theta_d), adapter.spec.d, len(optimizer.state[adapter.theta_d]["exp_avg"])}
        assert len(sizes) == 1, where


@WAYS
def test_attach(how):
    base = mlp()
    before = snapshot(base)
    with how() as whole:
        unilora_torch.attach(mlp(), d=20)
    undone = 0
    for n in spread(whole):
        model = mlp()
        with contextlib.suppress(KeyboardInterrupt), how(n):
            unilora_torch.attach(model, d=20)
        if not unilora_torch.adapters(model):
            undone += 1
            assert_unchanged(model, before)
            assert "_call_impl" not in vars(model), n
    assert undone


@WAYS
def test_load(how, tmp_path):
    adapted(modules_to_save=["head"])[1].save(tmp_path / "a")
    base = mlp()
    before = snapshot(base)
    with how() as whole:
        unilora_torch.load(mlp(), tmp_path / "a", check_base=False)
    undone = 0
    for n in spread(whole):
        model = mlp()
        with contextlib.suppress(KeyboardInterrupt), how(n):
            unilora_torch.load(model, tmp_path / "a", check_base=False)
        if not unilora_torch.adapters(model):
            undone += 1
            assert_unchanged(model, before)
    assert undone


# ---- banks ----------------------------------------------------------------------------------------------------------


@WAYS
def test_rows(how, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    bank = Bank(base)
    for name, heads in {"a": (), "h": ("2",)}.items():
        adapter = unilora_torch.attach(base, ["0"], d=10, modules_to_save=heads)
        move(adapter)
        adapter.save(tmp_path / name)
        adapter.detach()
        bank_file = tmp_path / name
        bank.add(name, bank_file, check_base=False)
    with torch.no_grad():
        plain = base(X)

        def run():
            with bank.rows(["a", "h", None, "h"]):
                return base(X)

        wanted = run()
        for where in places(run, how):
            assert torch.equal(base(X), plain), where
            assert torch.equal(run(), wanted), where
            assert bank.live.batch is None
            assert not bank.live.scope.open
