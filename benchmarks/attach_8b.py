"""Attach time and extra memory for the shapes of Llama-3.1-8B, PEFT's UniLora beside it.

    python benchmarks/attach_8b.py         # two to three minutes on two cores, no GPU, no network

The skeleton has the model's modules and shapes; each weight is one number with strides of zero, so that 16 GB need not
be there. What attaching makes is real: the groups, θ_d, the hooks. `unilora_torch.attach` is measured;
`unilora_transformers.attach` would also run the model once, which takes what one forward pass of it takes. Each case
has a process of its own. Writes ``benchmarks/results/attach_8b.json``.
"""

import json
import os
import statistics
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import common  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402

import unilora_torch  # noqa: E402

QUERY_AND_VALUE, ALL = ["q_proj", "v_proj"], [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
CASES = {
    "q and v, r = 4": (QUERY_AND_VALUE, 4),
    "all linear, r = 4": (ALL, 4),
    "all linear, r = 64": (ALL, 64),
}
REPEATS = 1 if common.SMOKE else 3
SHAPES = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1 if common.SMOKE else 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def skeleton() -> nn.Module:
    """Llama-3.1-8B in bfloat16, each parameter one number seen as many."""
    config = transformers.LlamaConfig(**SHAPES, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    return with_values(model)


def with_values(model: nn.Module) -> nn.Module:
    """A model on the meta device with values that take no memory: each parameter is one number seen as many."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            one = torch.zeros(1, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(one.expand(parameter.shape), requires_grad=False))
    return model


def numbers(model: nn.Module, targets: list[str], rank: int) -> int:
    """D."""
    layers = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in targets]
    return rank * sum(layer.in_features + layer.out_features for layer in layers)


def with_unilora(model: nn.Module, targets: list[str], rank: int) -> tuple[int, int, float, float, int]:
    """D, d, seconds, the processor's seconds, and the bytes of what attaching makes; d = D/16."""
    D = numbers(model, targets, rank)
    start, cpu = time.perf_counter(), time.process_time()
    adapter = unilora_torch.attach(model, targets, rank=rank, d=round(D / 16))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tensors = (*adapter.parameters(), *adapter.buffers(), *adapter.projection.tensors)
    size = sum(tensor.nbytes for tensor in tensors)
    adapter.detach()
    return D, round(D / 16), seconds, cpu, size


def with_peft(model: nn.Module, targets: list[str], rank: int) -> tuple[int, int, float, float, int]:
    """The same for PEFT's UniLora, with as many trained numbers."""
    import peft

    D = numbers(model, targets, rank)
    config = peft.UniLoraConfig(r=rank, theta_d_length=round(D / 16), target_modules=targets)
    start, cpu = time.perf_counter(), time.process_time()
    wrapped = peft.get_peft_model(model, config)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    made = {t.data_ptr(): t for name, t in [*wrapped.named_buffers(), *wrapped.named_parameters()] if "unilora" in name}
    size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    wrapped.unload()
    return D, round(D / 16), seconds, cpu, size


def measure(library: str, case: str, repeats: int) -> dict[str, object]:
    """Median seconds (on the clock, and of the processor), bytes kept, and by how much the process grew at most."""
    torch.set_num_threads(2)
    targets, rank = CASES[case]
    model, run = skeleton(), with_unilora if library == "unilora" else with_peft
    before = common.peak()
    found = [run(model, targets, rank) for _ in range(repeats)]
    D, d, _, _, size = found[0]
    return {
        "D": D,
        "d": d,
        "seconds": statistics.median(row[2] for row in found),
        "cpu_seconds": statistics.median(row[3] for row in found),
        "repeats": repeats,
        "bytes": size,
        "bytes_per_lora_parameter": size / D,
        "peak_growth_bytes": common.peak() - before,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "CASE"), help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        library, case = arguments.measure
        print(json.dumps(measure(library, case, repeats=REPEATS if library == "unilora" else 1)))
        return
    results: dict = {"skeleton": "Llama-3.1-8B, bfloat16, weights of stride 0", "cases": {}}
    for case in list(CASES)[:1] if common.SMOKE else CASES:
        results["cases"][case] = {}
        for library in ("unilora", "peft"):
            out = common.again(__file__, "--measure", library, case)
            row = results["cases"][case][library] = json.loads(out.splitlines()[-1])
            shown = f"{row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s of the processor)"
            print(f"{case}: {library}: {shown}, {row['bytes_per_lora_parameter']:.2f} bytes", flush=True)
    common.write("attach_8b", results)


if __name__ == "__main__":
    main()
