"""A small Llama of random weights on disk, and adapters of it."""

import torch
import transformers

import unilora_transformers

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_base(folder, seed=0, **config):
    """Save a Llama of random weights, and return it as loaded from there."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2, "intermediate_size": 48} | config)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_adapter(model, path, seed=0, size=0.02, **options):
    """Attach an adapter, move it as training would, save it, and return it; it stays attached."""
    adapter = unilora_transformers.attach(model, seed=seed, **options)
    with torch.no_grad():
        adapter.theta_d.add_(torch.randn(adapter.theta_d.shape, generator=torch.Generator().manual_seed(seed)) * size)
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path)
    return adapter
