"""Every method through `unilora_timm.attach`: blocks of a fused qkv, a qkv that nobody calls, convolutions."""

import pytest
import torch
import torch.nn.functional as F

import unilora_timm
from unilora_core import SpecError, TargetError
from unilora_core.methods import METHODS
from unilora_torch.targets import weight_name

OPTIONS = {
    "vera": {"rank": 8},
    "lora-xs": {"rank": 4},
    "vb-lora": {"vectors": 16, "length": 8},
    "fourierft": {"frequencies": 30},
}
DENSE = ("fourierft", "gpart", "intrinsic-dimension")
MODELS = {
    "fused qkv": ("vit_tiny_patch16_224", None),
    "bypassed qkv": ("beit_base_patch16_224", None),
    "convolutions": ("convnext_tiny", ["conv", "mlp"]),
}
FRAMES = ("lora", "tied-lora", "vera", "lora-xs", "vb-lora", "fourierft", "gpart")
"""One method for each frame."""

CASES = [("fused qkv", method) for method in METHODS]
CASES += [(kind, method) for kind in list(MODELS)[1:] for method in FRAMES]
CASES.remove(("convolutions", "vb-lora"))  # no length divides all widths of these layers
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(autouse=True)
def one_thread(_quiet_and_seeded):
    """These models are too small for two."""
    torch.set_num_threads(1)


@pytest.fixture
def lively(tiny):
    """As `tiny`, without the zeros and the very small numbers that random models start with."""

    def make(kind):
        model = tiny(MODELS[kind][0])
        torch.manual_seed(3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if not key.endswith("bias") and parameter.abs().max() < 1e-2:
                    parameter.uniform_(0.2, 0.5) if parameter.squeeze().dim() < 2 else parameter.normal_(std=0.2)
        return model

    return make


def attach(model, kind, method, **options):
    return unilora_timm.attach(model, MODELS[kind][1], method=method, **OPTIONS.get(method, {}) | options)


def moved(adapter, by=0.05):
    """As if it had been trained."""
    with torch.no_grad():
        adapter.theta_d.add_(torch.randn(adapter.spec.d, generator=torch.Generator().manual_seed(2)), alpha=by)
    return adapter


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_it_trains_saves_loads_and_merges(lively, images, tmp_path, kind, method):
    model = lively(kind)
    before = model(images)
    adapter = attach(model, kind, method)
    if method != "vb-lora":
        assert torch.equal(model(images), before)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(images), LABELS))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-2
    expected = model(images)
    adapter.save(tmp_path / "a.safetensors")
    fresh = lively(kind)
    loaded = unilora_timm.load(fresh, tmp_path / "a.safetensors")
    assert (loaded.spec, loaded.targets) == (adapter.spec, adapter.targets)
    torch.testing.assert_close(fresh(images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(unilora_timm.merged(model)(images), expected, rtol=1e-5, atol=1e-5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter.merge()
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    adapter.unmerge()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_update_is_the_chain_in_the_rows_of_the_weight(lively, images, kind, method):
    """The same logits and the same gradient of θ_d as weights W + F_k·…·F_1, through `functional_call`."""
    model, base = lively(kind), lively(kind)
    adapter = moved(attach(model, kind, method))
    weights, factors = dict(base.named_parameters()), adapter.factors()
    for target in adapter.targets:
        update = torch.eye(target.in_features)
        for factor in adapter.chain(factors, target):
            update = factor @ update
        W = weights[weight_name(target)]
        above, below = target.first_row, W.shape[0] - target.first_row - target.out_features
        rows = F.pad(update.view(-1, *W.shape[1:]), (0, 0) * (W.dim() - 1) + (above, below))
        weights[weight_name(target)] = W + rows
    expected, output = torch.func.functional_call(base, weights, (images,)), model(images)
    assert not torch.allclose(output, base(images), atol=1e-4)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    noise = torch.randn_like(expected)
    wanted, found = (torch.autograd.grad((o * noise).sum(), adapter.theta_d)[0] for o in (expected, output))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_sub_vectors_that_do_not_divide_a_kernel(lively):
    model = lively("convolutions")
    with pytest.raises(
        SpecError, match=r"length = 8 does not divide the 49 columns of 'stages\.3\.blocks\.0\.conv_dw\.A'"
    ):
        attach(model, "convolutions", "vb-lora")
    assert not hasattr(model, "unilora")
    attach(model, "convolutions", "vb-lora", exclude=r".*conv_dw|stem.*", length=4)


@pytest.mark.parametrize("method", METHODS)
def test_exported_where_that_is_exact(lively, tmp_path, method):
    adapter = moved(attach(lively("fused qkv"), "fused qkv", method))
    if method in DENSE:
        with pytest.raises(TargetError, match=r"makes whole weights, which no plain LoRA holds; merge the adapter"):
            adapter.export_lora(tmp_path / "lora")
    else:
        adapter.export_lora(tmp_path / "lora", base_model="base")
    assert (tmp_path / "lora").exists() == (method not in DENSE)


def test_what_a_method_does_not_take(tiny):
    model = tiny()
    with pytest.raises(SpecError, match=r"unknown method 'tied lora'; the nearest are tied-lora, "):
        unilora_timm.attach(model, method="tied lora")
    with pytest.raises(SpecError, match=r"the method 'fourierft' has no rank, got rank = 2; leave it out"):
        unilora_timm.attach(model, method="fourierft", rank=2)
    with pytest.raises(
        SpecError, match=r"blocks\.0\.attn\.qkv\.q: expected frequencies ≤ 1024, the entries of a weight"
    ):
        unilora_timm.attach(model, method="fourierft", frequencies=1025)
    assert not hasattr(model, "unilora")


def test_the_summary_names_the_method(tiny):
    text = attach(tiny(), "fused qkv", "vera").summary()
    assert text.startswith("θ_d: 160 numbers for D = 160 (vera) of 4 targets; head: 99; trained: 259 of ")
