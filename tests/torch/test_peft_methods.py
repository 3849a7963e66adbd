"""PEFT's own modules as the judges: given the same pieces and the same frozen arrays, outputs and gradients are equal.

LoRA-XS and Tied-LoRA, which PEFT has not, are held to modules written here from their papers.
"""

import functools

import pytest
import torch
from torch import nn

from unilora_core import project
from unilora_core.frames import Sizes, piece_names
from unilora_core.methods import plan_spec

INPUTS, RANK = 8, 3
LAYERS = {"q": (8, 12), "k": (12, 12), "v": (12, 16)}
TARGETS = [(name, Sizes(*sizes)) for name, sizes in LAYERS.items()]


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT is the judge here")


class Model(nn.Module):
    """Three layers of three shapes, one after the other."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, sizes in LAYERS.items():
            setattr(self, name, nn.Linear(*sizes, dtype=dtype))

    def forward(self, x):
        return self.v(torch.tanh(self.k(torch.tanh(self.q(x)))))


def inputs(dtype=torch.float64):
    return torch.randn(5, INPUTS, dtype=dtype, generator=torch.Generator().manual_seed(1))


def fill(parameters, *, size=1.0):
    """Random values, the same each time."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(size * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))


def chains(spec, theta_d, frozen):
    """Target → the factors of its ΔW, by `unilora_core` alone."""
    factors = spec.layout.split(project(spec, theta_d))
    pieces = {name: piece_names(spec.form, name, sizes) for name, sizes in TARGETS}
    return {
        name: spec.form.chain({piece: factors[at] for piece, at in names.items()}, frozen[name], spec.chosen)
        for name, names in pieces.items()
    }


def beside(model, x, chain_of):
    """The model's output with x put through each chain beside its layer."""
    hooks = []
    for name, chain in chain_of.items():

        def add(_module, inputs, output, chain=chain):
            return output + functools.reduce(nn.functional.linear, chain, inputs[0])

        hooks.append(getattr(model, name).register_forward_hook(add))
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


def same(spec, theta_d, frozen, base, judged, gradient, *, dtype=torch.float64, atol=1e-12):
    """Outputs, and the gradient of θ_d: ``gradient()`` gives that of the judge in the order of θ_d."""
    x = inputs(dtype)
    theta_d = theta_d.detach().clone().requires_grad_()
    ours, theirs = beside(base, x, chains(spec, theta_d, frozen)), judged(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    y = torch.randn(ours.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    ours.backward(y)
    theirs.backward(y)
    assert theta_d.grad.abs().min() > 0, "every number matters here"
    torch.testing.assert_close(theta_d.grad, gradient(), rtol=0, atol=10 * atol)
    assert (theirs - base(x)).abs().max() > 1e-3, "the update is more than rounding"


def joined(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def layer_of(model, name):
    return model.base_model.model.get_submodule(name)


def merged(model, chain_of, *, atol=1e-12):
    """ΔW as PEFT merges it."""
    for name, chain in chain_of.items():
        first, *rest = chain
        ours = functools.reduce(lambda product, factor: factor @ product, rest, first)
        theirs = layer_of(model, name).get_delta_weight("default")
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=atol)


# ---- PEFT's ----------------------------------------------------------------------------------------------------------


def test_lora(peft):
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    held = [getattr(layer_of(model, name), part).default.weight for name in LAYERS for part in ("lora_A", "lora_B")]
    fill(held)
    spec = plan_spec(TARGETS, method="lora", rank=RANK, start="paper")
    theta_d, frozen = joined(held), {name: {} for name in LAYERS}
    same(spec, theta_d, frozen, base, model, lambda: joined([weight.grad for weight in held]))
    merged(model, chains(spec, theta_d, frozen))


def test_vera(peft):
    """A and B are slices of one pair, as PEFT has it; u is what λ_d has beyond its start."""
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    config = peft.VeraConfig(r=RANK, target_modules=list(LAYERS), d_initial=0.1)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layers = [layer_of(model, name) for name in LAYERS]
    assert all((layer.vera_lambda_d.default == torch.tensor(0.1)).all() for layer in layers)
    assert not any(layer.vera_lambda_b.default.any() for layer in layers)
    model.double()
    held = [part.default for layer in layers for part in (layer.vera_lambda_d, layer.vera_lambda_b)]
    fill(held)
    spec = plan_spec(TARGETS, method="vera", rank=RANK)
    frozen = {
        name: {"A": layer.vera_A["default"][:, : sizes.in_features], "B": layer.vera_B["default"][: sizes.out_features]}
        for (name, sizes), layer in zip(TARGETS, layers, strict=True)
    }
    theta_d = joined([tensor - 0.1 * (i % 2 == 0) for i, tensor in enumerate(held)])
    same(spec, theta_d, frozen, base, model, lambda: joined([tensor.grad for tensor in held]))
    merged(model, chains(spec, theta_d, frozen))
    for name, sizes in TARGETS:  # as large as what PEFT draws
        ours = spec.form.frozen(sizes, 0, {"rank": 512})
        wide = peft.tuners.vera.model._kaiming_init((512, sizes.in_features), torch.Generator().manual_seed(0))
        assert abs(abs(ours["A"]).max() / abs(wide).max() - 1) < 0.01, name


def test_vb_lora(peft):
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    options = {"vectors": 7, "length": 4, "topk": 3}
    config = peft.VBLoRAConfig(
        r=RANK, target_modules=list(LAYERS), num_vectors=7, vector_length=4, topk=3, save_only_topk_weights=False
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    layers = [layer_of(model, name) for name in LAYERS]
    bank = layers[0].vblora_vector_bank["default"]
    logits = [part["default"] for layer in layers for part in (layer.vblora_logits_A, layer.vblora_logits_B)]
    fill([bank, *logits])

    def in_our_order(tensors):
        """PEFT's logits of B are (out / length, r, vectors); ours go along each column of B."""
        return joined([tensor if i % 2 == 0 else tensor.transpose(0, 1) for i, tensor in enumerate(tensors)])

    spec = plan_spec(TARGETS, method="vb-lora", rank=RANK, options=options)
    theta_d, frozen = torch.cat([bank.reshape(-1), in_our_order(logits)]), {name: {} for name in LAYERS}
    x, y = inputs(), torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    theta_d = theta_d.detach().clone().requires_grad_()
    ours, theirs = beside(base, x, chains(spec, theta_d, frozen)), model(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    ours.backward(y)
    theirs.backward(y)
    expected = torch.cat([bank.grad.reshape(-1), in_our_order([tensor.grad for tensor in logits])])
    assert ((theta_d.grad == 0) == (expected == 0)).all(), "vectors that were not chosen have no gradient"
    assert 0 < (expected == 0).sum() < len(expected) / 2 + 60
    torch.testing.assert_close(theta_d.grad, expected, rtol=0, atol=1e-11)
    merged(model, chains(spec, theta_d, frozen))


def test_fourierft(peft):
    """PEFT computes the transform in float32."""
    base, model = Model(torch.float32), Model(torch.float32)
    model.load_state_dict(base.state_dict())
    config = peft.FourierFTConfig(n_frequency=9, target_modules=list(LAYERS), scaling=150.0)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layers = [layer_of(model, name) for name in LAYERS]
    held = [layer.fourierft_spectrum["default"] for layer in layers]
    fill(held, size=0.1)
    spec = plan_spec(TARGETS, method="fourierft", options={"frequencies": 9})
    frozen = {}
    for (name, sizes), layer in zip(TARGETS, layers, strict=True):
        places = torch.full((sizes.out_features, sizes.in_features), 9, dtype=torch.int32)
        places[tuple(layer.indices["default"])] = torch.arange(9, dtype=torch.int32)
        frozen[name] = {"places": places}
    theta_d = joined(held)
    narrow = {"dtype": torch.float32, "atol": 1e-6}
    same(spec, theta_d, frozen, base, model, lambda: joined([tensor.grad for tensor in held]), **narrow)
    merged(model, chains(spec, theta_d, frozen), atol=1e-6)


def test_tinylora(peft):
    """Its R is a sum of fixed matrices; ours is cut out of P θ_d: the same chain, and the same gradient of R."""
    if not hasattr(peft, "TinyLoraConfig"):
        pytest.skip("this PEFT has no TinyLoRA")
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    config = peft.TinyLoraConfig(r=RANK, u=5, target_modules=list(LAYERS), weight_tying=1.0)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    layers = [layer_of(model, name) for name in LAYERS]
    (held,) = [parameter for name, parameter in model.named_parameters() if "tinylora_v" in name]
    fill([held])
    P = torch.stack([layer.tinylora_P["default"].double() for layer in layers])  # (targets, u, r, r)
    spec = plan_spec(TARGETS, method="lora-xs", rank=RANK)
    frozen = {
        name: {"V": layer.tinylora_A["default"].double(), "U": layer.tinylora_B["default"].double()}
        for name, layer in zip(LAYERS, layers, strict=True)
    }
    v = held.detach().clone().requires_grad_()
    x, y = inputs(), torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = beside(base, x, chains(spec, torch.einsum("u,turs->trs", v, P).reshape(-1), frozen))
    theirs = model(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # PEFT holds P in float32
    ours.backward(y)
    theirs.backward(y)
    torch.testing.assert_close(v.grad, held.grad, rtol=1e-6, atol=1e-6)


# ---- from the papers -------------------------------------------------------------------------------------------------


class LoraXS(nn.Module):
    """x ↦ W x + A R B x of arXiv 2405.17604: A = U Σ and B = Vᵀ of the truncated decomposition are frozen."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        U, S, V = torch.linalg.svd(layer.weight.detach())
        self.A, self.B = U[:, :rank] @ torch.diag(S[:rank]), V[:rank]
        self.R = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float64))

    def forward(self, x):
        return self.layer(x) + (self.A @ (self.R @ (self.B @ x.T))).T


def test_lora_xs():
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    model.requires_grad_(False)
    layers = {name: LoraXS(getattr(model, name), RANK) for name in LAYERS}
    for name, layer in layers.items():
        setattr(model, name, layer)
    held = [layer.R for layer in layers.values()]
    spec = plan_spec(TARGETS, method="lora-xs", rank=RANK)
    frozen = {name: spec.form.of_weight(getattr(base, name).weight.detach(), RANK) for name in LAYERS}
    start = torch.from_numpy(spec.init()).double()
    assert (beside(base, inputs(), chains(spec, start, frozen)) == base(inputs())).all()
    fill(held)
    # the singular vectors of both may differ in sign, so R is compared between those of one
    for name, layer in layers.items():
        torch.testing.assert_close(frozen[name]["U"] @ frozen[name]["V"], layer.A @ layer.B, rtol=0, atol=1e-12)
        frozen[name] = {"V": layer.B, "U": layer.A}
    same(spec, joined(held), frozen, base, model, lambda: joined([R.grad for R in held]))


class TiedLora(nn.Module):
    """x ↦ W x + diag(v) B diag(u) A x of arXiv 2311.09578: A and B are shared and trained, u and v the layer's own."""

    def __init__(self, layer, A, B):
        super().__init__()
        self.layer, self.A, self.B = layer, A, B
        self.u = nn.Parameter(torch.ones(A.shape[0], dtype=torch.float64))
        self.v = nn.Parameter(torch.ones(B.shape[0], dtype=torch.float64))

    def forward(self, x):
        update = torch.diag(self.v) @ self.B @ torch.diag(self.u) @ self.A
        return self.layer(x) + x @ update.T


def test_tied_lora():
    """Two layers of one shape share A and B, whose gradients are sums; u and v are measured from 1."""
    targets = [("q", Sizes(12, 12)), ("k", Sizes(12, 12))]
    base, model = (nn.ModuleDict({name: nn.Linear(12, 12, dtype=torch.float64) for name in "qk"}) for _ in range(2))
    model.load_state_dict(base.state_dict())
    model.requires_grad_(False)
    A, B = (nn.Parameter(torch.zeros(*shape, dtype=torch.float64)) for shape in ((RANK, 12), (12, RANK)))
    layers = {name: TiedLora(model[name], A, B) for name in "qk"}
    held = [A, B, *(part for layer in layers.values() for part in (layer.u, layer.v))]
    fill(held)
    spec = plan_spec(targets, method="tied-lora", rank=RANK, start="paper")
    assert list(spec.layout.shapes) == ["shared.12x12.A", "shared.12x12.B", "q.u", "q.v", "k.u", "k.v"]
    theta_d = joined([A, B, *(vector - 1 for vector in held[2:])]).detach().requires_grad_()
    factors = spec.layout.split(project(spec, theta_d))
    x, y = (torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    ours = theirs = x
    for name, sizes in targets:
        pieces = {piece: factors[at] for piece, at in piece_names(spec.form, name, sizes).items()}
        chain = spec.form.chain(pieces, {}, spec.chosen)
        ours = torch.tanh(base[name](ours) + functools.reduce(nn.functional.linear, chain, ours))
        theirs = torch.tanh(layers[name](theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    ours.backward(y)
    theirs.backward(y)
    torch.testing.assert_close(theta_d.grad, joined([tensor.grad for tensor in held]), rtol=0, atol=1e-11)
    start = plan_spec(targets, method="tied-lora", rank=RANK)
    factors = start.layout.split(project(start, start.init()))
    assert {name: bool(factor.any()) for name, factor in factors.items()} == {
        name: name.endswith(".A") for name in factors
    }, "B is zero, u and v are 1, and A is random"
