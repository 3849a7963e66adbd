"""Eight host devices: the losses of one, and θ_D is nowhere gathered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parent / "sharding_worker.py"
WAYS = [f"{parts}-{mode} cached" for parts in ("data", "fsdp", "tensor", "both") for mode in ("auto", "explicit")]
WAYS += ["both-auto computed", "both-explicit computed", "shard_map computed"]
OF_MEMBERS = ["both-auto members", "both-explicit members", "shard_map members"]
"""The gradient as sums over members; with automatic axes all of it comes to each device for that."""
METHODS = {"scattered": 24, "tied-lora": 1236, "lora-xs": 112, "gaussian": 64, "vb-lora": 2144}
"""Other methods, and their d: each kind of map and of frame that has a path of its own."""
OF_METHODS = [f"both-explicit {method}" for method in METHODS]
OF_METHODS += ["both-auto gaussian", "both-auto vb-lora", "shard_map gaussian", "shard_map tied-lora"]
RANK, TOKENS, SMALL_D = 4, 5, 256


def run(*ways):
    """Every way in one process: way → losses and collectives."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(WORKER), *ways]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs():
    return run("one computed", *WAYS, *OF_MEMBERS)


@pytest.fixture(scope="module")
def of_methods():
    return run(*(f"one {method}" for method in METHODS), *OF_METHODS)


def of_factors(shape):
    """Whether an array may be (a part of) A or B: the rank is among its sizes, the five tokens are not."""
    return RANK in shape and TOKENS not in shape


def test_one_device_learns(runs):
    losses = runs["one computed"]["losses"]
    assert losses[-1] < losses[0] - 0.05
    assert runs["one computed"]["collectives"] == []


@pytest.mark.parametrize("way", [*WAYS, *OF_MEMBERS])
def test_the_losses_are_those_of_one_device(runs, way):
    np.testing.assert_allclose(runs[way]["losses"], runs["one computed"]["losses"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", [*WAYS, *OF_MEMBERS[1:]])
def test_theta_D_is_nowhere_gathered(runs, way):
    gathered = [shape for kind, shapes in runs[way]["collectives"] if kind != "all-reduce" for shape in shapes]
    assert [shape for shape in gathered if of_factors(shape)] == []


@pytest.mark.parametrize("way", WAYS)
def test_theta_d_is_summed_over_d_numbers(runs, way):
    """No array that is summed is larger than d, but for activations, which the model's own products need."""
    summed = [shape for kind, shapes in runs[way]["collectives"] if kind == "all-reduce" for shape in shapes]
    assert [SMALL_D] in summed or way.startswith(("data", "fsdp"))  # there every device has all of A and B
    assert [s for s in summed if np.prod(s) > SMALL_D and TOKENS not in s] == []


@pytest.mark.parametrize("way", ["shard_map computed", "shard_map members"])
def test_inside_shard_map_the_only_sums_are_the_gradient_and_the_loss(runs, way):
    shapes = sorted(shape for kind, shapes in runs[way]["collectives"] for shape in shapes)
    assert shapes == [[], [SMALL_D]]
    assert {kind for kind, _ in runs[way]["collectives"]} == {"all-reduce"}


def test_blocks_of_a_fused_weight_and_merging_on_an_explicit_mesh(runs):
    assert max(runs["blocks"]) < 1e-5


def test_the_test_can_see_a_gather(runs):
    """The weights that FSDP split are gathered on the explicit mesh, since the model asks for it."""
    kinds = {kind for kind, _ in runs["fsdp-explicit cached"]["collectives"]}
    assert "all-gather" in kinds


@pytest.mark.parametrize("way", OF_METHODS)
def test_other_methods_have_the_losses_of_one_device(of_methods, way):
    expected = of_methods[f"one {way.split()[1]}"]["losses"]
    assert expected[-1] < expected[0] - 0.003
    np.testing.assert_allclose(of_methods[way]["losses"], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["gaussian", "tied-lora"])
def test_inside_shard_map_other_methods_sum_d_numbers_too(of_methods, method):
    shapes = [shape for _, shapes in of_methods[f"shard_map {method}"]["collectives"] for shape in shapes]
    assert sorted(shapes) == [[], [METHODS[method]]]
