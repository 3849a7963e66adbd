"""The Triton kernels against the table, on CUDA, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

A process of its own: how a kernel runs is settled when it is defined.
"""

import itertools
import sys

import numpy as np
import torch

from unilora_core import Layout, ProjectionSpec
from unilora_torch import computed
from unilora_torch.gather import Gather, scaled
from unilora_torch.kernels import gather as kernels

LAYOUT = Layout([("v.A", (3, 40)), ("v.B", (50, 3)), ("q.A", (1, 1100)), ("q.B", (7, 3))])
"""Factors shorter and longer than a tile."""

SPECS = {
    "paper": ProjectionSpec(LAYOUT, 100, seed=2**64 - 1),
    "identity": ProjectionSpec(LAYOUT, 333, seed=1, start="identity"),
    "two-parts": ProjectionSpec(LAYOUT, 20, seed=2, start="identity"),
    "all": ProjectionSpec(LAYOUT, LAYOUT.size, seed=3),
    "walks": ProjectionSpec(Layout([("m.A", (7,))]), 3, seed=2**64 - 1),
    "one": ProjectionSpec(Layout([("m.A", (130,))]), 1, seed=4),
    "grown": ProjectionSpec(LAYOUT, 40, seed=5, options=(("first_d", 10),)),
    "unnormalised": ProjectionSpec(LAYOUT, 100, seed=6, grouping="unnormalised"),
}


def check_numbers(name: str, spec: ProjectionSpec, device: torch.device) -> None:
    """P, whole and of two slices in another order, bit by bit; of the first spec in three dtypes."""
    table, theta_d = Gather.of(spec).to(device), torch.linspace(-1, 1, spec.d, device=device)
    middle = spec.D // 3
    for spans in (((0, spec.D),), ((middle, spec.D), (0, middle))):
        wanted = table(theta_d, [slice(*span) for span in spans])
        for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 3 if name == "paper" else 1]:
            out = torch.empty(spec.D, dtype=dtype, device=device)
            values = scaled(theta_d, table.scale, table.origin)
            kernels.project(values, kernels.permuted(spec, device), kernels.tiles(spec, spans, device), out)
            if dtype == torch.bfloat16 and device.type == "cpu":  # Triton's interpreter cuts the last bits off
                assert torch.allclose(out.float(), wanted, rtol=2**-7, atol=0), (name, dtype)
            else:
                assert torch.equal(out, wanted.to(dtype)), (name, dtype)


def check_sums(name: str, spec: ProjectionSpec, device: torch.device) -> None:
    """Pᵀ: the members of each group in their order, 64 at a time, in float32, bit by bit."""
    offsets, positions = spec.members()
    scale = Gather.of(spec).scale
    for dtype in (torch.float32, torch.bfloat16)[: 2 if name == "identity" else 1]:
        y = torch.from_numpy(np.random.default_rng(0).standard_normal(spec.D).astype(np.float32)).to(dtype)
        found = kernels.project_transpose(y.to(device), kernels.permuted(spec, device), scale.to(device))
        values = y.float().numpy()
        wanted = [ordered_sum(values[positions[a:b]]) for a, b in itertools.pairwise(offsets)]
        assert np.array_equal(found.cpu().numpy(), np.array(wanted, np.float32) * scale.numpy()), (name, dtype)


def ordered_sum(values: np.ndarray) -> np.float32:
    """Of 64 at a time, then of those sums; one after the other."""
    sums = [added(values[start : start + kernels.MEMBERS]) for start in range(0, len(values), kernels.MEMBERS)]
    return added(np.array(sums, np.float32))


def added(values: np.ndarray) -> np.float32:
    """Float32 additions, from the first to the last."""
    total = np.float32(0)
    for value in values:
        total += value
    return total


def check_gradients(device: torch.device) -> None:
    """θ_d → θ_D as `Computed` does it, forwards and backwards, in the place of the core's blocks."""
    spec, spans = SPECS["identity"], [slice(0, LAYOUT.size)]
    computed.kernels_for = lambda *_: kernels  # on the CPU, too
    y, found = torch.randn(spec.D, device=device), []
    for kind in (computed.Computed, Gather):
        theta_d = torch.linspace(-1, 1, spec.d, device=device, requires_grad=True)
        theta_D = kind.of(spec).to(device)(theta_d, spans)
        found.append((theta_D, torch.autograd.grad(theta_D, theta_d, y)[0]))
    (ours, grad), (theirs, wanted) = found
    assert torch.equal(ours, theirs)
    assert torch.allclose(grad, wanted, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    where = torch.device(sys.argv[1])
    for title, each in SPECS.items():
        check_numbers(title, each, where)
        check_sums(title, each, where)
    check_gradients(where)
    sys.stdout.write(f"{len(SPECS)} specs on {where.type}")
