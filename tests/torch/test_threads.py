"""One adapted model, or one bank, in many threads and asyncio tasks: every output is that of one thread alone."""

import asyncio
import contextlib
import copy
import os
import pickle
import sys
import threading

import pytest
import torch
from kinds import KINDS, Attention
from small_models import adapted, mlp, move
from torch import nn
from torch.utils.checkpoint import checkpoint
from versions import TRACES_CONTEXTS

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Bank

THREADS, PASSES = 4, 600 if os.environ.get("UNILORA_SLOW") else 20
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _hasty():
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def same(found, wanted):
    """A thread's first product may be rounded in another order; what is wrong here is so by far more."""
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def in_threads(run, count=THREADS):
    """run(number) in each thread; the errors of all."""
    errors, start = [], threading.Barrier(count)

    def safely(number):
        start.wait()
        try:
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=safely, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def alone(run):
    """What another thread's call gives: its result or its error."""
    found = []

    def safely():
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=safely)
    thread.start()
    thread.join()
    return found[0]


# ---- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_threads_that_mix_adapted_and_base(kind, training, mode):
    model, adapter, x = KINDS[kind].made()
    model.train(training)
    with mode():
        adapted_output = model(x)
        with adapter.disabled():
            base_output = model(x)
    assert not torch.allclose(adapted_output, base_output, atol=1e-3)
    wrong = []

    def run(number):
        with mode():
            for i in range(PASSES):
                off = (number + i) % 3 == 0
                with adapter.disabled() if off else contextlib.nullcontext():
                    output = model(x)
                if not same(output, base_output if off else adapted_output):
                    wrong.append(i)

    in_threads(run)
    assert (len(wrong), adapter.enabled) == (0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_threads_add_up(kind):
    model, adapter, x = KINDS[kind].made()
    weights = torch.randn(model(x).shape)
    (model(x) * weights).sum().backward()
    one, adapter.theta_d.grad = adapter.theta_d.grad, None

    def run(_):
        for _ in range(5):
            (model(x) * weights).sum().backward()

    in_threads(run)
    torch.testing.assert_close(adapter.theta_d.grad / (5 * THREADS), one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_two_adapters_in_one_weight():
    torch.manual_seed(0)
    model = Attention()
    for name in ("one", "two"):
        move(unilora_torch.attach(model, ["at.in_proj_weight"], name=name, d=20, seed=len(name)))
    x = KINDS["attention"].input()
    with torch.no_grad():
        both = model(x)
        with model.one.disabled():
            second = model(x)

        def run(number):
            with torch.no_grad():
                for _ in range(PASSES):
                    with model.one.disabled() if number % 2 else contextlib.nullcontext():
                        assert same(model(x), second if number % 2 else both)

        in_threads(run)
        model.one.detach()
        assert same(model(x), second)
        model.two.detach()
    assert "_call_impl" not in vars(model) | vars(model.at)


def test_a_forward_that_somebody_set_on_the_module_is_kept_and_right():
    """As Liger does: it is bound to the module itself, so threads wait for each other."""
    model, adapter, x = KINDS["attention"].made()
    model.at.forward = type(model.at).forward.__get__(model.at)
    fresh, _, _ = KINDS["attention"].made()
    with torch.no_grad():
        wanted = fresh(x)
        with adapter.disabled():
            base = model(x)

    def run(number):
        with torch.no_grad():
            for _ in range(PASSES):
                with adapter.disabled() if number % 2 else contextlib.nullcontext():
                    assert same(model(x), base if number % 2 else wanted)

    in_threads(run)
    assert "in_proj_weight" not in vars(model.at)


def test_what_a_forward_pass_writes_on_its_module_stays():
    model, adapter, x = KINDS["a weight that is read"].made()
    model(x)
    model(x)
    with adapter.disabled():
        model(x)
    assert (model[0].calls, model[0].last) == (3, x.shape)
    assert "weight" not in vars(model[0].qkv)


@pytest.mark.parametrize("kind", ["linear", "attention", "a weight that is read"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stands_on_its_own(kind, copied):
    model, adapter, x = KINDS[kind].made()
    with torch.no_grad():
        wanted = model(x)
        with adapter.disabled():
            other = copied(model)
        assert same(other(x), wanted)
        other.unilora.theta_d.add_(1)
        assert not torch.allclose(other(x), wanted)
        assert same(model(x), wanted)
        other.unilora.detach()
        assert same(model(x), wanted)


# ---- disabled -------------------------------------------------------------------------------------------------------


def test_disabled_that_overlap():
    model, adapter = adapted()
    base, wanted = mlp()(X), model(X)
    first, second = adapter.disabled(), adapter.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert same(model(X), base)
    assert not adapter.enabled
    second.__exit__(None, None, None)
    assert same(model(X), wanted)
    assert adapter.enabled


def test_disabled_in_one_thread_and_entered_in_another():
    model, adapter = adapted()
    wanted, block = model(X), adapter.disabled()
    with adapter.disabled():
        assert same(alone(lambda: model(X)), wanted)
    alone(block.__enter__)
    assert same(model(X), wanted)
    block.__exit__(None, None, None)
    assert not adapter.live.off.open


def test_disabled_in_tasks():
    model, adapter = adapted()
    wanted, base = model(X), mlp()(X)

    async def one(off):
        for _ in range(10):
            with adapter.disabled() if off else contextlib.nullcontext():
                await asyncio.sleep(0)
                assert same(model(X), base if off else wanted)
                if off:
                    assert same(await asyncio.to_thread(model, X), base)

    async def several():
        await asyncio.gather(*(one(number % 2) for number in range(4)))

    asyncio.run(several())
    assert same(model(X), wanted)


def test_a_merged_adapter_is_disabled_for_all():
    model, adapter = adapted()
    adapter.merge()
    merged, base = model(X), mlp()(X)
    with adapter.disabled():
        assert same(model(X), base)
        with adapter.disabled():
            assert same(model(X), base)
        refused = alone(lambda: model(X))
        assert isinstance(refused, TargetError)
        assert "the model was called while another thread is in the midst of disabled() of a merged" in str(refused)
        assert isinstance(alone(lambda: adapter.disabled().__enter__()), TargetError)
        assert same(model(X), base)
    assert same(model(X), merged)
    assert same(alone(lambda: model(X)), merged)
    first, second = adapter.disabled(), adapter.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert same(model(X), base)
    second.__exit__(None, None, None)
    assert adapter.merged
    assert same(model(X), merged)


def test_disabled_promises_the_base_whoever_merges():
    model, adapter = adapted()
    with adapter.disabled():
        refused = alone(adapter.merge)
        assert isinstance(refused, TargetError)
        assert "merge: the adapter is disabled inside a `with`" in str(refused)
        assert same(model(X), mlp()(X))


def test_a_layer_that_autograd_computes_again_in_a_thread_of_its_own():
    """CUDA's backward passes run in such threads; on the CPU those do of which too many are nested."""
    model, adapter = adapted(model=nn.Sequential(nn.Linear(6, 6)), d=9)

    def nested(x, depth):
        return checkpoint(nested, x, depth - 1, use_reentrant=True) if depth else model(x)

    with adapter.disabled():
        x = X.clone().requires_grad_()
        output = nested(x, 70)
        with pytest.raises(TargetError, match="computes a layer again, and the layer cannot know whether disabled"):
            output.sum().backward()
    nested(x, 70).square().sum().backward()
    found, adapter.theta_d.grad = adapter.theta_d.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(found, adapter.theta_d.grad)


# ---- what changes the weights or the hooks for all ------------------------------------------------------------------


CHANGES = {
    "merge": lambda adapter, _: adapter.merge(),
    "swap": lambda adapter, path: adapter.swap(path),
    "grow": lambda adapter, _: adapter.grow(2),
    "shrink": lambda adapter, _: adapter.shrink(2),
    "detach": lambda adapter, _: adapter.detach(),
    "switch": lambda adapter, _: unilora_torch.switch(adapter.model, ()),
    "verify": lambda adapter, _: adapter.verify(X),
}


@pytest.mark.parametrize("alone_in", ["", "blocks.0", "blocks.1.up"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_another_thread_is_in_a_pass(change, alone_in, tmp_path):
    model, adapter = adapted()
    adapter.save(tmp_path / "a.safetensors")
    module = model.get_submodule(alone_in)
    before, x = {name: value.clone() for name, value in model.state_dict().items()}, X
    wanted, entered, ready = module(x), threading.Event(), threading.Event()
    found = []

    def wait(*_):
        if threading.current_thread() is waiting:
            entered.set()
            ready.wait()

    handle = (module.up if alone_in == "blocks.0" else model.blocks[1].up).register_forward_hook(wait, prepend=True)
    waiting = threading.Thread(target=lambda: found.append(module(x)))
    waiting.start()
    entered.wait()
    try:
        with pytest.raises(TargetError, match=f"{change}: another thread is calling the model"):
            CHANGES[change](adapter, tmp_path / "a.safetensors")
    finally:
        ready.set()
        waiting.join()
        handle.remove()
    assert same(found[0], wanted)
    assert all(same(value, before[name]) for name, value in model.state_dict().items())
    assert same(module(x), wanted)
    CHANGES[change](adapter, tmp_path / "a.safetensors")


def test_a_pass_while_another_thread_changes_the_weights():
    model, adapter = adapted()
    wanted, refused = model(X), []
    original = adapter.delta_weight

    def slowly(target):
        refused.append(alone(lambda: model(X)))
        refused.append(alone(adapter.merge))
        return original(target)

    adapter.delta_weight = slowly
    adapter.merge()
    assert len(refused) == 2 * len(adapter.targets)
    assert all("in the midst of merge" in str(error) for error in refused)
    torch.testing.assert_close(alone(lambda: model(X)), wanted)


@TRACES_CONTEXTS
def test_a_compiled_model_in_threads():
    torch.compiler.reset()
    model, adapter = adapted()
    base, wanted = mlp()(X), model(X)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def check(off):
        with adapter.disabled() if off else contextlib.nullcontext():
            torch.testing.assert_close(compiled(X), base if off else wanted)

    with torch.no_grad():
        for off in (True, False, True, False):
            check(off)

    def run(number):
        with torch.no_grad():
            for i in range(PASSES):
                check((number + i) % 2)

    with torch._dynamo.config.patch(error_on_recompile=True):
        in_threads(run)
    torch.compiler.reset()


# ---- banks ----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.classifier(torch.tanh(self.body(x)))


@pytest.fixture
def stored(tmp_path):
    """A bank of three adapters, one of them with a head, and the files."""

    def base():
        torch.manual_seed(0)
        return Classifier()

    paths = {}
    for seed, (name, heads) in enumerate({"a": (), "b": (), "h": ("classifier",)}.items()):
        model = base()
        targets = ["body"] if heads else "all-linear"
        adapter = unilora_torch.attach(model, targets, rank=2, d=20, seed=seed % 2, modules_to_save=heads)
        move(adapter, seed + 1)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.add_(0.1 * seed if heads else 0)
        paths[name] = tmp_path / f"{name}.safetensors"
        adapter.save(paths[name])
    bank = Bank(base())
    for name, path in paths.items():
        bank.add(name, path)
    return bank, paths


ROWS = [["a", "b", None, "a"], ["h", "a", "h", "b"], [None, None, "b", {"a": 0.5, "b": 2}], ["h"] * 4]


def outputs(bank):
    found = []
    with torch.no_grad():
        for names in ROWS:
            with bank.rows(names):
                found.append(bank.model(X))
    return found


def test_rows_of_threads(stored):
    bank, _ = stored
    wanted = outputs(bank)
    assert len({tensor.sum().item() for tensor in wanted}) == len(ROWS)
    with torch.no_grad():
        base = bank.model(X)

    def run(number):
        with torch.no_grad():
            for i in range(3 * PASSES):
                k = (number + i) % (len(ROWS) + 1)
                with bank.rows(ROWS[k]) if k < len(ROWS) else contextlib.nullcontext():
                    assert same(bank.model(X), wanted[k] if k < len(ROWS) else base)

    in_threads(run)
    assert bank.live.batch is None


def test_adapters_come_and_go_while_others_run(stored):
    bank, paths = stored
    wanted = outputs(bank)

    def run(number):
        for i in range(15):
            if number < 2:
                bank.add(f"{number}", paths["ah"[number]])
                with torch.no_grad(), bank.rows([f"{number}", "a", "h", "b"]):
                    output = bank.model(X)
                with torch.no_grad(), bank.rows(["ah"[number], "a", "h", "b"]):
                    assert same(bank.model(X), output), i
                bank.remove(f"{number}")
            else:
                assert all(map(same, outputs(bank), wanted)), i

    in_threads(run)
    assert all(map(same, outputs(bank), wanted))
    for name in bank.names:
        bank.remove(name)
    assert bank.handles == []


def test_an_adapter_is_removed_while_rows_name_it(stored):
    bank, _ = stored
    wanted = outputs(bank)
    with torch.no_grad(), bank.rows(ROWS[1]):
        alone(bank.close)
        assert bank.names == ()
        assert same(bank.model(X), wanted[1])
    bank.close()
    assert bank.handles == []


def test_rows_that_overlap(stored):
    bank, _ = stored
    wanted = outputs(bank)
    first, second = bank.rows(ROWS[0]), bank.rows(ROWS[1])
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert same(bank.model(X), wanted[1])
        assert not same(alone(lambda: bank.model(X)), wanted[1])
        second.__exit__(None, None, None)
    assert bank.live.batch is None
