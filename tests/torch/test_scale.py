"""What several processes send each other is d and the heads, and a model on the meta device is planned as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from unilora_core.frames import Sizes
from unilora_core.methods import plan_spec
from unilora_torch import find_targets

WORKER = Path(__file__).with_name("scale_worker.py")


@pytest.fixture(scope="module", params=[2, 4])
def handed_over(request, tmp_path_factory):
    """Way of training → what each process gave to collectives in a step, at two ranks and the same d."""
    if sys.platform == "win32" or not torch.distributed.is_gloo_available():
        pytest.skip("processes are forked, and joined by gloo")
    folder = tmp_path_factory.mktemp("scale")
    command = [sys.executable, str(WORKER), str(request.param), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]
    assert all(each == found[0] for each in found)
    return found[0]


def test_ddp_adds_up_d_numbers_and_those_of_the_head(handed_over):
    narrow, wide = handed_over["DDP"]
    assert narrow["D"] < wide["D"]
    assert narrow["trained"] == wide["trained"]
    for each in (narrow, wide):
        assert {name: size for name, size in each.items() if name not in ("D", "trained")} == {
            "allreduce": each["trained"],
        }


def test_fsdp2_scatters_d_numbers_and_those_of_the_head(handed_over):
    """What it gathers is the base's, and θ_d: as much whatever D."""
    narrow, wide = ({name: size for name, size in each.items() if name != "D"} for each in handed_over["FSDP2"])
    assert narrow == wide
    assert wide["reduce_scatter_base"] == wide["trained"]
    assert wide.keys() == {"trained", "reduce_scatter_base", "allgather_base"}


def test_a_model_of_405_billion_parameters_is_planned_on_the_meta_device():
    """Nothing is made but names and sizes: the model has no values, and a table of groups would be 2.5 GB."""
    sides = {"q": (16384, 16384), "k": (16384, 1024), "v": (16384, 1024), "o": (16384, 16384)}
    sides |= {"gate": (16384, 53248), "up": (16384, 53248), "down": (53248, 16384)}
    with torch.device("meta"):
        blocks = (
            nn.ModuleDict({name: nn.Linear(*each, bias=False) for name, each in sides.items()}) for _ in range(126)
        )
        model = nn.Sequential(*blocks)
    assert sum(each.numel() for each in model.parameters()) > 400e9
    found = find_targets(model, "all-linear")
    spec = plan_spec([(each.name, Sizes(each.in_features, each.out_features)) for each in found], rank=16)
    assert (len(found), spec.D, spec.d) == (882, 623_443_968, 9_741_312)
