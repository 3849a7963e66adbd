"""Out of the house: the merged model as a checkpoint of timm's, and as ONNX; neither needs unilora."""

import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch
from timm.models import save_for_hf

import unilora_timm

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2).eval()
adapter = unilora_timm.attach(model, start="paper", bound=0.2)  # stands for a training
images = torch.randn(5, 3, 64, 64)
with torch.no_grad():
    logits = model(images)

folder = Path(tempfile.mkdtemp())
config = {"label_names": ["daisy", "rose", "tulip"]}
plain = unilora_timm.merged(model)  # push_to_hf_hub takes it, too
save_for_hf(plain, folder, model_config=config, safe_serialization=True)
plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
print(f"as a checkpoint: {(plain(images) - logits).abs().max():.1e} from the adapted model")

unilora_timm.save_onnx(model, folder / "model.onnx")
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
(found,) = session.run(["logits"], {"images": images.numpy()})
print(f"as ONNX:         {(torch.from_numpy(found) - logits).abs().max():.1e}")
for file in sorted(folder.iterdir()):
    print(f"{file.name}: {file.stat().st_size:,} bytes")
assert adapter.active  # the model itself is as it was
