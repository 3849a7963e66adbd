"""Export an adapter for serving engines: check who takes it, load it with PEFT, and merge it into a full checkpoint."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

import unilora_transformers
from unilora_transformers import engines, merge_checkpoint

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
folder = Path(tempfile.mkdtemp())
config = LlamaConfig(**SIZES, intermediate_size=96)  # random weights; a name on the hub works as well
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base", max_shard_size="100KB")

model = AutoModelForCausalLM.from_pretrained(folder / "base")
adapter = unilora_transformers.attach(model, "all-linear", start="paper")  # train it here
adapter.save(folder / "adapter.safetensors")
adapter.export_lora(folder / "lora", engine="vllm")  # refused, and not written, if vLLM would not serve it

lora = engines.read_lora(folder / "lora")
for name, reasons in engines.check(folder / "lora").items():
    print(f"{name}: {'; '.join(reasons) or engines.serving(name, folder / 'lora', lora)}")

ids = torch.arange(8)[None]
logits = model.eval()(ids).logits
served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "lora").eval()
torch.testing.assert_close(served(ids).logits, logits, rtol=1e-4, atol=1e-4)

merge_checkpoint(folder / "adapter.safetensors", folder / "base", folder / "merged")  # for engines without LoRA
merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
print("PEFT and the merged checkpoint give the adapter's logits.")
