"""Bank: each row of a batch gets what its adapter alone gives, and nothing is silently another's."""

import copy

import numpy as np
import pytest
import torch
from methods import OPTIONS
from small_models import Block, Conv1D, adapted, assert_unchanged, hooks, mlp, move, naive_factors, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from versions import TRACES_CONTEXTS

import unilora_torch
from unilora_core import (
    AdapterFile,
    CorruptFileError,
    MismatchError,
    TargetError,
    ValuesError,
    combine_files,
    read_adapter,
    save_adapter,
)
from unilora_core.methods import METHODS
from unilora_torch import Bank, Target
from unilora_torch.targets import parameter_target

KINDS = [
    {"rank": 1, "d": 9, "start": "paper"},
    {"rank": 2, "d": 40, "start": "identity"},
    {"rank": 4, "d": 7, "start": "paper", "grouping": "iid"},
    {"rank": 3, "d": 25, "start": "identity", "targets": ["down"], "grouping": "numpy-shuffle"},
    {"rank": 2, "d": 40, "start": "identity", "targets": ["up", "head"]},
]


class Fused(nn.Module):
    """A fused qkv of which blocks are adapted, then a layer whose weight is (in, out)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), Conv1D(18, 5)

    def forward(self, x):
        return self.out(self.qkv(x))


Q, V = Target("qkv.q", "qkv", 6, 6), Target("qkv.v", "qkv", 6, 6, 12)
OUT = Target("out", "out", 18, 5, transposed=True)


class Flattening(nn.Module):
    """Rows and positions become one axis, as in some feed-forward layers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x.reshape(-1, 6)).reshape(x.shape)


class Classifier(nn.Module):
    """A body, and a head of two layers."""

    def __init__(self):
        super().__init__()
        self.body = Block(6)
        self.classifier = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.classifier(self.body(x))


@pytest.fixture
def saved(tmp_path):
    """saved(name, model, **options): the file of an adapter that moved, each by its name, on a copy of this model."""

    def make(name, model, **options):
        other, adapter = adapted(model=copy.deepcopy(model), **{"bound": 0.3} | options)
        noise = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for parameter in (adapter.theta_d, *adapter.saved_parameters().values()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
        path = tmp_path / f"{name}.safetensors"
        adapter.save(path)
        return path

    return make


def bank_of(base, paths):
    """A bank on a copy of the base."""
    bank = Bank(copy.deepcopy(base))
    for name, path in paths.items():
        bank.add(name, path)
    return bank


def run(bank, names, x, **options):
    with torch.no_grad(), bank.rows(names, **options):
        return bank.model(x)


def singles(base, paths):
    """Name → a copy of the base with this adapter attached; None → the base. The reference."""
    models = {None: base}
    for name, path in paths.items():
        models[name] = copy.deepcopy(base)
        unilora_torch.load(models[name], path)
    return models


def one_by_one(models, names, x):
    """Each row alone, by its adapter alone."""
    with torch.no_grad():
        return torch.cat([models[name](x[i : i + 1]) for i, name in enumerate(names)])


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_close(found, wanted, tolerance=1e-6):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)]
)
def test_32_rows_with_32_adapters(saved, dtype, tolerance, device):
    """Mixed r, d, seed, targets, grouping and start, and rows of the base between them."""
    base = mlp()
    paths = {f"a{i}": saved(f"a{i}", base, seed=i % 7, **KINDS[i % 5]) for i in range(32)}
    base.to(device, dtype)
    bank = bank_of(base, paths)
    names = [*paths, None, None]
    names = [names[i] for i in torch.randperm(34, generator=torch.Generator().manual_seed(4))]
    models = singles(base, paths)
    for shape in ((34,), (34, 5), (34, 2, 3)):
        x = inputs(*shape, dtype=dtype).to(device)
        found = run(bank, names, x)
        assert_close(found, one_by_one(models, names, x), tolerance)
        with torch.no_grad():
            differs = (found - bank.model(x)).flatten(1).abs().amax(1) > 0
        assert differs.tolist() == [name is not None for name in names]


@pytest.mark.parametrize("names", ["aaaa", "abab", "bbba", "cbca"])
def test_rows_that_share_adapters(saved, names, start):
    base = mlp()
    paths = {name: saved(name, base, start=start) for name in "abc"}
    x = inputs(4, 3)
    assert_close(run(bank_of(base, paths), list(names), x), one_by_one(singles(base, paths), names, x))


def test_blocks_of_a_fused_layer_and_transposed_weights(saved):
    torch.manual_seed(0)
    base = Fused()
    choices = {"q": [Q], "qv": [Q, V], "vq": [V, Q], "out": [OUT], "all": [V, OUT, Q]}
    paths = {name: saved(name, base, targets=targets, d=20) for name, targets in choices.items()}
    x, names = inputs(6, 4), [*paths, None]
    assert_close(run(bank_of(base, paths), names, x), one_by_one(singles(base, paths), names, x))


def test_a_mixture_is_the_weighted_sum_of_updates(saved):
    """Against dense float64 factors: (W + Σ w_k B_k A_k) x in a single layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5))
    kinds = {"a": {"d": 9}, "b": {"d": 9, "rank": 2}, "c": {"d": 30, "start": "identity"}}
    paths = {name: saved(name, base, **kind) for name, kind in kinds.items()}
    mixtures = [{"a": 0.7, "b": 0.3}, {"c": -1.5}, None, {"a": 0.5, "b": 0.25, "c": 2}, {}, {"b": 0.0}, "c"]
    x, wanted = inputs(7, 3), []
    for i, row in enumerate(mixtures):
        weight = base[0].weight.detach().double()
        for name, share in ({row: 1} if isinstance(row, str) else row or {}).items():
            file = read_adapter(paths[name])
            factors = naive_factors(file.spec, torch.from_numpy(file.theta_d).double())
            weight = weight + share * factors["0.B"] @ factors["0.A"]
        wanted.append(x[i].double() @ weight.T + base[0].bias.detach().double())
    assert_close(run(bank_of(base, paths), mixtures, x).double(), torch.stack(wanted))


def test_each_row_has_its_own_head(saved):
    torch.manual_seed(0)
    base = Classifier()
    paths = {name: saved(name, base, targets=["up"], modules_to_save=["classifier"]) for name in "ab"}
    paths["c"] = saved("c", base, targets=["down", "classifier.0"])
    bank, models = bank_of(base, paths), singles(base, paths)
    for names in (["a", "c", "b", None, "a"], ["b"] * 5, ["c"] * 5, [None] * 5):
        for x in (inputs(5), inputs(5, 4)):
            assert_close(run(bank, names, x), one_by_one(models, names, x))
    a, b = (read_adapter(paths[name]).tensors["classifier.2.weight"] for name in "ab")
    assert np.abs(a - b).max() > 0.1
    bank.remove("a")
    bank.remove("b")
    assert len(bank.model.classifier._forward_hooks) == 1  # c's: what calls one of its layers


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_as_generate_repeats_rows(saved, copies):
    """The encoder sees each row once, the decoder each row ``copies`` times, side by side."""
    torch.manual_seed(0)
    base = Classifier()
    paths = {"a": saved("a", base, targets=["up"], modules_to_save=["classifier"]), "b": saved("b", base)}
    bank, names, x = bank_of(base, paths), ["a", None, "b"], inputs(3, 4)
    wanted = one_by_one(singles(base, paths), names, x)
    assert_close(run(bank, names, x, copies=copies), wanted)
    repeated = run(bank, names, x.repeat_interleave(copies, 0), copies=copies)
    assert_close(repeated, wanted.repeat_interleave(copies, 0))


def test_gradients_reach_the_inputs(saved):
    """The bank trains nothing, but what comes before the model may be trained through it."""
    base = mlp()
    paths = {name: saved(name, base) for name in "ab"}
    bank, names = bank_of(base, paths), ["b", None, "a"]
    models, wanted, found = singles(base, paths), inputs(3, 2).requires_grad_(), inputs(3, 2).requires_grad_()
    for i, name in enumerate(names):
        models[name](wanted[i : i + 1]).square().sum().backward()
    with bank.rows(names):
        bank.model(found).square().sum().backward()
    assert_close(found.grad, wanted.grad, tolerance=1e-5)


# ---- what is stored -------------------------------------------------------------------------------------------------


def test_a_file_or_its_contents(saved):
    base = mlp()
    path, x = saved("a", base), inputs(2, 3)
    bank = bank_of(base, {"path": path, "text": str(path), "contents": read_adapter(path)})
    outputs = [run(bank, [name] * 2, x) for name in bank.names]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_thousand_adapters_cost_a_thousand_thetas():
    """And one table; two specs do not share it."""
    model = nn.Sequential(nn.Linear(64, 64))
    adapter = unilora_torch.attach(model, d=32)
    spec, metadata = adapter.spec, {}
    adapter.detach()
    bank, rng = Bank(model), np.random.default_rng(0)
    files = [AdapterFile(spec, rng.standard_normal(32).astype(np.float32), {}, metadata) for _ in range(1000)]
    for i, file in enumerate(files):
        bank.add(str(i), file)
    table = 4 * spec.D + 2 * 4 * spec.d  # groups; scale and origin
    assert bank.nbytes == 1000 * 4 * 32 + table
    assert repr(bank) == f"Bank(adapters: 1,000, specs: 1, bytes: {bank.nbytes:,})"
    assert len(bank.handles) == 3  # one layer, what calls it, and the model
    other = AdapterFile(type(spec)(spec.layout, 16, seed=1), np.ones(16, np.float32))
    bank.add("other", other)
    assert bank.nbytes == 1000 * 4 * 32 + table + 4 * 16 + 4 * spec.D + 4 * 16
    for name in bank.names:
        bank.remove(name)
    assert bank.nbytes == 0


class Peak(TorchDispatchMode):
    """The most bytes that the tensors of a ``with`` hold at once."""

    def __init__(self):
        super().__init__()
        self.bytes, self.alive = 0, WeakTensorKeyDictionary()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            self.alive[tensor] = tensor.untyped_storage()
        storages = {storage.data_ptr(): storage.nbytes() for storage in self.alive.values()}
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


def test_the_factors_of_a_batch_are_those_of_one_layer():
    """However many layers the model has, a batch takes the same memory."""
    peaks = []
    for depth in (2, 8):
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)])
        adapter = unilora_torch.attach(model, d=10)
        file = AdapterFile(adapter.spec, np.ones(10, np.float32))
        adapter.detach()
        bank = Bank(model)
        for name in "abcd":
            bank.add(name, file)
        with torch.no_grad(), Peak() as peak, bank.rows(list("abcd")):
            model(inputs(4))
        peaks.append(peak.bytes)
    assert peaks[1] == peaks[0] > 4 * 4 * 24  # A or B of four adapters in a layer, at least


def test_remove_rename_replace(saved):
    base = mlp()
    paths = {name: saved(name, base) for name in "abc"} | {"d": saved("d", base, rank=2)}
    bank, x = bank_of(base, {name: paths[name] for name in "ab"}), inputs(2, 3)
    models = singles(base, paths)
    handles = list(bank.handles)
    bank.rename("a", "z")
    assert bank.names == ("b", "z")
    assert_close(run(bank, ["z", "b"], x), one_by_one(models, "ab", x))
    bank.add("z", paths["c"], replace=True)
    assert_close(run(bank, ["z", "b"], x), one_by_one(models, "cb", x))
    bank.remove("b")
    bank.add("b", paths["a"])
    assert bank.handles == handles  # nothing that a compiled model would notice
    assert_close(run(bank, ["z", "b"], x), one_by_one(models, "ca", x))
    bank.add("z", paths["d"], replace=True)  # another spec
    assert_close(run(bank, ["z", "b"], x), one_by_one(models, "da", x))
    bank.remove("z")
    assert len(bank.families) == 1


def test_what_changes_inside_rows_counts_for_the_next_batch(saved):
    base = mlp()
    paths = {name: saved(name, base) for name in "ab"}
    bank, models, x = bank_of(base, {"a": paths["a"]}), singles(base, paths), inputs(2, 3)
    with torch.no_grad(), bank.rows(["a", "a"]):
        bank.add("a", paths["b"], replace=True)
        assert_close(bank.model(x), one_by_one(models, "aa", x))
        with bank.rows(["a", None]):
            assert_close(bank.model(x), one_by_one(models, ["b", None], x))
        assert_close(bank.model(x), one_by_one(models, "aa", x))


def test_the_model_stays_the_base(saved):
    torch.manual_seed(0)
    base = Classifier()
    before, unhooked, x = snapshot(base), copy.deepcopy(base), inputs(3, 2)
    with torch.no_grad():
        wanted = base(x)
    bank = Bank(base)
    for name, options in {"a": {"modules_to_save": ["classifier"], "targets": ["up"]}, "b": {}}.items():
        bank.add(name, saved(name, unhooked, **options))
    assert max(sum(each) for each in hooks(base).values()) == 2  # of the classifier: its head, and what calls b's layer
    with torch.no_grad():
        assert torch.equal(base(x), wanted)
        with pytest.raises(RuntimeError, match="of the test"), bank.rows(["a", "b", "a"]):
            raise RuntimeError("of the test")
        assert torch.equal(base(x), wanted)
    assert not torch.equal(run(bank, ["a", "b", None], x)[:2], wanted[:2])
    bank.close()
    assert_unchanged(base, before)
    assert bank.names == ()


# ---- other methods --------------------------------------------------------------------------------------------------

SERVED = [name for name, method in METHODS.items() if method.frame != "dense"]
SMALL = OPTIONS | {"lora-xs": {"rank": 2}, "vb-lora": {"vectors": 6, "length": 3}, "fourierft": {"frequencies": 12}}
"""What the layers of `mlp`, 6 and 9 wide, need in place of the methods' defaults."""


@pytest.fixture
def of_method(tmp_path):
    """of_method(name, model, method): the file of an adapter that moved, on a copy of this model."""

    def make(name, model, method, seed=0):
        options = {"targets": "all-linear", "method": method, "seed": seed} | SMALL.get(method, {})
        adapter = unilora_torch.attach(copy.deepcopy(model), **options)
        move(adapter, seed=ord(name[-1]))
        adapter.save(path := tmp_path / f"{name}.safetensors")
        return path

    return make


@pytest.mark.parametrize("method", SERVED)
@pytest.mark.parametrize("rows", ["abc", "aab-b", "c"])
def test_rows_of_every_method(of_method, method, rows):
    """Three adapters, one of another seed, beside rows of the base."""
    base = mlp()
    paths = {name: of_method(name, base, method, seed=int(name == "c")) for name in "abc"}
    bank, models = bank_of(base, paths), singles(base, paths)
    names = [None if name == "-" else name for name in rows]
    for shape in ((len(rows),), (len(rows), 4)):
        x = inputs(*shape)
        found, wanted = run(bank, names, x), one_by_one(models, names, x)
        assert_close(found, wanted)
        assert (found - base(x)).flatten(1).abs().amax(1).bool().tolist() == [name is not None for name in names]


def test_methods_beside_each_other_and_mixed(of_method):
    base = mlp()
    paths = {method: of_method(method, base, method) for method in SERVED}
    bank, models = bank_of(base, paths), singles(base, paths)
    names = [*SERVED, None, *reversed(SERVED)]
    x = inputs(len(names))
    assert_close(run(bank, names, x), one_by_one(models, names, x))
    assert len(bank.families) == len(SERVED)


def test_a_mixture_of_methods(of_method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6))
    paths = {method: of_method(method, base, method) for method in ("vera", "lora-xs", "fastfood")}
    bank, models = bank_of(base, paths), singles(base, paths)
    x = inputs(2, 3)
    with torch.no_grad():
        updates = {name: models[name](x) - base(x) for name in paths}
    weights = {"vera": 0.5, "lora-xs": -2.0, "fastfood": 1.0}
    wanted = base(x).detach() + sum(weight * updates[name] for name, weight in weights.items())
    assert_close(run(bank, [weights, weights], x), wanted)


def test_singular_vectors_of_two_machines_are_two_families(of_method, tmp_path):
    """An SVD is one but for signs: what a file keeps counts."""
    base = mlp()
    paths = {name: of_method(name, base, "lora-xs") for name in "ab"}
    file = read_adapter(paths["b"])
    tensors = {name: -array for name, array in file.tensors.items()}
    paths["c"] = tmp_path / "c.safetensors"
    save_adapter(paths["c"], file.spec, file.theta_d, tensors=tensors, metadata=file.metadata)
    bank, models = bank_of(base, paths), singles(base, paths)
    assert len(bank.families) == 2
    x = inputs(3)
    assert_close(run(bank, list("abc"), x), one_by_one(models, list("abc"), x))
    bank.remove("c")
    assert len(bank.families) == 1


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(SERVED)))
def test_updates_as_large_as_weights_are_refused(of_method, method):
    base = mlp()
    path = of_method("x", base, method)
    bank = Bank(base)
    refused(bank, TargetError, "θ_D is as large as the layers' weights", lambda: bank.add("x", path))


# ---- refused --------------------------------------------------------------------------------------------------------


def refused(bank, error, match, call):
    names, handles, held = bank.names, list(bank.handles), bank.nbytes
    before = snapshot(bank.model)
    with pytest.raises(error, match=match):
        call()
    assert (bank.names, bank.handles, bank.nbytes) == (names, handles, held)
    assert_unchanged(bank.model, before)


@pytest.fixture
def bank(saved):
    base = mlp()
    return bank_of(base, {name: saved(name, base) for name in ("french", "german")})


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["french", "frensh"], r"rows: row 1: no adapter is named 'frensh'; the nearest of 2 names are \['french'\]"),
        (["x"], r"row 0: no adapter is named 'x'; the nearest of 2 names are \['french', 'german'\]"),
        ([3], "row 0: expected a name, None, or name → weight, got 3"),
        ([["french"]], r"row 0: expected a name, None, or name → weight, got \['french'\]"),
        ([{"x": 1.0}], "row 0: no adapter is named 'x'"),
        ([{3: 1.0}], "row 0: no adapter is named 3"),
        ([None, {"french": float("nan")}], "row 1: the weight of 'french' must be a finite number, got nan"),
        ([{"french": "1"}], "row 0: the weight of 'french' must be a finite number, got '1'"),
        ([], r"expected a list with a name for each row of the batch, got \[\]"),
        ("french", "expected a list with a name for each row of the batch, got 'french'"),
    ],
)
def test_rows_that_mean_nothing(bank, names, match):
    refused(bank, ValuesError, match, lambda: bank.rows(names).__enter__())
    assert bank.live.batch is None


def test_copies_that_mean_nothing(bank):
    for copies in (0, 1.5):
        refused(bank, ValuesError, f"expected copies ≥ 1, got {copies}", bank.rows(["french"], copies=copies).__enter__)


@pytest.mark.parametrize("shape", [(3,), (4,), (1,), (3, 2), (4, 2), (1, 2), ()])
def test_another_batch_than_the_rows(bank, shape):
    """Also a multiple: it is not known which row was repeated."""
    match = r"blocks.0.up: expected inputs whose first axis is the 2 rows that were named, got shape \(.*copies="
    refused(bank, ValuesError, match, lambda: run(bank, ["french", None], inputs(*shape)))


def test_another_batch_than_the_copies(bank):
    match = r"the 2 rows that were named, or 4 with the 2 copies of each, got shape"
    for shape in ((3, 2), (6, 2), (4,)):
        refused(bank, ValuesError, match, lambda s=shape: run(bank, ["french", None], inputs(*s), copies=2))


def test_positions_and_rows_in_one_axis(saved):
    base = Flattening()
    bank = bank_of(base, {"a": saved("a", base, d=10)})
    refused(bank, ValuesError, r"inner: .*the 2 rows.*\(6, 6\)", lambda: run(bank, ["a", "a"], inputs(2, 3)))


def test_an_adapter_is_attached(bank):
    file = read_adapter_of(bank)
    adapter = unilora_torch.attach(bank.model)
    refused(bank, TargetError, "an adapter attached", lambda: bank.add("new", file))
    refused(
        bank, TargetError, "an adapter attached, whose update would be added; detach it", bank.rows([None]).__enter__
    )
    adapter.detach()


def read_adapter_of(bank):
    stored = next(iter(bank.entries.values()))
    return AdapterFile(stored.family.spec, stored.values.theta_d.numpy())


def test_names(bank):
    file = read_adapter_of(bank)
    refused(bank, ValuesError, "'french' is taken; give replace=True", lambda: bank.add("french", file))
    for name in ("", None, 3):
        refused(bank, ValuesError, f"expected a name, got {name!r}", lambda n=name: bank.add(n, file))
        refused(bank, ValuesError, "is taken or no name", lambda n=name: bank.rename("french", n))
    refused(bank, ValuesError, "'german' is taken or no name; 'french'", lambda: bank.rename("french", "german"))
    refused(bank, ValuesError, "rename: no adapter is named 'x'", lambda: bank.rename("x", "y"))
    refused(bank, ValuesError, r"remove: no adapter is named 'germn'.*\['german'\]", lambda: bank.remove("germn"))


@pytest.mark.parametrize("theta_d", [np.full(40, np.nan, np.float32), np.ones(39, np.float32), np.ones(40)])
def test_values_that_do_not_fit(bank, theta_d):
    file = AdapterFile(read_adapter_of(bank).spec, theta_d)
    match = r"adapter 'new': expected theta_d \(40,\) float32 without NaN"
    refused(bank, ValuesError, match, lambda: bank.add("new", file))
    refused(bank, ValuesError, "adapter 'french'", lambda: bank.add("french", file, replace=True))


def test_files_that_do_not_fit(bank, saved, tmp_path):
    (tmp_path / "torn").write_bytes(b"torn")
    refused(bank, CorruptFileError, "torn: not a whole safetensors file", lambda: bank.add("x", tmp_path / "torn"))
    refused(bank, FileNotFoundError, "missing", lambda: bank.add("x", tmp_path / "missing"))
    for model, match in ((mlp(width=7), "expected a layer of 7 inputs"), (Fused(), "no module 'qkv'")):
        path = saved("other", model, d=20)
        refused(bank, MismatchError, match, lambda p=path: bank.add("x", p))
    other = mlp()
    with torch.no_grad():
        other.head.bias.add_(1)
    path = saved("other", other)
    refused(bank, MismatchError, "it was made for a Mlp, the model is a Mlp, and 2 of", lambda: bank.add("x", path))
    bank.add("kin", path, check_base=False)
    path = saved("other", mlp(classes=4), targets=["up"], modules_to_save=["head"])
    refused(bank, MismatchError, "head: the file holds.*the number of classes", lambda: bank.add("x", path))


def test_mixtures_of_heads(saved):
    base = mlp()
    paths = {"a": saved("a", base, targets=["up"], modules_to_save=["head"]), "b": saved("b", base)}
    bank = bank_of(base, paths)
    match = "row 0: 'a' saves head in full, which has no weighted sum"
    refused(bank, ValuesError, match, bank.rows([{"b": 0.5, "a": 0.5}]).__enter__)


def test_a_head_that_shares_a_weight(saved):
    base = mlp()
    path = saved("a", base, targets=["up"], modules_to_save=["head"])
    base.embedding = nn.Embedding(3, 6)
    base.embedding.weight = base.head.weight
    bank = Bank(base)
    refused(bank, TargetError, "head.weight is tied, it is also embedding.weight", lambda: bank.add("a", path))


@pytest.mark.parametrize("name", ["experts", "expert"])
def test_experts(saved, name):
    model = nn.ModuleDict({name: nn.ModuleList([nn.Linear(6, 6)])})
    path = saved("a", model, d=10)
    refused(Bank(model), TargetError, f"{name}.0 is an expert, which gets the", lambda: bank_of(model, {"a": path}))
    shared = nn.ModuleDict({"shared_experts": nn.Linear(6, 6)})
    assert bank_of(shared, {"a": saved("b", shared, d=10)}).names == ("a",)


def test_what_all_rows_share(saved):
    base = mlp()
    path = saved("a", base, targets=[parameter_target("head", "weight", base.head.weight)], d=10)
    match = "head.weight is added to a weight, which all rows of a batch share; attach such an adapter alone"
    refused(Bank(base), TargetError, match, lambda: bank_of(base, {"a": path}))
    base = nn.ModuleDict({"words": nn.Embedding(7, 6)})
    path = saved("b", base, targets=["words"], d=10)
    refused(Bank(base), TargetError, "words is an embedding, which", lambda: bank_of(base, {"a": path}))


def test_a_layer_that_is_never_called(saved):
    class Bypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.bypassed = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.bypassed.weight)

    base = Bypassing()
    paths = {"a": saved("a", base, d=10), "b": saved("b", base, d=10, targets=["used"])}
    paths["c"] = saved("c", base, d=10, targets=["used"], modules_to_save=["bypassed"])
    bank, x = bank_of(base, paths), inputs(2, 3)
    assert_close(run(bank, ["b", None], x), one_by_one(singles(base, {"b": paths["b"]}), ["b", None], x))
    for name in "ac":
        with pytest.raises(TargetError, match="bypassed: the model's forward pass never calls this module"):
            run(bank, [name, None], x)


# ---- torch.compile --------------------------------------------------------------------------------------------------


# ---- what happens to the base meanwhile ------------------------------------------------------------------------------


def test_a_base_that_takes_other_values(bank, saved):
    """Files of the new base are taken and those of the old one refused, also of heads that were seen before."""
    other = mlp()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    old, new = saved("spanish", mlp()), saved("dutch", other)
    bank.model.load_state_dict(other.state_dict())
    bank.add("dutch", new)
    with pytest.raises(MismatchError):
        bank.add("spanish", old)


def test_a_base_that_is_cast_later(saved):
    base = Classifier()
    bank = bank_of(base, {"a": saved("a", base, modules_to_save=["classifier"])})
    wanted = run(bank, ["a", None], inputs(2, 6).squeeze(1))
    bank.model.bfloat16()
    found = run(bank, ["a", None], inputs(2, 6).squeeze(1).bfloat16())
    torch.testing.assert_close(found.float(), wanted, rtol=3e-2, atol=3e-2)


def test_what_is_added_in_inference_mode_trains_later(tmp_path, saved):
    base = Classifier()
    path = saved("a", base, modules_to_save=["classifier"])
    bank = Bank(base, memory=0)
    with torch.inference_mode():
        bank.add("a", path)
        with bank.rows(["a"]):
            bank.model(torch.randn(1, 6))
    tenants = bank.trainable(["a"])
    with tenants.rows(["a"]):
        bank.model(torch.randn(1, 6)).sum().backward()
    assert tenants.theta[0].grad.any()


def test_rows_without_positions(bank):
    with torch.no_grad(), bank.rows(["french", None]):
        assert bank.model(torch.zeros(2, 0, 6)).shape == mlp()(torch.zeros(2, 0, 6)).shape


class Tupled(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_a_head_whose_output_is_no_tensor_is_refused(saved):
    base = nn.ModuleDict({"body": nn.Linear(6, 6), "head": Tupled(6, 3)})
    base.forward = lambda x: base["head"](base["body"](x))[0]
    other = copy.deepcopy(base)
    other.forward = lambda x: other["head"](other["body"](x))[0]
    adapter = unilora_torch.attach(other, ["body"], d=8, modules_to_save=["head"])
    bank = Bank(base)
    path = saved("x", mlp()).with_name("tupled")
    adapter.save(path)
    bank.add("a", path)
    with pytest.raises(TargetError, match="head: expected a tensor as the output of a module that adapters save"):
        run(bank, ["a"], torch.zeros(1, 6))


def test_weights_of_a_mixture_are_float32(bank):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bank.rows([{"french": 0.1}]):
            weights = next(iter(bank.hooked.live.batch.pairs.values())).weights
    finally:
        torch.set_default_dtype(torch.float32)
    assert (weights.dtype, weights.item()) == (torch.float32, pytest.approx(0.1, rel=1e-7))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@TRACES_CONTEXTS
def test_other_adapters_do_not_recompile(saved, fresh_compiler):
    base = mlp()
    paths = {name: saved(name, base) for name in "abcdef"}
    bank, models, x = bank_of(base, {name: paths[name] for name in "abc"}), singles(base, paths), inputs(4, 3)
    compiled = torch.compile(bank.model, fullgraph=True, backend="aot_eager")

    def check(bank_names, file_names):
        with torch.no_grad(), bank.rows(bank_names):
            assert_close(compiled(x), one_by_one(models, file_names, x))

    check(["a", "b", "c", "a"], "abca")
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(["b", "b", "c", "a"], "bbca")
        bank.add("d", paths["d"])
        bank.add("a", paths["e"], replace=True)
        bank.remove("b")
        bank.add("f", paths["f"])
        check(["d", "d", "f", "a"], "ddfe")


def test_compiled_with_heads_and_other_specs(saved, fresh_compiler):
    torch.manual_seed(0)
    base = Classifier()
    paths = {name: saved(name, base, targets=["up"], modules_to_save=["classifier"]) for name in "ab"}
    paths["c"] = saved("c", base, rank=2, start="identity")
    bank, models, x = bank_of(base, paths), singles(base, paths), inputs(4, 3)
    compiled = torch.compile(bank.model, backend="eager")
    for names in (["a", "b", "c", None], ["c", "b", None, "b"], ["c"] * 4):
        with torch.no_grad(), bank.rows(names):
            assert_close(compiled(x), one_by_one(models, names, x))
    with torch.no_grad():
        assert_close(compiled(x), base(x))


# ---- combined -------------------------------------------------------------------------------------------------------


def test_a_combination_is_that_of_the_files(saved, tmp_path):
    """In the bank as from files; it is not the mixture of the updates, but for weights that name one adapter."""
    torch.manual_seed(0)
    base = Classifier()
    kind = {"targets": ["up"], "modules_to_save": ["classifier"], "start": "identity"}
    paths = {name: saved(name, base, **kind) for name in "ab"}
    bank, x = bank_of(base, paths), inputs(2, 3)
    bank.combine("mean", {"a": 0.25, "b": 0.75})
    made = combine_files({name: read_adapter(path) for name, path in paths.items()}, (0.25, 0.75))
    bank.add("from files", made)
    assert_close(run(bank, ["mean"] * 2, x), run(bank, ["from files"] * 2, x))
    bank.combine("b again", {"a": 0, "b": 1})
    assert torch.equal(run(bank, ["b again"] * 2, x), run(bank, ["b"] * 2, x))
    bank.remove("a")
    bank.remove("b")
    assert_close(run(bank, ["mean"] * 2, x), run(bank, ["from files"] * 2, x))


def test_the_combination_is_no_mixture(saved):
    base = mlp()
    bank, x = bank_of(base, {name: saved(name, base, start="identity") for name in "ab"}), inputs(2, 3)
    bank.combine("sum", {"a": 0.5, "b": 0.5})
    found, mixed = run(bank, ["sum"] * 2, x), run(bank, [{"a": 0.5, "b": 0.5}] * 2, x)
    assert (found - mixed).abs().max() > 1e-3
    bank.combine("sum", {"a": 0}, replace=True)  # θ_d⁰, which is the base
    assert_close(run(bank, ["sum"] * 2, x), run(bank, [None] * 2, x))


def test_combinations_that_mean_nothing(saved):
    torch.manual_seed(0)
    base = Classifier()
    heads = {"targets": ["up"], "modules_to_save": ["classifier"]}
    paths = {"a": saved("a", base, **heads), "b": saved("b", base, **heads), "c": saved("c", base, targets=["up"])}
    paths["d"] = saved("d", base, targets=["up"], rank=2, d=20)
    bank = bank_of(base, paths)
    for weights, error, match in (
        ({"a": 1, "b": 1}, ValuesError, r"holds a trained head \(classifier\), and weights that add up to 2"),
        ({"a": 0.5, "c": 0.5}, MismatchError, "'a' and 'c' have different heads, so their θ_d do not add up"),
        ({"c": 0.5, "d": 0.5}, MismatchError, "'c' and 'd' have different specs or targets"),
        ({"c": 0.5, "x": 0.5}, ValuesError, "combine: no adapter is named 'x'"),
        ({"c": float("inf")}, ValuesError, "expected 1 finite weights"),
        ({}, ValuesError, "expected at least one adapter"),
    ):
        refused(bank, error, match, lambda w=weights: bank.combine("new", w))
    refused(bank, ValuesError, "'a' is taken; give replace=True", lambda: bank.combine("a", {"c": 1}))
