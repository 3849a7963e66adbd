"""How B·A reaches a model: beside layers of known sizes, beside embeddings, inside parameters; against W + B·A."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from small_models import adapted, assert_unchanged, naive_factors, run, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from versions import TRACES_ATTRIBUTES

import unilora_torch
from unilora_core import MismatchError, TargetError
from unilora_torch import Target, find_targets
from unilora_torch.targets import is_linear

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(7))
IDS = torch.tensor([[0, 3, 3], [8, 1, 0]])


class Experts(nn.Module):
    """Matrices of three experts in one parameter, and a fused layer whose weight is used, never the layer."""

    def __init__(self, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 6, 4) if transposed else torch.randn(3, 4, 6))
        self.qkv = nn.Linear(4, 9)
        self.scale = nn.Parameter(torch.ones(9))

    def forward(self, x, expert=None):
        up = self.up if expert is None else self.up[expert : expert + 1]
        y = torch.einsum("...i,eio->...eo" if self.is_transposed else "...i,eoi->...eo", x, up).tanh().sum(-2)
        return F.linear(y, self.qkv.weight) * self.scale


class Model(nn.Module):
    """Experts at the root's side, run twice."""

    def __init__(self, transposed=False, checkpointing=None):
        super().__init__()
        self.experts, self.back = Experts(transposed), nn.Linear(9, 6)
        self.shift = nn.Parameter(torch.randn(5, 6))
        self.checkpointing = checkpointing

    def forward(self, x):
        call = self.experts
        if self.checkpointing is not None:
            call = functools.partial(checkpoint, self.experts, use_reentrant=self.checkpointing)
        return call(self.back(call(x + self.shift)))


class Words(nn.Module):
    """An embedding and a layer."""

    def __init__(self, embedding):
        super().__init__()
        self.words, self.out = embedding, nn.Linear(6, 2)

    def forward(self, ids):
        return self.out(self.words(ids))


class Scaled(nn.Embedding):
    """As Gemma's and BART's."""

    def forward(self, ids):
        return super().forward(ids) * self.weight.new_tensor(2.5)


class Normed(nn.Embedding):
    """More than a lookup."""

    def forward(self, ids):
        return F.layer_norm(super().forward(ids), (self.weight.shape[-1],))


PARTS = [
    Target("up", "experts", 6, 4, 0, False, "up", 3),
    Target("k", "experts", 4, 3, 3, False, "qkv.weight"),
    Target("q", "experts", 4, 3, 0, False, "qkv.weight"),
    Target("shift", "", 6, 5, 0, False, "shift"),
    Target("back", "back", 9, 6),
]


def parts(transposed):
    return [Target("up", "experts", 6, 4, 0, True, "up", 3), *PARTS[1:]] if transposed else PARTS


def naive_run(base, adapter, *inputs):
    """(outputs, gradient of Σ outputs² in θ_d) in float64, with W + B·A as parameters of a model without adapter."""
    base = copy.deepcopy(base).double()
    theta_d = adapter.theta_d.detach().double().requires_grad_()
    factors, weights = naive_factors(adapter.spec, theta_d), {}
    for target in adapter.targets:
        name = f"{target.module}.{target.parameter or 'weight'}".lstrip(".")
        A, B = factors[f"{target.name}.A"], factors[f"{target.name}.B"]
        weight = weights.get(name, base.get_parameter(name).detach())
        full = torch.zeros_like(weight.mT if target.transposed else weight)
        full[..., target.first_row : target.first_row + target.out_features, :] = B @ A
        weights[name] = weight + (full.mT if target.transposed else full)
    output = torch.func.functional_call(
        base, weights, tuple(x.double() if x.is_floating_point() else x for x in inputs)
    )
    return output.detach(), torch.autograd.grad(output.square().sum(), theta_d)[0]


def assert_same(found, wanted, rtol=1e-4):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-5 * float(b.abs().max()))


def assert_original(model):
    for module in model.modules():
        assert not module._parameters.keys() & vars(module).keys()


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_are_the_sum_while_their_module_runs(start, transposed, checkpointing):
    base = Model(transposed)
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=parts(transposed), rank=2)
    model.checkpointing = checkpointing
    x = X.clone().requires_grad_()  # as reentrant checkpointing needs
    assert_same(run(model, adapter, x), naive_run(base, adapter, X))
    assert_original(model)
    assert list(model.state_dict())[:-1] == list(base.state_dict())


def test_merged_parameters(start):
    base = Model()
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=PARTS)
    expected, before = model(X), snapshot(model)
    adapter.merge()
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-4)
    assert not torch.equal(model.experts.qkv.weight[3:6], base.experts.qkv.weight[3:6])
    assert torch.equal(model.experts.qkv.weight[6:], base.experts.qkv.weight[6:])
    adapter.unmerge()
    assert_unchanged(model, before)
    adapter.detach()
    assert torch.equal(model(X), base(X))


def test_saved_and_loaded_parameters(start, tmp_path):
    base = Model(transposed=True)
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=parts(True))
    adapter.save(tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    assert unilora_torch.load(other, tmp_path / "a.safetensors").targets == adapter.targets
    assert torch.equal(other(X), model(X))
    with pytest.raises(MismatchError, match="up: the target expects a weight of 3 × 6 inputs"):
        unilora_torch.load(Model(), tmp_path / "a.safetensors")


def test_two_adapters_on_one_parameter_add_up():
    base = Model()
    model, first = adapted("paper", model=copy.deepcopy(base), targets=PARTS[:1], seed=1)
    second = unilora_torch.attach(model, PARTS[:1], d=30, seed=2, start="paper", bound=0.3, name="second")
    with torch.no_grad():
        updates = first.delta_weight(PARTS[0]) + second.delta_weight(PARTS[0])
        base.experts.up += updates
        torch.testing.assert_close(model(X), base(X), rtol=1e-4, atol=1e-5)
    assert_original(model)


def test_off_and_on_and_after_an_error():
    base = Model()
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=PARTS)
    with adapter.disabled():
        assert torch.equal(model(X), base(X))
    with pytest.raises(RuntimeError):
        model(X[..., :3])
    assert_original(model)
    assert not torch.allclose(model(X), base(X), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype):
    base = Model().to(dtype)
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=PARTS[:1])
    seen = []
    model.experts.register_forward_pre_hook(lambda module, _: seen.append(module.up))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(X.to(dtype))
    assert torch.equal(seen[0], (base.experts.up.float() + adapter.delta_weight(PARTS[0])).to(dtype))


@pytest.mark.traces
@TRACES_ATTRIBUTES
def test_parameters_under_torch_compile():
    base = Model()
    model, adapter = adapted("paper", model=copy.deepcopy(base), targets=PARTS)
    wanted = run(model, adapter, X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(run(compiled, adapter, X), [tensor.double() for tensor in wanted])
    assert_original(model)


def test_layers_that_are_never_called():
    model, _ = adapted(targets=["qkv"], model=Model(), d=10)
    with pytest.raises(TargetError, match=r"experts.qkv: the model's forward pass never calls this module"):
        model(X)


def test_verify_sees_parameters():
    model, adapter = adapted("paper", model=Model(), targets=PARTS)
    adapter.verify(X)
    model.experts.forward = lambda x: x.new_ones(*x.shape[:-1], 9)
    with pytest.raises(TargetError, match="up: no gradient reaches θ_d through this target"):
        adapter.verify(X)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_parameters_are_found_by_name():
    model = Model(transposed=True)
    assert [target.name for target in find_targets(model, "all-linear")] == ["experts.qkv", "back"]
    assert find_targets(model, ["up"]) == (Target("experts.up", "experts", 6, 4, 0, True, "up", 3),)
    assert find_targets(model, ["shift"]) == (Target("shift", "", 6, 5, 0, False, "shift"),)
    assert [target.name for target in find_targets(model, r"shift|.*up|back")] == ["shift", "experts.up", "back"]
    assert [target.name for target in find_targets(model, r"shift|.*up|back", exclude=["up"])] == ["shift", "back"]
    with pytest.raises(TargetError, match="no module matches"):
        find_targets(model, ["scale"])  # one axis
    with pytest.raises(TargetError, match=r"a Experts is no linear layer.*Name its parameters \['up'\]"):
        find_targets(model, ["experts"])


@pytest.mark.parametrize("module", [nn.Conv1d(2, 3, 4), nn.LSTM(3, 4), nn.Embedding(3, 4), nn.Linear(3, 4)])
def test_weights_of_other_layers_are_no_targets(module):
    with pytest.raises(TargetError, match="no module matches"):
        find_targets(nn.Sequential(module), r".*weight.*")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("x", "experts", 6, 4, 0, False, "down", 3), r"experts: no parameter 'down'; the nearest are"),
        (Target("x", "experts", 6, 4, 0, False, "k.weight"), r"experts: no parameter 'k.weight'"),
        (Target("x", "experts", 6, 4, 0, False, "up", 2), "expects a weight of 2 × 6 inputs .* has 3 × 6 and 4"),
        (Target("x", "experts", 6, 4, 0, False, "scale"), r"expected a parameter of 2 or 3 axes, got \(9,\)"),
        (Target("x", "experts", 4, 8, 2, False, "qkv.weight"), "at least 10 outputs, .* has 1 × 4 and 9"),
    ],
)
def test_parameters_that_do_not_fit(target, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        unilora_torch.attach(model, [target])
    assert_unchanged(model, before)


def test_a_layer_and_its_weight_cannot_both_be_adapted():
    both = [Target("a", "back", 9, 6), Target("b", "back", 9, 6, 0, False, "weight")]
    with pytest.raises(TargetError, match="a and b adapt the same outputs of back"):
        unilora_torch.attach(Model(), both)


# ---- layers of known sizes ------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Says its sizes, and keeps its numbers as it likes."""

    def __init__(self, inputs, outputs, gives=None):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("packed", torch.randint(-8, 8, (gives or outputs, inputs), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.packed.to(x.dtype) / 8)


def test_a_layer_without_a_weight(start):
    packed = Packed(6, 4)
    model, adapter = adapted(start, model=nn.Sequential(packed, nn.Linear(4, 2)), d=20)
    assert [target.name for target in adapter.targets] == ["0", "1"]
    A, B = adapter.factors_of(adapter.targets[0])
    torch.testing.assert_close(packed(X), F.linear(X, packed.packed / 8 + B @ A))
    run(model, adapter, X)
    assert adapter.theta_d.grad.ne(0).all()
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"^0: a weight of a quantised layer cannot take the update; merge into an"):
        adapter.merge()
    assert_unchanged(model, before)
    assert not adapter.merged


def test_a_layer_that_gives_fewer_outputs_than_it_says():
    model, _ = adapted(model=nn.Sequential(Packed(6, 4, gives=3)), d=20)
    with pytest.raises(TargetError, match="0: expected 4 outputs or more, this Packed gave 3"):
        model(X)


def test_what_is_linear():
    assert is_linear(nn.Linear(2, 3))
    assert is_linear(Packed(2, 3))
    wrapper = Packed(2, 3)
    wrapper.inner = nn.Linear(2, 3)
    assert not is_linear(wrapper)  # its inner layer is
    stacked = Packed(2, 3)
    stacked.weight = nn.Parameter(torch.zeros(2, 3, 4))
    assert not is_linear(stacked)
    assert not is_linear(nn.Bilinear(2, 3, 4))
    assert not is_linear(nn.Embedding(2, 3))
    mlp = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1))
    mlp.in_features, mlp.out_features = 2, 3
    assert not is_linear(mlp)  # its convolutions are what it computes with


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_merging_into_few_bits_is_refused(dtype):
    class Narrow(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias)

    layer = Narrow(6, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    model, adapter = adapted(model=nn.Sequential(layer), d=20)
    model(X)
    with pytest.raises(TargetError, match=f"^0: a weight of {dtype} cannot take the update"):
        adapter.merge()


@pytest.mark.parametrize("rows", [(0, 8), (8, 0, 5), (4,), (0, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_fused_layer_leave_its_other_outputs_alone(rows, dtype, start):
    base = nn.Sequential(nn.Linear(6, 12), nn.Identity()).to(dtype)
    heights = {0: 4, 4: 4, 5: 2, 8: 4}
    blocks = [Target(f"b{row}", "0", 6, heights[row], row) for row in rows]
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=blocks, rank=2, d=15)
    x = X.to(dtype)
    found, wanted = run(model, adapter, x), naive_run(base, adapter, x)
    for a, b in zip(found, wanted, strict=True):
        exact = dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4 if exact else 0.05, atol=1e-5 if exact else 0.2)
    outside = [i for i in range(12) if not any(row <= i < row + heights[row] for row in rows)]
    assert torch.equal(found[0][..., outside], base(x)[..., outside])


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_embeddings(start, kind):
    base = Words(kind(9, 6, padding_idx=0))
    model, adapter = adapted(start, model=copy.deepcopy(base), targets=["words", "out"], d=30)
    assert adapter.targets[0] == Target("words", "words", 9, 6, transposed=True)
    assert_same(run(model, adapter, IDS)[:1], naive_run(base, adapter, IDS)[:1])
    words = nn.Sequential(kind(9, 6))  # the row of a padding token gets no gradient, so not with padding here
    model, adapter = adapted(start, model=copy.deepcopy(words), targets=["0"], d=20)
    assert_same(run(model, adapter, IDS), naive_run(words, adapter, IDS))
    expected = model(IDS)
    adapter.merge()
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_are_not_among_the_linear_layers():
    assert [target.name for target in find_targets(Words(nn.Embedding(9, 6)), "all-linear")] == ["out"]


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (Normed(9, 6), "words: Normed does more than look rows up and scale them"),
        (nn.Embedding(9, 6, max_norm=1.0), "words: its max_norm rescales the rows"),
    ],
)
def test_embeddings_whose_merge_would_differ_are_refused(embedding, message):
    model = Words(embedding)
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        unilora_torch.attach(model, ["words"])
    assert_unchanged(model, before)


def test_a_tied_embedding_says_what_to_do():
    model = nn.ModuleDict({"words": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    model["head"].weight = model["words"].weight
    with pytest.raises(
        TargetError, match=r"^words: its weight is tied, it is also head.weight.*untie the weights first"
    ):
        unilora_torch.attach(model, ["words", "head"])


def test_an_embedding_by_hand():
    model, adapter = adapted("paper", model=nn.Sequential(nn.Embedding(9, 6)), targets=["0"], d=20)
    A, B = adapter.factors_of(adapter.targets[0])
    torch.testing.assert_close(model(IDS), model[0].weight[IDS] + A[:, IDS].movedim(0, -1) @ B.T)
