"""Tenants train together as they train alone; nobody's row moves another."""

import copy
import pickle

import pytest
import torch
from small_models import Block, adapted, mlp
from torch import nn

import unilora_torch
from unilora_core import TargetError, ValuesError, read_adapter
from unilora_torch import Bank

NAMES = ["a", "b", "c"]
RATES = {"a": 3e-3, "b": 1e-3, "c": 1e-2}
BATCHES = [list("abcabc"), list("aabbcc"), list("abbbcc"), list("cca"), list("bb"), list("cab")]
"""Even and uneven shares, in any order; not every tenant is in every batch."""


class Classifier(nn.Module):
    """A body, a norm with buffers, and a head of two layers."""

    def __init__(self):
        super().__init__()
        self.body = Block(6)
        self.classifier = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.classifier(self.body(x))


def start_of(path, base, number, **options):
    _, adapter = adapted(model=copy.deepcopy(base), **{"start": "identity", "seed": 0} | options)
    with torch.no_grad():
        adapter.theta_d.add_(0.05 * torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(number)))
    adapter.save(path)


def data(names, step):
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(len(names), 6, generator=noise)
    return x, torch.randint(0, 3, (len(names),), generator=noise)


@pytest.fixture
def trained(tmp_path):
    """trained(base, options of each, optimizer): losses and files of tenants together, and of each alone."""

    def train(base, kinds, optimizer, stop=None):
        paths = {name: tmp_path / f"{name}.safetensors" for name in kinds}
        for i, (name, options) in enumerate(kinds.items()):
            start_of(paths[name], base, i, **options)
        found = together(copy.deepcopy(base), paths, optimizer, stop)
        wanted = {name: alone(copy.deepcopy(base), paths[name], name, optimizer, stop) for name in kinds}
        return found, wanted

    def together(model, paths, optimizer, stop):
        bank = Bank(model)
        for name, path in paths.items():
            bank.add(name, path)
        tenants = bank.trainable(paths)
        made = optimizer(tenants.parameter_groups(RATES))
        losses = {name: [] for name in paths}
        for step, names in enumerate(BATCHES):
            if step == stop:
                tenants.stop("c")
            x, y = data(names, step)
            with tenants.rows(names):
                output = model(x)
            each = tenants.losses(names, nn.functional.cross_entropy(output, y, reduction="none"))
            made.zero_grad()
            sum(each.values()).backward()
            made.step()
            for name, loss in each.items():
                losses[name].append(loss.item())
        files = {}
        for name in paths:
            tenants.save(name, tmp_path / f"{name}-together.safetensors")
            files[name] = read_adapter(tmp_path / f"{name}-together.safetensors")
        assert all(parameter.grad is None for parameter in model.parameters())
        return losses, files

    def alone(model, path, name, optimizer, stop):
        adapter = unilora_torch.load(model, path)
        made, losses = optimizer(adapter.parameter_groups(RATES[name])), []
        for step, names in enumerate(BATCHES):
            x, y = data(names, step)
            mine = [i for i, each in enumerate(names) if each == name]
            if not mine:
                continue
            loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
            losses.append(loss.item())
            if stop is None or step < stop or name != "c":
                made.zero_grad()
                loss.backward()
                made.step()
        adapter.save(path.with_name(f"{name}-alone.safetensors"))
        return losses, read_adapter(path.with_name(f"{name}-alone.safetensors"))

    return train


def assert_equal_runs(found, wanted):
    losses, files = found
    for name, (theirs, file) in wanted.items():
        assert losses[name] == pytest.approx(theirs, abs=1e-5)
        assert files[name].spec == file.spec
        assert dict(files[name].metadata.items()) == dict(file.metadata.items())
        assert files[name].theta_d == pytest.approx(file.theta_d, abs=1e-5)
        assert files[name].tensors.keys() == file.tensors.keys()
        for key, tensor in file.tensors.items():
            assert files[name].tensors[key] == pytest.approx(tensor, abs=1e-5), key


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("start", ["paper", "identity"])
def test_together_as_alone(trained, optimizer, start):
    found, wanted = trained(mlp(), {name: {"start": start} for name in NAMES}, optimizer)
    assert_equal_runs(found, wanted)


def test_other_specs_together(trained):
    """Each of another rank, d, seed, grouping or target: one pass serves them all."""
    kinds = {
        "a": {"rank": 2, "d": 30},
        "b": {"seed": 5, "grouping": "iid"},
        "c": {"targets": ["down", "head"], "d": 20},
    }
    assert_equal_runs(*trained(mlp(), kinds, torch.optim.AdamW))


def test_other_methods_together(trained):
    """Maps that are no gather, and chains with frozen factors."""
    usual = {"start": None, "bound": None, "d": "auto"}
    kinds = {
        "a": usual | {"method": "vera", "rank": 4, "start": "zero"},
        "b": usual | {"method": "fastfood", "start": "identity", "d": 30},
        "c": usual | {"method": "lora-xs", "rank": 2, "start": "zero"},
    }
    assert_equal_runs(*trained(mlp(), kinds, torch.optim.AdamW))


def test_each_trains_its_own_head(trained):
    torch.manual_seed(0)
    base = Classifier().eval()
    kind = {"targets": ["up", "down"], "modules_to_save": ["classifier"]}
    assert_equal_runs(*trained(base, dict.fromkeys(NAMES, kind), torch.optim.AdamW))


def test_one_stops_and_the_others_go_on(trained):
    found, wanted = trained(mlp(), {name: {} for name in NAMES}, torch.optim.AdamW, stop=3)
    assert_equal_runs(found, wanted)


@pytest.fixture
def tenants(tmp_path):
    base = mlp()
    bank = Bank(copy.deepcopy(base))
    for i, name in enumerate([*NAMES, "served"]):
        start_of(tmp_path / name, base, i)
        bank.add(name, tmp_path / name)
    made = bank.trainable(NAMES)
    made.bank = bank
    return made


def test_the_bank_serves_what_is_trained_so_far(tenants):
    bank, x = tenants.bank, torch.randn(2, 6)
    with torch.no_grad(), bank.rows(["a", "served"]):
        before = bank.model(x)
    optimizer = torch.optim.SGD(tenants.parameter_groups(0.5))
    with tenants.rows(["a", "b"]):
        tenants.model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad(), bank.rows(["a", "served"]):
        after = bank.model(x)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    with torch.no_grad(), tenants.rows(["a", "b"]):
        assert torch.allclose(tenants.model(x)[0], after[0], atol=1e-6)


def test_a_checkpoint_has_the_tenants_alone(tenants):
    state = {name: value.clone() for name, value in tenants.state_dict().items()}
    assert list(state) == ["theta.0", "theta.1", "theta.2"]
    optimizer = torch.optim.AdamW(tenants.parameter_groups(1e-2))
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(3, 0.0)]
    with tenants.rows(NAMES):
        tenants.model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(tenants.theta[1], state["theta.1"])
    tenants.load_state_dict(state)
    assert torch.equal(tenants.bank.entries["b"].values.theta_d, state["theta.1"])


def test_the_base_is_frozen_until_close(tenants):
    assert not any(parameter.requires_grad for parameter in tenants.model.parameters())
    tenants.close()
    assert all(parameter.requires_grad for parameter in tenants.model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_no_copy_is_made(tenants, copied):
    for each in (tenants, tenants.bank):
        with pytest.raises(TypeError, match="a bank, and what trains in it, is neither copied nor pickled"):
            copied(each)


def test_numbers_stand_for_names(tenants):
    x = torch.randn(3, 6)
    with torch.no_grad(), tenants.rows(["c", "a", "a"]):
        wanted = tenants.model(x)
    assert torch.equal(tenants(torch.tensor([2, 0, 0]), x), wanted)
    with pytest.raises(ValuesError, match=r"tenant 3: expected a number below 3"):
        tenants(torch.tensor([0, 3, 0]), x)


def test_losses_are_means_of_each_tenant(tenants):
    values = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 9.0]])
    found = tenants.losses(["a", "b"], values[:2], torch.tensor([[0, 0], [0, 1]]))
    assert found == {"a": 0, "b": values[1, 1]}  # no value of a counts
    found = tenants.losses(["a", "b", "a"], values, torch.tensor([[1, 0], [1, 1], [1, 1]]))
    assert {name: float(loss) for name, loss in found.items()} == pytest.approx({"a": 17 / 3, "b": 4.0})
    with pytest.raises(ValuesError, match=r"expected a loss for each of 2 rows, got \(3, 2\)"):
        tenants.losses(["a", "b"], values)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2)])
def test_weights_of_another_shape(tenants, shape):
    with pytest.raises(ValuesError, match=r"expected weights of the shape \(3, 2\) of the values, got"):
        tenants.losses(["a", "b", "a"], torch.ones(3, 2), torch.ones(shape))


def test_the_base_stays_frozen_while_others_train(tenants):
    other = tenants.bank.trainable(["served"])
    for _ in range(2):
        tenants.close()
    assert not any(parameter.requires_grad for parameter in other.model.parameters())
    other.close()
    assert all(parameter.requires_grad for parameter in other.model.parameters())


def test_the_statistics_of_the_bases_own_head_stay(tmp_path):
    """It runs on all rows, whose own heads take its place."""
    bank = Bank(Classifier().train())
    for i, name in enumerate("ab"):
        start_of(tmp_path / name, bank.model, i, modules_to_save=["classifier"])
        bank.add(name, tmp_path / name)
    before = {name: value.clone() for name, value in bank.model.state_dict().items()}
    tenants = bank.trainable(["a", "b"])
    for _ in range(2):
        with tenants.rows("abba"):
            output = bank.model(torch.randn(4, 6))
        output.square().sum().backward()
    after = bank.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    moved = bank.entries["a"].values.heads["classifier"]["1.running_mean"]
    assert not torch.equal(moved, before["classifier.1.running_mean"])


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a", None], "row 1: None is no tenant that trains here; expected one of 3 names such as 'a'"),
        (["a", "served"], "row 1: 'served' is no tenant that trains here"),
        ([{"a": 0.5}], "row 0: {'a': 0.5} is no tenant"),
        ([], "expected a list with a name for each row"),
    ],
)
def test_a_row_without_a_tenant(tenants, names, match):
    with pytest.raises(ValuesError, match=match):
        tenants.rows(names)


def test_what_cannot_train(tenants):
    bank = tenants.bank
    for names, match in (
        (["a", "x"], "trainable: no adapter is named 'x'"),
        (["a", "a"], "'a' is named twice; name each tenant once"),
        ([], "expected a list of names, got"),
        ("abc", "expected a list of names, got 'abc'"),
    ):
        with pytest.raises(ValuesError, match=match):
            bank.trainable(names)
    with pytest.raises(ValuesError, match="'b' has no learning rate; give one for each tenant"):
        tenants.parameter_groups({"a": 1e-3})
    with pytest.raises(ValuesError, match="no tenant is named 'served'; there are 3"):
        tenants.save("served", "nowhere")
    with pytest.raises(TargetError, match="move the model to its device before the bank is made"):
        tenants.to("meta")
    assert tenants.double().theta[0].dtype == torch.float32


def test_a_tenant_that_diverged_is_not_saved(tenants, tmp_path):
    path = tmp_path / "out.safetensors"
    with torch.no_grad():
        tenants.theta[0][3] = float("nan")
    with pytest.raises(ValuesError, match="1 of the 40 values of theta_d are NaN or infinite"):
        tenants.save("a", path)
    assert not path.exists()
    tenants.save("b", path)
