"""timm: the q and v blocks of a vision transformer's fused qkv, and its head, in one file."""

import tempfile
from pathlib import Path

import timm
import torch

import unilora_timm

torch.manual_seed(0)
# pretrained=True fetches weights from the hub; random ones keep this example offline.
model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, img_size=64, depth=4)
adapter = unilora_timm.attach(model, rank=4)
print(adapter.summary())
print("adapts", [target.name for target in adapter.targets[:2]], "…")

images, labels = torch.randn(16, 3, 64, 64), torch.randint(5, (16,))
optimizer = torch.optim.AdamW(adapter.parameter_groups(lora_rate=2e-3, head_rate=2e-3))
for step in range(10):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

model.eval()
logits = model(images)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter.safetensors"
    adapter.save(path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    adapter.detach()
    unilora_timm.load(model, path)
    assert torch.equal(model(images), logits)
