"""TRL's SFTTrainer on a 4-bit base: the base stays packed, θ_d is float32, the checkpoint is the adapter."""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import unilora_transformers

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
words = ["<pad>", "<s>", "</s>", "the", "small", "big", "cat", "dog", "horse", "sees", "and", "follows"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
special = {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **special)).save_pretrained(folder / "base")

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=nf4)
adapter = unilora_transformers.attach(model, "all-linear")
print(adapter.summary())

questions = [f"the small {animal} sees" for animal in ("cat", "dog", "horse")] * 8
answers = [" and follows the big dog"] * len(questions)
trainer = SFTTrainer(
    model,
    SFTConfig(folder / "run", max_steps=20, logging_steps=5, completion_only_loss=True, bf16=False, report_to=[]),
    train_dataset=Dataset.from_dict({"prompt": questions, "completion": answers}),
    processing_class=tokenizer,
    optimizers=(torch.optim.AdamW(adapter.parameter_groups(lora_rate=5e-2)), None),
)
trainer.train()
model.save_pretrained(folder / "adapter")  # or trainer.push_to_hub(): θ_d, its spec and a card
print(sorted(file.name for file in (folder / "adapter").iterdir()))
