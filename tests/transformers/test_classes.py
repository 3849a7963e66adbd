"""A sample of the sweep over the model classes of transformers (`benchmarks/transformers_classes.py`)."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch

import unilora_torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALIVE = {  # class → its model type, as various as there are
    "BertForMultipleChoice": "bert",
    "BartForConditionalGeneration": "bart",
    "BigBirdForCausalLM": "big_bird",
    "CLIPModel": "clip",
    "DebertaV2ForMaskedLM": "deberta-v2",
    "HieraForImageClassification": "hiera",
    "LlamaForCausalLM": "llama",
    "PaliGemmaForConditionalGeneration": "paligemma",
    "MambaForCausalLM": "mamba",
    "PatchTSTModel": "patchtst",
    "PvtV2ForImageClassification": "pvt_v2",
    "SegformerForImageClassification": "segformer",
    "Speech2TextForConditionalGeneration": "speech_to_text",
    "SwinModel": "swin",
    "T5ForConditionalGeneration": "t5",
    "VideoMAEForVideoClassification": "videomae",
    "Wav2Vec2ForCTC": "wav2vec2",
    "WhisperForConditionalGeneration": "whisper",
}
CHECKPOINTED = set(ALIVE) - {"PatchTSTModel"}
"""transformers has no checkpointing of the others."""


@pytest.fixture(scope="module")
def sweep():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("transformers_classes")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", ALIVE)
def test_alive(sweep, folder, name):
    row = sweep.row(ALIVE[name], name, folder)
    assert row["outcome"] == "alive", row["why"]
    assert row["targets"] >= 2
    errors = {kind: row[kind] for kind in ("eval gradient", "train gradient")}
    if name in CHECKPOINTED:
        errors |= {kind: row[kind] for kind in ("non-reentrant", "reentrant")}
    assert all(error <= sweep.CLOSE for error in errors.values()), errors


def test_a_new_process_loads_them(sweep, tmp_path, monkeypatch):
    """Also where Python leaves a script's own folder out of its path; a file that says something else is found."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    rows = [sweep.row(ALIVE[name], name, tmp_path) for name in ("BartForConditionalGeneration", "SwinModel")]
    sweep.in_new_process(tmp_path, rows)
    assert [each["outcome"] for each in rows] == ["alive", "alive"], rows
    (tmp_path / "SwinModel.safetensors").write_bytes(
        (tmp_path / "BartForConditionalGeneration.safetensors").read_bytes()
    )
    sweep.in_new_process(tmp_path, rows)
    assert [each["outcome"] for each in rows] == ["alive", "wrong"], rows
    assert rows[1]["why"].startswith("in a new process: ")


def test_the_sweep_finds_what_is_wrong(sweep, folder, monkeypatch):
    """Another gradient, a checkpoint that drops one, other outputs after a merge."""

    def outcome():
        row = sweep.row("bert", "BertModel", folder)
        return row["outcome"], row.get("why", "")

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "dense_gradient", lambda adapter, *_: (adapter.theta_d.detach().clone(), []))
        assert outcome()[1].startswith("gradient in eval mode: off by")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "dense_gradient", lambda adapter, *_: (adapter.theta_d, ["some.target"]))
        assert outcome() == ("dead", "eval: some.target and 0 more of 4")
    with monkeypatch.context() as patch:
        patch.setattr("unilora_torch.Adapter.merge", lambda _self: _self.theta_d.data.mul_(3))
        assert outcome()[1].startswith("merged: off by")


class Chaotic(torch.nn.Module):
    """Its last digits are what comes out; and it computes in float32, whatever it is."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)

    def forward(self, x):
        return torch.nn.functional.linear((1e6 * self.layer(x).float()).sin(), torch.ones(2, 4))


def test_what_rounding_does_is_no_fault(sweep):
    """Another gradient in float32, the same in float64."""
    torch.manual_seed(0)
    base, inputs = Chaotic(), {"x": torch.randn(8, 6)}
    adapter = unilora_torch.attach(copy.deepcopy(base), d=8, start="paper", bound=1.0)
    expected, _ = sweep.dense_gradient(adapter, base, inputs)
    assert sweep.distance(sweep.gradient(adapter, inputs), expected) > 10 * sweep.CLOSE
    assert sweep.compared(adapter, base, inputs, "eval", 0) < sweep.CHAOTIC
    assert torch.get_default_dtype() == torch.float32


def test_every_type_has_a_class_and_towers_are_left_to_their_models(sweep):
    classes = sweep.classes()
    assert len(classes) > 300
    assert all(classes.values())
    assert "clip" in classes
    assert "clip_text_model" not in classes
    assert len(classes["bert"]) > 5
    assert len(classes["mistral"]) == 1
