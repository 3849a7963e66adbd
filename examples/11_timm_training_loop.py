"""timm's own training loop: its optimiser, schedule, mixup and weight average, with autocast, on an adapted model."""

import tempfile
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, accuracy

import unilora_timm

torch.manual_seed(0)
# pretrained=True fetches weights from the hub; random ones keep this example offline.
model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, depth=3, drop_path_rate=0.1)
adapter = unilora_timm.attach(model, ["qkv", "mlp"])
print(adapter.summary())

labels = torch.arange(96) % 4  # made images: four kinds of stripes under noise
stripes = torch.stack([torch.sin((label + 1) * torch.arange(32) / 2) for label in labels])
images = stripes[:, None, None, :] + torch.randn(96, 3, 32, 32) / 2

optimizer = create_optimizer_v2(adapter.parameter_groups(lora_rate=2e-3, head_rate=2e-3), opt="adamw")
schedule = CosineLRScheduler(optimizer, t_initial=6, warmup_t=1, warmup_lr_init=0.0)  # from 0: both rates in step
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.2, label_smoothing=0.1, num_classes=4)
ema = ModelEmaV3(model, decay=0.9)
for epoch in range(6):
    model.train()
    schedule.step(epoch + 1)
    for part in torch.randperm(96).split(24):
        mixed, soft = mixup(images[part], labels[part])
        with torch.autocast("cpu", torch.bfloat16):
            loss = SoftTargetCrossEntropy()(model(mixed), soft)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    with torch.no_grad():
        (top,) = accuracy(ema.module(images), labels)
    print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy of the average {top.item():.1f} %")

path = Path(tempfile.mkdtemp()) / "adapter.safetensors"
ema.module.unilora.save(path)  # the average has an adapter of its own
print(f"{path.name}: {path.stat().st_size:,} bytes")
