"""The conformance suite on unilora_torch's own projection: on the CPU, and on CUDA where there is one."""

import functools

import pytest
import torch

import unilora_core
import unilora_torch
from unilora_core.testing import Backend, cases
from unilora_torch.gather import Gather
from unilora_torch.generic import Mapped

pytestmark = pytest.mark.traces


def backend(device):
    def project(spec):
        if spec.map.groups is None:
            numbers = Mapped.of(spec).to(torch.device(device))
            return lambda theta_d: numbers(theta_d, [slice(0, spec.D)])
        groups, scale = Gather.of(spec).groups.to(device), spec.scale(xp=torch, device=device)
        origin = spec.init(xp=torch, device=device) if spec.start == "identity" else None
        return lambda theta_d: unilora_torch.project(theta_d, groups, scale, origin)

    def project_transpose(spec):
        if spec.map.groups is None:
            return functools.partial(unilora_core.project_transpose, spec)
        groups, scale = torch.from_numpy(spec.groups()).to(device), spec.scale(xp=torch, device=device)
        return lambda y: unilora_torch.project_transpose(y, groups, scale)

    return Backend(
        name=f"unilora_torch-{device}",
        xp=torch,
        device=device,
        groups=lambda spec, start, stop: torch.from_numpy(spec.groups(start, stop)).to(device),
        project=project,
        project_transpose=project_transpose,
        asnumpy=lambda tensor: tensor.cpu().numpy(),
        pullback=pullback,
        compile=compiled,
        compiled=("project",),  # torch.compile cannot trace array_api_compat, in which the other maps are written
    )


def pullback(function, x, y):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, y)[0]


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("case", [case for device in DEVICES for case in cases(backend(device))], ids=str)
def test_conformance(case):
    case()
