"""DistributedDataParallel: two processes on halves of a batch train as one process on the whole."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import CASES, train
from small_models import adapted

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(tmp_path, case):
    commands = [[sys.executable, str(WORKER), str(rank), "2", str(tmp_path / "meeting"), case] for rank in range(2)]
    workers = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        alone = train(0, 1, case)
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert found[0]["theta_d"] == found[1]["theta_d"]
    assert [key.removeprefix("module.") for key in found[0]["keys"]] == alone["keys"]
    joint = [sum(pair) / 2 for pair in zip(found[0]["losses"], found[1]["losses"], strict=True)]
    assert joint == pytest.approx(alone["losses"], rel=1e-4)
    assert found[0]["theta_d"] == pytest.approx(alone["theta_d"], rel=1e-3, abs=1e-4)
    assert joint[-1] < joint[0]


def test_a_pickled_model_goes_to_another_process(tmp_path):
    model, _ = adapted()
    x = torch.randn(3, 6)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, x)))
    code = (
        "import pickle, sys, torch; sys.path.insert(0, sys.argv[2]); torch.set_num_threads(1);"
        "model, x = pickle.load(open(sys.argv[1], 'rb'));"
        "print(model(x).tolist(), model.unilora.model is model, sep='|')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle"), str(WORKER.parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    numbers, same = out.strip().split("|")
    torch.testing.assert_close(torch.tensor(json.loads(numbers)), model(x).detach())
    assert same == "True"
