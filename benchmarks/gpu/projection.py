"""P and Pᵀ over D and d, beside a copy of as many bytes, and beside what PEFT's UniLora computes layer by layer.

P reads a group and writes a number for each position, Pᵀ reads both, and θ_d stays in the cache: 8 bytes a position
each, as many as a copy of D floats moves. The positions are those of A and B of 224 square layers, r = 16, without
weights. PEFT's lines are a gather by int64 indices and a product with a float32 scale for each factor, and what
autograd makes of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import SMOKE
from torch import Tensor, nn

import unilora_torch
from gpu.rows import DEVICE, Row
from gpu.timing import Cases, milliseconds
from unilora_core import Layout, ProjectionSpec

LAYERS, RANK = (4, 16) if SMOKE else (224, 16)
WIDTHS = (300,) if SMOKE else (1400, 7000, 28_000)
"""Of the layers: D is 10, 50 and 200 million."""
TRAINED = (None, 1000) if SMOKE else (None, 524_288, 65_536)
"""d; None for D/16."""
BYTES = 8


def rows() -> list[Row]:
    """D × d."""
    sizes = {width: LAYERS * 2 * RANK * width for width in WIDTHS}
    points = [(width, D, d or D // 16) for width, D in sizes.items() for d in TRAINED]
    return [Row({"D": D, "d": d}, partial(point, width, D, d)) for width, D, d in points]


def point(width: int, D: int, d: int) -> dict[str, Any]:
    """Milliseconds of each case, and GB/s where the bytes are counted as above."""
    ms = milliseconds(direct(ProjectionSpec(Layout([("m.A", (D,))]), d)) | attached(width, d))
    directions = {name: 2 if "and" in name else 1 for name in ms}
    return {
        name: {"ms": time, "GB/s": BYTES * D * directions[name] / time / 1e6, "to_copy": time / ms["copy"]}
        for name, time in ms.items()
    }


def direct(spec: ProjectionSpec) -> Cases:
    """A copy; P and Pᵀ of the whole of θ_D, each by itself, in every way; and PEFT's lines."""
    groups, scale = (make(xp=torch, device=DEVICE) for make in (spec.groups, spec.scale))
    theta = spec.init(xp=torch, device=DEVICE).requires_grad_()
    y, target = torch.randn(spec.D, device=DEVICE), torch.empty(spec.D, device=DEVICE)
    _, positions = spec.members(xp=torch, device=DEVICE)

    @torch.no_grad()
    def project() -> Tensor:
        return unilora_torch.project(theta, groups, scale)

    return {
        "copy": lambda: target.copy_(y),
        "P": project,
        "P, to bfloat16": lambda: project().bfloat16(),
        "Pᵀ, atomic": lambda: unilora_torch.project_transpose(y, groups, scale),
        "Pᵀ, deterministic": lambda: deterministic(y, groups, scale),
        "Pᵀ, by members": lambda: by_members(y, positions, scale),
        **peft_lines(theta, groups, scale, y),
    }


def attached(width: int, d: int) -> Cases:
    """All factors and the gradient of θ_d, as a training step has them, for each way to have groups."""
    return {f"P and Pᵀ, groups {groups}": both_ways(adapter_of(width, d, groups)) for groups in ("cached", "computed")}


def adapter_of(width: int, d: int, groups: str) -> unilora_torch.Adapter:
    """An adapter of square layers, each weight of which is one number seen as many."""
    layers = [nn.Linear(width, width, bias=False, device="meta") for _ in range(LAYERS)]
    for layer in layers:
        layer.weight = nn.Parameter(torch.zeros(1, device=DEVICE).expand(width, width), requires_grad=False)
    return unilora_torch.attach(nn.Sequential(*layers), rank=RANK, d=d, groups=groups)


def both_ways(adapter: unilora_torch.Adapter) -> Callable[[], None]:
    """A function that makes all factors, and the gradient of θ_d of given ones of theirs."""
    upstream = [torch.randn(shape, device=DEVICE) for shape in adapter.spec.layout.shapes.values()]

    def run() -> None:
        adapter.theta_d.grad = None
        torch.autograd.backward(list(adapter.factors().values()), upstream)

    return run


def deterministic(y: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """Pᵀ under PyTorch's flag."""
    torch.use_deterministic_algorithms(True)
    try:
        return unilora_torch.project_transpose(y, groups, scale)
    finally:
        torch.use_deterministic_algorithms(False)


def by_members(y: Tensor, positions: Tensor, scale: Tensor) -> Tensor:
    """Pᵀ as a gather and sums over rows: of ``balanced``, where the first D mod d groups have a member more."""
    more, n = positions.numel() % scale.numel(), positions.numel() // scale.numel()
    gathered = y.index_select(0, positions)
    longer, rest = gathered[: more * (n + 1)], gathered[more * (n + 1) :]
    return torch.cat([longer.view(more, n + 1).sum(1), rest.view(-1, n).sum(1)]) * scale


def peft_lines(theta: Tensor, groups: Tensor, scale: Tensor, y: Tensor) -> Cases:
    """θ_d[indices]·scales of each factor, forward, and with its gradient."""
    indices = [part.long() for part in groups.chunk(2 * LAYERS)]
    scales, upstream = [scale[index] for index in indices], y.chunk(2 * LAYERS)

    def project() -> list[Tensor]:
        return [theta[index] * each for index, each in zip(indices, scales, strict=True)]

    def both() -> None:
        theta.grad = None
        torch.autograd.backward(project(), upstream)

    return {"PEFT's P": torch.no_grad()(project), "PEFT's P and Pᵀ": both}
