"""A bank that lasts: bytes are bounded, files may go or change, and threads add, replace and remove meanwhile."""

import os
import random
import shutil
import threading

import pytest
import torch
from small_models import adapted, mlp

import unilora_torch
from unilora_core import AdapterFileError, MismatchError, ValuesError, read_adapter
from unilora_torch import Bank

KINDS = [
    {"rank": 2, "d": 40},
    {"rank": 1, "d": 9, "seed": 3, "grouping": "iid"},
    {"rank": 3, "d": 60, "targets": ["up"]},
]


@pytest.fixture
def paths(tmp_path):
    """Nine adapters of three specs."""
    found = {}
    for i in range(9):
        _, adapter = adapted(model=mlp(), start="identity", **KINDS[i % 3])
        with torch.no_grad():
            adapter.theta_d.add_(0.2 * torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(i)))
        found[f"a{i}"] = tmp_path / f"a{i}.safetensors"
        adapter.save(found[f"a{i}"])
    return found


def bank_of(paths, **options):
    bank = Bank(mlp(), **options)
    for name, path in paths.items():
        bank.add(name, path)
    return bank


def run(bank, names, x):
    with torch.no_grad(), bank.rows(names):
        return bank.model(x)


def alone(paths, x):
    """Name → the output of its adapter alone."""
    found = {}
    for name, path in paths.items():
        model = mlp()
        unilora_torch.load(model, path)
        with torch.no_grad():
            found[name] = model(x)[0]
    return found


def x_of(rows):
    return torch.ones(rows, 6)


# ---- bounded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 4 * 60, 4 * 150, None])
def test_values_beyond_the_bound_are_read_again(paths, memory):
    bank, wanted = bank_of(paths, memory=memory), alone(paths, x_of(1))
    shared = bank.nbytes - bank.store.nbytes
    choice = random.Random(0)
    for _ in range(30):
        names = [choice.choice(list(paths)) for _ in range(4)]
        found = run(bank, names, x_of(4))
        for row, name in zip(found, names, strict=True):
            torch.testing.assert_close(row, wanted[name], rtol=1e-5, atol=1e-6)
        in_memory = sum(entry.values.nbytes for entry in bank.entries.values() if entry.values is not None)
        assert in_memory == bank.store.nbytes <= (in_memory if memory is None else memory)
    assert bank.nbytes - bank.store.nbytes == shared  # tables stay


def test_those_used_last_stay(paths):
    mine = {name: paths[name] for name in ("a0", "a3", "a6")}  # of one size
    bank = bank_of(mine, memory=2 * 4 * 40)
    assert [name for name, entry in bank.entries.items() if entry.values] == ["a3", "a6"]
    run(bank, ["a3"], x_of(1))
    run(bank, ["a0"], x_of(1))
    assert [name for name, entry in bank.entries.items() if entry.values] == ["a0", "a3"]


def test_what_no_file_holds_stays(paths):
    """Contents, combinations, and what trains."""
    bank = Bank(mlp(), memory=0)
    bank.add("contents", read_adapter(paths["a0"]))
    bank.add("file", paths["a3"])
    bank.combine("sum", {"contents": 1, "file": 1})
    bank.add("trains", paths["a6"])
    tenants = bank.trainable(["trains"])
    with torch.no_grad():
        tenants.theta[0] += 1
    assert {name for name, entry in bank.entries.items() if entry.values} == {"contents", "sum", "trains"}
    assert bank.store.nbytes == 3 * 4 * 40
    before = run(bank, ["trains"], x_of(1))
    tenants.save("trains", paths["a6"])
    bank.add("again", paths["a6"])
    torch.testing.assert_close(run(bank, ["again"], x_of(1)), before)


def test_removing_gives_the_bytes_back(paths):
    bank = bank_of(paths, memory=4 * 100)
    for name in paths:
        bank.remove(name)
    assert (bank.nbytes, bank.store.evictable, len(bank.store.used), bank.handles) == (0, 0, 0, [])


def test_a_bound_is_a_number(paths):
    with pytest.raises(ValuesError, match="memory: expected a number of bytes or None, got -1"):
        Bank(mlp(), memory=-1)


# ---- files that go or change ----------------------------------------------------------------------------------------


def refused(bank, name, match):
    with pytest.raises(AdapterFileError, match=match):
        bank.rows([name]).__enter__()
    assert bank.live.batch is None


def test_a_file_that_is_gone(paths):
    """It is an error of the rows that name it; others go on, and it comes back with its file."""
    bank, wanted = bank_of(paths, memory=0), alone(paths, x_of(1))
    aside = paths["a0"].with_name("aside")
    paths["a0"].rename(aside)
    refused(bank, "a0", r"adapter 'a0': .*a0\.safetensors: its file cannot be read any more \(No such file")
    torch.testing.assert_close(run(bank, ["a1"], x_of(1))[0], wanted["a1"], rtol=1e-5, atol=1e-6)
    aside.rename(paths["a0"])
    torch.testing.assert_close(run(bank, ["a0"], x_of(1))[0], wanted["a0"], rtol=1e-5, atol=1e-6)


def test_a_file_that_changes(paths):
    bank, wanted = bank_of(paths, memory=0), alone(paths, x_of(1))
    shutil.copyfile(paths["a3"], paths["a0"])
    os.utime(paths["a0"], ns=(1, 1))
    refused(bank, "a0", r"adapter 'a0': .* has changed since it was added; bank\.add\(…, replace=True\) takes the new")
    torch.testing.assert_close(run(bank, ["a3"], x_of(1))[0], wanted["a3"], rtol=1e-5, atol=1e-6)
    bank.add("a0", paths["a0"], replace=True)
    torch.testing.assert_close(run(bank, ["a0"], x_of(1))[0], wanted["a3"], rtol=1e-5, atol=1e-6)


def test_what_is_in_memory_needs_no_file(paths):
    bank, wanted = bank_of(paths), alone(paths, x_of(1))
    paths["a0"].unlink()
    torch.testing.assert_close(run(bank, ["a0"], x_of(1))[0], wanted["a0"], rtol=1e-5, atol=1e-6)


def test_a_file_that_is_not_there_and_one_of_another_base(paths, tmp_path):
    bank = bank_of(paths)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bank.add("new", tmp_path / ".." / "nowhere")
    other = mlp()
    with torch.no_grad():
        other.head.bias.add_(1)
    adapter = unilora_torch.attach(other, d=20)
    adapter.save(tmp_path / "other")
    with pytest.raises(MismatchError, match="it was made for a Mlp, the model is a Mlp, and"):
        bank.add("new", tmp_path / "other")
    assert bank.names == tuple(paths)


def test_a_relative_path_stays_the_same_file(paths, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    bank = bank_of({"a0": "a0.safetensors"}, memory=0)
    monkeypatch.chdir("/")
    run(bank, ["a0"], x_of(1))


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads_add_replace_and_remove_while_others_serve(paths):
    """Every row is its adapter's alone, whatever others do; what is removed is refused by name."""
    bank, wanted = Bank(mlp(), memory=4 * 100), alone(paths, x_of(1))
    for name in ("a0", "a1", "a2"):
        bank.add(name, paths[name])
    done, errors = threading.Event(), []

    def change(seed):
        choice = random.Random(seed)
        while not done.is_set():
            name = choice.choice(["a3", "a4", "a5", "a6", "a7", "a8"])
            try:
                if choice.random() < 0.5:
                    bank.add(name, paths[name], replace=True)
                else:
                    bank.remove(name)
            except ValuesError as error:
                if "no adapter is named" not in str(error):
                    errors.append(error)

    def serve(seed):
        choice = random.Random(seed)
        try:
            for _ in range(60):
                names = [choice.choice(list(paths)) for _ in range(3)]
                try:
                    found = run(bank, names, x_of(3))
                except ValuesError as error:
                    if "no adapter is named" not in str(error):
                        raise
                    continue
                for row, name in zip(found, names, strict=True):
                    torch.testing.assert_close(row, wanted[name], rtol=1e-5, atol=1e-6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    changers = [threading.Thread(target=change, args=(i,)) for i in range(2)]
    for thread in (*threads, *changers):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    for thread in changers:
        thread.join()
    assert errors == []
    for name in bank.names:
        bank.remove(name)
    assert (bank.store.nbytes, len(bank.store.used), bank.handles, bank.families) == (0, 0, [], ())


def test_a_name_that_is_replaced_is_never_missing(paths):
    """Readers take no lock, so a name goes from one adapter to the next in one step."""
    bank, gone = Bank(mlp()), []

    class Watched(dict):
        def pop(self, *key):
            gone.append(key)
            return super().pop(*key)

    bank.store.entries = bank.entries = Watched()
    for path in ("a0", "a1", "a2"):
        bank.add("a", paths[path], replace=True)
    assert gone == []
    bank.remove("a")
    assert gone == [("a",)]
    assert (bank.store.nbytes, bank.families) == (0, ())
