"""Training in several processes: what it gives is what one process gives with a batch as large as all of theirs."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from unilora_core import read_adapter

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("datasets")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, and joined by gloo")

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


@pytest.fixture
def folder(images, tmp_path):
    """Images, of which 11 are held out, so that two processes have unequal shares."""
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/val/red/0.png").unlink()
    return tmp_path / "images"


@pytest.fixture
def words(folder, vit_model):
    """21 images in batches of 10: in the last one is a single image, and none for the second process."""
    fixed = ("--data", folder, "--augment", "none", "--device", "cpu", "--epochs", 3, "--limit", 21, "--out", "run")
    return ("finetune", "vit", *vit_model, *fixed)


def results(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    epochs = [[row[name] for name in ("step", "train_loss", "loss", "accuracy")] for row in metrics["epochs"]]
    return metrics, losses, epochs, torch.from_numpy(read_adapter(folder / "adapter.safetensors").theta_d)


def assert_same(one, other, plan=("steps", "batch")):
    (a, *mine), (b, *others) = results(one), results(other)
    assert [a["plan"][name] for name in plan] == [b["plan"][name] for name in plan]
    assert a["status"] == b["status"] == "finished"
    assert mine[0] == pytest.approx(others[0], rel=1e-5)
    for x, y in zip(mine[1], others[1], strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    torch.testing.assert_close(mine[2], others[2], rtol=1e-4, atol=1e-6)
    predicted = [(folder / "predictions.csv").read_text().splitlines() for folder in (one, other)]
    assert [line.split(",")[:2] for line in predicted[0]] == [line.split(",")[:2] for line in predicted[1]]


def test_torchrun_with_two_processes_is_one_with_a_batch_twice_as_large(unilora, words, tmp_path):
    result = unilora(*words, "--batch-size", 10, "--max-grad-norm", 0.5)
    assert result.code == 0, result.err
    (tmp_path / "run").rename(tmp_path / "one")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "unilora_cli"]
    line += [str(word) for word in (*words, "--batch-size", 5, "--max-grad-norm", 0.5)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nplan\n") + done.stdout.startswith("plan\n") == 1  # the second process is quiet
    assert "10 examples per step = 5 × 2 processes\n" in done.stdout
    assert_same(tmp_path / "run", tmp_path / "one")


def test_batches_add_up_over_processes_and_accumulation(unilora, launch, words, tmp_path):
    assert unilora(*words, "--batch-size", 8, "--max-steps", 5).code == 0
    (tmp_path / "run").rename(tmp_path / "one")
    for result in launch(*words, "--batch-size", 2, "--accumulate", 2, "--max-steps", 5, processes=2):
        assert result.code == 0, result.err
    assert_same(tmp_path / "run", tmp_path / "one")
    assert results(tmp_path / "run")[0]["plan"]["steps"] == 5


def test_several_processes_that_are_killed_and_resumed(launch, words, tmp_path):
    random = ("--batch-size", 2, "--augment", "timm", "--drop-path", 0.2, "--mixup", 0.5)
    words = [word for word in words if word not in ("--augment", "none")] + [*random]
    assert [result.code for result in launch(*words, processes=2)] == [0, 0]
    (tmp_path / "run").rename(tmp_path / "whole")
    assert [result.code for result in launch(*words, processes=2, kill_at=8)] == [-9, -9]
    (refused,) = launch(*words, "--resume")
    assert "run: the interrupted run has processes = 2, this one 1; --resume with the same arguments" in refused.err
    first, second = launch(*words, "--resume", processes=2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert results(tmp_path / "run")[1] == results(tmp_path / "whole")[1]


def test_the_processes_draw_different_random_numbers(launch, words, tmp_path):
    assert [result.code for result in launch(*words, "--batch-size", 2, processes=2, kill_at=7)] == [-9, -9]
    (place,) = (tmp_path / "run" / "unilora-training").glob("checkpoint-6")
    generators = [torch.load(place / f"rng_state_{rank}.pth", weights_only=False) for rank in range(2)]
    for name in ("cpu", "python", "numpy"):
        one, other = (str(generator[name]) for generator in generators)
        assert one != other, name


def test_an_error_in_one_process_ends_the_others(launch, words, folder):
    broken = sorted((folder / "train" / "green").iterdir())[0]
    broken.write_bytes(b"no image")
    began = time.monotonic()
    results = launch(*words, "--batch-size", 2, processes=2)
    assert time.monotonic() - began < 60
    assert [result.code for result in results] == [1, 1]
    errors = "".join(result.err for result in results)
    assert f"{broken}: cannot be decoded as an image" in errors
    assert "another process of this run is gone; see its message" in errors
    assert "Traceback" not in errors


def test_an_error_in_all_processes_names_each(launch, words):
    first, second = launch(*words, "--device", "cuda:0", processes=2)
    assert (first.code, second.code) == (1, 1)
    message = "--device cuda:0: with torchrun this is auto, cuda (each process has its own GPU) or cpu.\n"
    assert first.err == f"unilora: error in process 0 of 2: {message}"
    assert second.err == f"unilora: error in process 1 of 2: {message}"


def test_shares_are_parts_of_the_same_batches(monkeypatch):
    from unilora_cli.tasks import adapting
    from unilora_cli.training import distributed

    def batches(rank, processes, size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "processes", lambda: processes)
        shares = adapting.Shares(11, size, seed=0)
        found = list(shares)
        assert len(found) == len(shares)
        return found

    whole = batches(0, 1, 5)
    assert [len(batch) for batch in whole] == [5, 5, 1]
    parts = [batches(rank, 5, 1) for rank in range(5)]
    assert [sorted(itertools.chain(*shares)) for shares in zip(*parts, strict=True)] == [
        sorted(batch) for batch in whole
    ]
    assert parts[1][2] == []


@pytest.fixture
def pairs(llama, sentences, tmp_path):
    """Of 40 pairs 13 to train on, in batches of 4 or 2 × 2: in the last one is none for the second process."""
    rows = [{"prompt": "the film", "response": f"{text} {i}"} for i, (text, _) in enumerate(sentences)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = ("--length", 24, "--device", "cpu", "--epochs", 3, "--limit", 13, "--out", "run")
    return ("finetune", "lm", "--model", llama, "--data", tmp_path / "pairs.jsonl", *fixed)


def assert_same_losses(one, other):
    def found(folder):
        epochs = json.loads((folder / "metrics.json").read_text())["epochs"]
        with (folder / "metrics.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        scores = [value for row in epochs for name, value in row.items() if name != "seconds"]
        return losses, scores, torch.from_numpy(read_adapter(folder / "adapter.safetensors").theta_d)

    (losses, scores, theta), (others, known, wanted) = found(one), found(other)
    assert losses == pytest.approx(others, rel=1e-5)
    assert scores == pytest.approx(known, rel=1e-5)
    torch.testing.assert_close(theta, wanted, rtol=1e-4, atol=1e-6)


WAYS = [(), ("--packing",), ("--gradient-checkpointing",), ("--metric", "exact-match", "--max-new-tokens", 3)]


@pytest.mark.parametrize("more", WAYS, ids=lambda more: more[0] if more else "plain")
def test_a_base_in_parts_gives_the_losses_of_a_whole_one(unilora, launch, pairs, tmp_path, more):
    assert unilora(*pairs, *more, "--batch-size", 4).code == 0
    (tmp_path / "run").rename(tmp_path / "one")
    first, second = launch(*pairs, *more, "--batch-size", 2, "--shard", processes=2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    own, whole = (int(word.replace(",", "")) for word in first.out.split("this process holds ")[1].split()[:3:2])
    assert 0.4 * whole < own < 0.6 * whole
    assert_same_losses(tmp_path / "run", tmp_path / "one")


def test_a_run_in_parts_that_is_killed_goes_on_in_parts_or_whole(launch, pairs, tmp_path):
    words = (*pairs, "--batch-size", 2)
    assert [result.code for result in launch(*words, processes=2)] == [0, 0]
    (tmp_path / "run").rename(tmp_path / "whole")
    for more in ((), ("--shard",)):
        assert [result.code for result in launch(*words, "--shard", processes=2, kill_at=5)] == [-9, -9]
        first, second = launch(*words, *more, "--resume", processes=2)
        assert (first.code, second.code) == (0, 0), first.err + second.err
        assert_same_losses(tmp_path / "run", tmp_path / "whole")
        shutil.rmtree(tmp_path / "run")


def test_parts_that_cannot_be_made(unilora, pairs, tmp_path):
    assert (
        "--shard parts the base between processes, and this is one; start it with torchrun."
        in unilora(*pairs, "--shard").err
    )
    pytest.importorskip("bitsandbytes")
    assert "--load-in-4bit and --shard exclude each other" in unilora(*pairs, "--shard", "--load-in-4bit").err
    assert not (tmp_path / "run").exists()
