"""Maps beyond the gather, and ΔW in blocks: each against the core's whole θ_D under autograd, with nothing kept."""

import json

import pytest
import torch

from unilora_core import project
from unilora_core.frames import Sizes
from unilora_core.methods import plan_spec
from unilora_torch import streamed as streaming
from unilora_torch.computed import Computed
from unilora_torch.generic import Mapped
from unilora_torch.streamed import Place, streamed

TARGETS = [(f"layers.{i}.{name}", Sizes(16, 24)) for i in range(2) for name in "qv"]
OPTIONS = {
    "lora": {},
    "vera": {"rank": 8},
    "vb-lora": {"options": {"vectors": 8, "length": 8}},
    "fastfood": {},
    "gaussian": {},
    "fourierft": {"options": {"frequencies": 20}},
    "tied-lora": {},
}


def mapped(method, **changes):
    spec = plan_spec(TARGETS, method=method, **OPTIONS[method] | changes)
    theta_d = torch.from_numpy(spec.init())
    return spec, Mapped.of(spec), (theta_d + 0.1 * torch.randn(spec.d)).requires_grad_()


@pytest.mark.parametrize("method", OPTIONS)
def test_numbers_and_gradients_are_the_cores(method):
    spec, numbers, theta_d = mapped(method)
    found, expected = numbers(theta_d, [slice(0, spec.D)]), project(spec, theta_d)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    y = torch.randn(spec.D)
    mine, theirs = (torch.autograd.grad(theta_D @ y, theta_d)[0] for theta_D in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", OPTIONS)
def test_slices_are_those_of_the_whole(method):
    spec, numbers, theta_d = mapped(method)
    spans = [slice(17, 40), slice(5, 17), slice(spec.D - 3, spec.D)]
    whole = project(spec, theta_d)
    expected = torch.cat([whole[at] for at in spans])
    found = numbers(theta_d, spans)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    y = torch.randn(len(found))
    mine, theirs = (torch.autograd.grad(theta_D @ y, theta_d)[0] for theta_D in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "fastfood", "gaussian", "tied-lora"])
def test_what_starts_at_zero_does(method):
    spec, numbers, _ = mapped(method)
    theta_D = numbers(torch.from_numpy(spec.init()), [slice(0, spec.D)])
    parts = spec.layout.split(theta_D)
    assert {name: bool(part.any()) for name, part in parts.items()} == {
        name: not spec.shifted(name) for name in spec.layout.shapes
    }


@pytest.mark.parametrize("method", OPTIONS)
def test_no_map_keeps_anything_among_the_saved_tensors(method):
    """Or gradient checkpointing would count other tensors in the second pass than in the first."""
    spec, numbers, theta_d = mapped(method)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        numbers(theta_d, [slice(0, spec.D)])
    assert not saved


@pytest.mark.parametrize("method", OPTIONS)
def test_many_vectors_at_once(method):
    spec, numbers, theta_d = mapped(method)
    both = torch.stack([theta_d.detach(), 2 * theta_d.detach()])
    found = torch.vmap(lambda theta: numbers(theta, [slice(0, spec.D)]))(both)
    for row, theta in zip(found, both, strict=True):
        torch.testing.assert_close(row, numbers(theta, [slice(0, spec.D)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", OPTIONS)
def test_autocast_changes_no_number(method):
    """θ_d and P are float32, whatever the model computes in."""
    spec, numbers, theta_d = mapped(method)
    y = torch.randn(spec.D)

    def run():
        found = numbers(theta_d, [slice(0, spec.D)])
        return found, torch.autograd.grad(found @ y.to(found.dtype), theta_d)[0]

    wanted = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = numbers(theta_d, [slice(0, spec.D)])
    assert torch.equal(found, wanted[0])
    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.autograd.grad(found, theta_d, y)[0]
    torch.testing.assert_close(gradient, wanted[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [7, 50, 2**20])
@pytest.mark.parametrize("grouping", ["balanced", "iid", "local", "unnormalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_streamed_update_is_that_of_the_whole_matrix(monkeypatch, block, grouping, dtype):
    monkeypatch.setattr(streaming, "BLOCK", block)
    spec = plan_spec(TARGETS, method="gpart", d=48, grouping=grouping)
    theta_d = torch.randn(spec.d, requires_grad=True)
    x = torch.randn(5, 3, 16, dtype=dtype, requires_grad=True)
    place = Place(24 * 16, 24, 16)
    found = streamed(x, theta_d * torch.from_numpy(spec.scale()), json.dumps(spec.to_json()), place)
    W = project(spec, theta_d)[24 * 16 : 2 * 24 * 16].view(24, 16)
    expected = x @ W.to(dtype).T
    close = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)
    y = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad((found * y).sum(), (x, theta_d)),
        torch.autograd.grad((expected * y).sum(), (x, theta_d)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("start", ["identity", "paper", "zero"])
def test_a_streamed_update_is_measured_from_where_it_starts(start):
    spec = plan_spec(TARGETS, method="gpart", d=48, start=start)
    theta_d = torch.from_numpy(spec.init()) + torch.randn(spec.d)
    numbers, x = Computed.of(spec), torch.randn(5, 16)
    expected = project(spec, theta_d)[24 * 16 : 2 * 24 * 16]
    torch.testing.assert_close(numbers(theta_d, [slice(24 * 16, 2 * 24 * 16)]), expected)
    found = numbers.product(x, theta_d, Place(24 * 16, 24, 16))
    torch.testing.assert_close(found, x @ expected.view(24, 16).T, rtol=1e-5, atol=1e-5)


def test_a_streamed_update_keeps_no_matrix():
    spec = plan_spec(TARGETS, method="gpart")
    x, table = torch.randn(2, 16, requires_grad=True), torch.randn(spec.d, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        streamed(x, table, json.dumps(spec.to_json()), Place(0, 24, 16))
    assert sorted(tensor.numel() for tensor in saved) == sorted([x.numel(), table.numel()])
