"""An adapter goes to the hub and comes back, through `huggingface_hub` itself and a stand-in for its server."""

import os
import subprocess
import sys

SCRIPT = """
import sys
import torch
import transformers
import unilora_transformers

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
made = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, **sizes))
made.save_pretrained(sys.argv[1])
model = transformers.BertForSequenceClassification.from_pretrained(sys.argv[1]).eval()
adapter = unilora_transformers.attach(model, d=16)
with torch.no_grad():
    adapter.theta_d.normal_()
print(model.push_to_hub("adapter", private=True))
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="other/adapter")
for name in ("me/adapter", "other/adapter"):
    loaded = unilora_transformers.from_pretrained(name).eval()
    ids = torch.arange(5, 13)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
try:
    unilora_transformers.from_pretrained("me/nobody")
except OSError as error:
    print(type(error).__name__)
"""


def test_there_and_back(hub, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path / "base", tmp_path / "saved"]
    environment = os.environ | hub.environment(tmp_path / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    address, missing = done.stdout.split()
    assert "/me/adapter/commit/" in address
    assert missing == "RepositoryNotFoundError"
    assert {name: sorted(files) for name, files in hub.files.items()} == {
        name: ["README.md", "adapter.safetensors"] for name in ("me/adapter", "other/adapter")
    }
    assert hub.private == {"me/adapter"}
    card = hub.files["me/adapter"]["README.md"].decode()
    assert "library_name: unilora" in card
    assert "base_model:" not in card  # it lies in a folder
