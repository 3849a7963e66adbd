"""One trainable vector beside any PyTorch model."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import unilora_torch

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
x, labels = torch.randn(128, 64), torch.randint(10, (128,))

adapter = unilora_torch.attach(model, "all-linear", rank=8, seed=0)
adapter.verify(x[:2])  # every target is reached, and gives θ_d a gradient
print(adapter.summary())

# The rate that you would give LoRA; adapter.learning_rate turns it into θ_d's.
optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=5e-4))
for _ in range(60):
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss at the end: {loss.item():.3f}")

adapted = model(x)
with adapter.disabled():
    print("moved the outputs by up to", (adapted - model(x)).abs().max().item())

adapter.merge()  # B·A goes into the weights: no cost at inference
print("merged outputs differ by", (adapted - model(x)).abs().max().item())
adapter.unmerge()  # the base's weights are back, bit for bit

with tempfile.TemporaryDirectory() as folder:
    adapter.save(Path(folder) / "adapter.safetensors")
    adapter.detach()  # the base model again
    unilora_torch.load(model, Path(folder) / "adapter.safetensors")
    assert torch.equal(model(x), adapted)
