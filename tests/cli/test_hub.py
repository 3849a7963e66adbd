"""`--push-to-hub`: what a run uploads, through `huggingface_hub` itself and a stand-in for its server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = """
import contextlib, io, json, os, sys
from unilora_cli.main import main

answers = []
for token, words in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token or os.environ["HF_TOKEN"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    answers.append((code, out.getvalue(), err.getvalue()))
json.dump(answers, sys.stdout)
"""


def runs(hub, folder, *each):
    """(exit code, output, errors) of each (token, words), one after the other in one new process."""
    said = json.dumps([(token, [str(word) for word in words]) for token, words in each])
    environment = os.environ | hub.environment(folder / "cache")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, said]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_run_goes_to_the_hub_and_says_so(hub, bert, tsv, tmp_path):
    words = ["finetune", "text", "--model", bert, "--data", tsv, "--device", "cpu", "--epochs", 1]
    hub.files["me/mine"] = {"README.md": b"My own words."}
    first, good, mine, full, unknown = runs(
        hub,
        tmp_path,
        ("", [*words, "--out", "first", "--push-to-hub", "good", "--private", "--seed", "1"]),
        ("", [*words, "--out", "good", "--push-to-hub", "good"]),
        ("", [*words, "--out", "mine", "--push-to-hub", "me/mine"]),
        ("", [*words, "--out", "full", "--push-to-hub", "me/full"]),
        ("hf_wrong", [*words, "--out", "unknown", "--push-to-hub", "me/unknown"]),
    )
    assert good[0] == 0, good[2]
    assert "/me/good/commit/" in good[1]
    files = hub.files["me/good"]
    assert files.keys() == {"README.md", "adapter.safetensors", "loss.png", "metrics.csv", "summary.csv"}
    assert files["adapter.safetensors"] == (tmp_path / "good" / "adapter.safetensors").read_bytes()
    assert hub.private == {"me/good"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: unilora\n")
    (loss,) = re.findall(r"held-out loss *(\S+)", good[1])
    assert f"| held-out loss | {loss} |" in card  # of this run, not of the first
    assert loss not in first[1]
    assert hub.files["me/mine"]["README.md"] == b"My own words."
    assert mine[0] == 0, mine[2]
    assert "hf download me/good adapter.safetensors" in card
    assert str(Path(bert).parent) not in card

    assert full[0] == 1
    where = Path("full", "adapter.safetensors")
    assert f"the adapter is in {where}, but this could not be written: me/full on the hub" in full[2]
    assert "storage limit reached" in full[2]
    assert (tmp_path / where).is_file()

    assert unknown[0] == 1
    assert "--push-to-hub me/unknown: the hub does not take it" in unknown[2]
    assert "Invalid credentials" in unknown[2]
    assert not (tmp_path / "unknown" / "metrics.csv").exists()  # before anything was trained


def test_without_a_hub_nothing_is_trained(unilora, bert, tsv, tmp_path):
    words = ("finetune", "text", "--model", bert, "--data", tsv, "--out", "run")
    result = unilora(*words, "--push-to-hub", "me/adapter")
    assert result.code == 1
    assert "--push-to-hub me/adapter: the hub does not take it: " in result.err
    assert "HF_HUB_OFFLINE" in result.err
    result = unilora(*words, "--private")
    assert "--private is for a repository on the hub: --push-to-hub USER/NAME." in result.err
    assert not list(tmp_path.glob("run/*"))
