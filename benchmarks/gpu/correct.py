"""The tests that need a GPU, and what they do not reach: the same bits as NumPy at sizes that matter."""

import copy
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SMOKE
from transformers import LlamaConfig, LlamaForCausalLM

import unilora_torch
from gpu.projection import WIDTHS, adapter_of
from gpu.rows import DEVICE, Row, Skip
from unilora_core import Layout, ProjectionSpec
from unilora_core.grouping import ALGORITHMS
from unilora_core.maps.gather import GATHERS

ROOT = Path(__file__).parents[2]
TESTS = {"tests/torch/test_*.py": "cuda", "tests/jax/test_conformance.py": ""}
"""Files → what is in the names of the tests that need a GPU; those of JAX run where JAX runs."""
if SMOKE:
    TESTS = {"tests/core/test_layout.py": ""}
FOR_A_DEVICE = re.compile(r"def test_\w+\([^)]*\bdevice\b|cuda")
"""What the files of such tests contain: others may need packages that are not there."""
SIZES = (4000,) if SMOKE else (10**5, 10**7, 2 * 10**8)
SLICE, GROUPS = 10**6, 10**5
"""Positions, and groups, that are compared from each end and the middle."""

WHOLE = 10**7
"""Up to so many positions all groupings are compared; beyond, those that are not cut into classes of factors."""

TOLERANCE = 2e-6
"""Of Pᵀy in float32 beside float64, in parts of Pᵀ|y|."""

OF_GRADIENT = {"float32": 1e-3, "bfloat16": 5e-2}
"""The distance of θ_d's gradient from the CPU's in float32, in parts of its length."""


def rows() -> list[Row]:
    """Tests, then bits and tolerances by framework and D, then gradients."""
    found = [Row({"check": "tests", "files": files}, partial(tests, files, words)) for files, words in TESTS.items()]
    for framework, check in {"torch": torch_equals_numpy, "jax": jax_equals_numpy}.items():
        found += [Row({"check": "bits", "framework": framework, "D": D}, partial(check, D)) for D in SIZES]
    found += [Row({"check": "deterministic", "D": D}, partial(deterministic, D)) for D in SIZES]
    found += [Row({"check": "computed", "width": width}, partial(computed, width)) for width in WIDTHS]
    return found + [Row({"check": "gradient", "dtype": dtype}, partial(gradient, dtype)) for dtype in OF_GRADIENT]


# ---- the tests -------------------------------------------------------------------------------------------------------


def tests(files: str, words: str) -> dict[str, Any]:
    """How many passed, failed and were skipped.

    Raises:
        AssertionError: one failed, or none ran.
    """
    if "jax" in files:
        jax_on_the_device()
    several = ["-n", "4", "--dist=worksteal"] if importlib.util.find_spec("xdist") and not SMOKE else []
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "default"]
    paths = [
        path
        for path in map(str, sorted(ROOT.glob(files)))
        if not words or FOR_A_DEVICE.search(Path(path).read_text("utf-8"))
    ]
    command = [sys.executable, "-m", "pytest", *quiet, *several, *paths, "-k", words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said.splitlines()[-1])}
    bad = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if bad or not counts.get("passed"):
        raise AssertionError("\n".join(bad[:20] or said.splitlines()[-20:]))
    return counts


# ---- the same bits as NumPy ------------------------------------------------------------------------------------------


def specs(D: int) -> Iterator[ProjectionSpec]:
    """A spec for each grouping, of eight factors, with groups of unequal size."""
    layout = Layout([(f"layers.{i}.q_proj.{factor}", (D // 8,)) for i in range(4) for factor in "AB"])
    for grouping in GATHERS if D <= WHOLE else ALGORITHMS:
        yield ProjectionSpec(layout, D // 16 + 1, seed=7, grouping=grouping)


def by_members(spec: ProjectionSpec) -> bool:
    """Whether members are compared: beyond `WHOLE` not where all positions would be sorted for them."""
    return spec.D <= WHOLE or spec.grouping == "balanced"


def slices(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Everything where that is little; else both ends and the middle."""
    if size <= 3 * most:
        yield 0, size
        return
    for start in (0, size // 2 - most // 2, size - most):
        yield start, start + most


def torch_equals_numpy(D: int) -> dict[str, Any]:
    """Groups, members, θ_d⁰ and θ_D in PyTorch; Pᵀ within the tolerance."""

    def project(theta: np.ndarray, groups: np.ndarray, scale: np.ndarray) -> torch.Tensor:
        return unilora_torch.project(*map(on_device, (theta, groups, scale)))

    def transpose(y: np.ndarray, groups: np.ndarray, scale: np.ndarray) -> torch.Tensor:
        return unilora_torch.project_transpose(*map(on_device, (y, groups, scale)))

    return equals_numpy(D, torch, DEVICE, lambda tensor: tensor.cpu().numpy(), project, transpose)


def on_device(array: np.ndarray) -> torch.Tensor:
    """A copy."""
    return torch.from_numpy(array).to(DEVICE)


def jax_equals_numpy(D: int) -> dict[str, Any]:
    """The same in JAX."""
    jax_on_the_device()
    import jax.numpy as jnp

    from unilora_jax.projection import project, project_transpose

    return equals_numpy(
        D,
        jnp,
        None,
        np.asarray,
        lambda *arrays: project(*map(jnp.asarray, arrays)),
        lambda *arrays: project_transpose(*map(jnp.asarray, arrays)),
    )


def jax_on_the_device() -> None:
    """Leave the row out where JAX is not there, or sees no GPU."""
    if not importlib.util.find_spec("jax"):
        raise Skip("jax is not installed")
    import jax

    if not SMOKE and jax.default_backend() != "gpu":
        raise Skip(f"jax {jax.__version__} sees no GPU, it would run on the {jax.default_backend()}")


def equals_numpy(
    D: int, xp: Any, device: Any, host: Callable[[Any], np.ndarray], project: Callable, transpose: Callable
) -> dict[str, Any]:
    """What was compared, and how far Pᵀ was from float64.

    Raises:
        AssertionError: with the grouping and what differs.
    """
    worst, names = 0.0, []
    for spec in specs(D):
        name = f"{spec.grouping}, D = {D}"
        for start, stop in slices(D, SLICE):
            same(f"{name}: groups", host(spec.groups(start, stop, xp=xp, device=device)), spec.groups(start, stop))
        for start, stop in slices(spec.d, GROUPS) if by_members(spec) else ():
            theirs, ours = spec.members(start, stop, xp=xp, device=device), spec.members(start, stop)
            for what, found, expected in zip(("offsets", "members"), theirs, ours, strict=True):
                same(f"{name}: {what}", host(found), expected)
        same(f"{name}: θ_d⁰", host(spec.init(xp=xp, device=device)), spec.init())
        rng, groups, scale = np.random.default_rng(0), spec.groups(), spec.scale()
        theta = rng.standard_normal(spec.d, np.float32)
        same(f"{name}: θ_D", host(project(theta, groups, scale)), (theta * scale)[groups])
        y = rng.standard_normal(D, np.float32)
        worst = max(worst, error(host(transpose(y, groups, scale)), y, groups, scale))
        assert worst < TOLERANCE, f"{name}: Pᵀ is {worst:.1e} from float64"
        names.append(spec.grouping)
    return {"groupings": names, "transpose_error": worst}


def same(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    """The same numbers, bit for bit, and the same dtype.

    Raises:
        AssertionError: with the first position that differs.
    """
    assert found.dtype == expected.dtype, f"{what}: expected {expected.dtype}, found {found.dtype}"
    assert found.shape == expected.shape, f"{what}: expected {expected.shape}, found {found.shape}"
    if not np.array_equal(found, expected):
        at = int(np.flatnonzero(found != expected)[0])
        raise AssertionError(f"{what}: at {at} expected {expected[at]}, found {found[at]}")


def error(found: np.ndarray, y: np.ndarray, groups: np.ndarray, scale: np.ndarray) -> float:
    """The largest distance of Pᵀy from float64, in parts of Pᵀ|y|; an empty group must be zero."""
    d = scale.size
    exact, absolute = (np.bincount(groups, weights, d) * scale for weights in (y.astype(float), np.abs(y, dtype=float)))
    assert not found[absolute == 0].any()
    return float((np.abs(found - exact) / np.where(absolute, absolute, 1)).max())


def deterministic(D: int) -> dict[str, Any]:
    """That Pᵀ has the same bits twice under `torch.use_deterministic_algorithms`; and whether without."""
    spec = ProjectionSpec(Layout([("m.A", (D,))]), 1000)
    groups, scale = (make(xp=torch, device=DEVICE) for make in (spec.groups, spec.scale))
    y = torch.randn(D, device=DEVICE)
    found = {}
    for flag in (True, False):
        torch.use_deterministic_algorithms(flag)
        first, second = (unilora_torch.project_transpose(y, groups, scale) for _ in range(2))
        found["deterministic" if flag else "atomic"] = torch.equal(first, second)
    assert found["deterministic"], "two runs of Pᵀ differ under torch.use_deterministic_algorithms(True)"
    return {f"same_bits_{name}": equal for name, equal in found.items()}


def computed(width: int) -> dict[str, Any]:
    """That computed groups give the factors of cached ones, bit for bit, and Pᵀ the same bits twice, near float64."""
    cached, adapter = (adapter_of(width, 1000, groups) for groups in ("cached", "computed"))
    theta, spec = torch.randn(1000, device=DEVICE), adapter.spec
    for each in (cached, adapter):
        each.theta_d.data.copy_(theta)
    for (name, factor), other in zip(cached.factors().items(), adapter.factors().values(), strict=True):
        assert torch.equal(factor, other), f"{name}: computed groups give other numbers than cached ones"
    y = torch.randn(spec.D, device=DEVICE)
    first, second = (gradient_by(adapter, y) for _ in range(2))
    same("Pᵀ of computed groups, twice", second, first)
    worst = error(first, y.cpu().numpy(), spec.groups(), spec.scale())
    assert worst < TOLERANCE, f"Pᵀ of computed groups is {worst:.1e} from float64"
    return {"D": spec.D, "how": adapter.summary().rpartition("; ")[2], "transpose_error": worst}


def gradient_by(adapter: unilora_torch.Adapter, y: torch.Tensor) -> np.ndarray:
    """θ_d's gradient where θ_D's is y."""
    factors = list(adapter.factors().values())
    parts = [part.view_as(factor) for part, factor in zip(y.split([f.numel() for f in factors]), factors, strict=True)]
    return torch.autograd.grad(factors, adapter.theta_d, parts)[0].cpu().numpy()


# ---- through a model -------------------------------------------------------------------------------------------------


def gradient(dtype: str) -> dict[str, Any]:
    """How far θ_d's gradient of a small Llama on the device is from the CPU's in float32.

    Raises:
        AssertionError: farther than the tolerance.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, num_key_value_heads=2))
    tokens = torch.randint(0, 512, (4, 64))
    there = copy.deepcopy(base).to(DEVICE, getattr(torch, dtype))
    expected, found = gradient_of(base, tokens), gradient_of(there, tokens.to(DEVICE))
    distance = float((found - expected).norm() / expected.norm())
    assert distance < OF_GRADIENT[dtype], f"θ_d's gradient in {dtype} is {distance:.1e} from the CPU's in float32"
    return {"distance": distance}


def gradient_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """∂loss/∂θ_d, on the CPU; every factor starts unlike zero, so that A and B have both a part in it."""
    adapter = unilora_torch.attach(model, "all-linear", exclude=["lm_head"], rank=8, start="paper")
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert adapter.theta_d.grad is not None
    return adapter.theta_d.grad.cpu()
