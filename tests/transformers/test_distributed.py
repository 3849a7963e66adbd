"""Two processes on halves of each batch train as one on the whole: DDP and FSDP2, by hand and in the Trainer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from distributed_worker import STEPS, run

WORKER = Path(__file__).with_name("distributed_worker.py")
EXACT = ["ddp", "fsdp", "fsdp checkpointing", "trainer ddp", "trainer fsdp", "trainer fsdp efficient"]
ROUNDED = ["fsdp bf16", "trainer fsdp bf16"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found in each case, from one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(folder), *EXACT, *ROUNDED, "error"]
    workers = []
    for rank in ("0", "1"):
        env = os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""}
        log = (folder / f"log-{rank}").open("w")
        workers.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], (folder / "log-0").read_text()[-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {"loop": run(0, 1, folder, "alone"), "trainer": run(0, 1, folder, "trainer")}


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_train_as_one(found, alone, kind):
    one, key = (alone["trainer"], "whole") if "trainer" in kind else (alone["loop"], "losses")
    for process in found:
        two = process[kind]
        assert len(two[key]) == STEPS
        assert two[key] == pytest.approx(one[key], abs=1e-5)
        assert two["theta_d"] == pytest.approx(one["theta_d"], abs=1e-3)
    assert found[0][kind]["theta_d"] == found[1][kind]["theta_d"]
    assert one[key][-1] < one[key][0]


@pytest.mark.parametrize("kind", ROUNDED)
def test_mixed_precision_leaves_theta_d_alone(found, alone, kind):
    """A unit of its own keeps float32 while the layers compute in bfloat16."""
    one, key = (alone["trainer"], "whole") if "trainer" in kind else (alone["loop"], "losses")
    assert found[0][kind][key] == pytest.approx(one[key], rel=1e-2)
    moved = torch.tensor(found[0][kind]["theta_d"]), torch.tensor(one["theta_d"])
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.99
    assert not torch.equal(moved[0], moved[0].bfloat16().float())


def test_mixed_precision_over_theta_d_is_refused(found):
    for process in found:
        error = process["error"]["error"]
        assert error.startswith("ValuesError: theta_d is used as torch.bfloat16, expected float32")
        assert "fully_shard(model.unilora)" in error


@pytest.mark.parametrize("kind", [kind for kind in EXACT + ROUNDED if "trainer" in kind])
def test_resuming_goes_on_exactly(found, kind):
    assert found[0][kind]["again"] == found[0][kind]["whole"]


@pytest.mark.parametrize("kind", [kind for kind in EXACT + ROUNDED if "trainer" in kind])
def test_a_checkpoint_is_whole(found, kind):
    """One process has gathered what it writes."""
    case = found[0][kind]
    assert case["saved"] == case["theta_d"]
    assert {"adapter.safetensors", "model.safetensors"} <= set(case["files"])
    assert "config.json" not in case["files"]


def test_shards_are_saved_whole_and_loaded_as_shards(found):
    for process in found:
        case = process["fsdp"]
        assert case["written"] == case["theta_d"]
        assert case["class"] == "LlamaForCausalLM"
        assert case["same"]
