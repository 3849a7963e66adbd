"""unilora beside PEFT's UniLora and LoRA: making the groups, frozen memory, projection, a training step.

    python benchmarks/vs_peft.py            # everything, about five minutes on two cores
    python benchmarks/vs_peft.py projection # one part

Each part times its cases in turn in one process; ratios of medians are what counts.
"""

import copy
import warnings

import torch
from common import SMOKE, interleaved, parser, write
from peft import LoraConfig, UniLoraConfig, get_peft_model
from peft.tuners.unilora.layer import UniLoraLayer
from peft.tuners.unilora.model import UniLoraModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import unilora_torch
from unilora_core import Layout, ProjectionSpec

warnings.filterwarnings("ignore", category=UserWarning)


def groups() -> dict:
    """Groups of D = 12.5 M (Gemma-7B, r = 4), d = 524,288."""
    D, d = _sized(12_500_992), _sized(524_288)
    spec = ProjectionSpec(Layout([("factors", (D,))]), d)
    times = interleaved(
        {"unilora": lambda: spec.groups(), "peft": lambda: UniLoraModel.generate_index(D, d, 42)}, repeats=7
    )
    return {"D": D, "d": d, **times, "unilora/peft": _ratio(times, "unilora", "peft")}


def memory() -> dict:
    """Bytes of frozen state per LoRA parameter, with a float32 base."""
    ours, peft = _stacks(D=_sized(1_000_000), d=_sized(10_000))
    projection, D, d = ours.unilora.projection, ours.unilora.spec.D, ours.unilora.spec.d
    layers = [module for module in peft.modules() if isinstance(module, UniLoraLayer)]
    buffers = [
        store["default"]
        for layer in layers
        for store in (layer.unilora_indices_A, layer.unilora_indices_B, layer.unilora_scales_A, layer.unilora_scales_B)
    ]
    frozen, peft_bytes = (sum(tensor.nbytes for tensor in each) for each in (projection.tensors, buffers))
    return {
        "D": D,
        "d": d,
        "unilora_bytes_per_parameter": projection.groups.nbytes / D,
        "unilora_bytes_per_trained_number": (frozen - projection.groups.nbytes) / d,
        "unilora_bytes": frozen,
        "peft_bytes": peft_bytes,
        "peft_bytes_per_parameter": peft_bytes / D,
    }


def projection() -> dict:
    """θ_D and its gradient, D = 10 M, d = 100,000, and a copy of D floats as the yardstick.

    ``unilora`` is P and Pᵀ alone; ``unilora_factors`` also cuts θ_D into the 128 factors and joins their gradients,
    as a training step does and as the figure for PEFT includes.
    """
    ours, peft = _stacks(D=_sized(10_000_000), d=_sized(100_000))
    adapter = ours.unilora
    layers = [module for module in peft.modules() if isinstance(module, UniLoraLayer)]
    theta = peft.base_model.unilora_theta_d["default"]
    upstream = {name: torch.randn(shape) for name, shape in adapter.spec.layout.shapes.items()}
    source = torch.randn(adapter.spec.D)

    y = torch.cat([tensor.flatten() for tensor in upstream.values()])

    def unilora():
        adapter.theta_d.grad = None
        adapter.projection(adapter.theta_d, [slice(0, adapter.spec.D)]).backward(y)

    def unilora_factors():
        adapter.theta_d.grad = None
        factors = adapter.factors()
        torch.autograd.backward(list(factors.values()), [upstream[name] for name in factors])

    def peft_unilora():
        theta.grad = None
        factors = [factor for layer in layers for factor in layer._get_lora_matrices("default")]
        torch.autograd.backward(factors, list(upstream.values()))

    per_target = _per_target(adapter, upstream)
    cases = {"unilora": unilora, "unilora_factors": unilora_factors, "peft": peft_unilora, "copy": source.clone}
    times = interleaved(cases | {"unilora_per_target": per_target}, repeats=9)
    return {
        "D": adapter.spec.D,
        "d": adapter.spec.d,
        "start": adapter.spec.start,
        **times,
        "unilora_factors/peft": _ratio(times, "unilora_factors", "peft"),
        "unilora/copy": _ratio(times, "unilora", "copy"),
        "unilora_factors/copy": _ratio(times, "unilora_factors", "copy"),
    }


def step() -> dict:
    """A training step of a small Llama: 8 layers, width 512, all linear, r = 16, 4 × 128 tokens, AdamW."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64 if SMOKE else 512,
        intermediate_size=172 if SMOKE else 1376,
        num_hidden_layers=2 if SMOKE else 8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    tokens = torch.randint(0, 4096, (4, 128))
    ours = copy.deepcopy(base)
    adapter = unilora_torch.attach(ours, "all-linear", exclude=["lm_head"], rank=16)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    uni = get_peft_model(
        copy.deepcopy(base), UniLoraConfig(r=16, theta_d_length=adapter.spec.d, target_modules="all-linear")
    )
    models = {"unilora": ours, "peft_lora": lora, "peft_unilora": uni}
    times = interleaved({name: _stepper(model, tokens) for name, model in models.items()}, repeats=21, warmup=2)
    return {
        "D": adapter.spec.D,
        "d": adapter.spec.d,
        "start": adapter.spec.start,
        **times,
        "unilora/peft_lora": _ratio(times, "unilora", "peft_lora"),
        "unilora/peft_unilora": _ratio(times, "unilora", "peft_unilora"),
    }


def _sized(number: int) -> int:
    """A number, or a fiftieth of it in a smoke run."""
    return number // 50 if SMOKE else number


def _stepper(model: nn.Module, tokens: torch.Tensor):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _per_target(adapter: unilora_torch.Adapter, upstream: dict[str, torch.Tensor]):
    """The other design, for comparison: each target gathers its own factors."""

    def run():
        adapter.theta_d.grad = None
        factors = [factor for target in adapter.targets for factor in adapter.factors_of(target)]
        torch.autograd.backward(factors, list(upstream.values()))

    return run


def _stacks(D: int, d: int, layers: int = 64, rank: int = 64) -> tuple[nn.Module, nn.Module]:
    """The same stack of linear layers under unilora and under PEFT's UniLora, with about D LoRA parameters."""
    width = D // (layers * 2 * rank)
    base = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    config = UniLoraConfig(r=rank, theta_d_length=d, target_modules=[str(i) for i in range(layers)])
    peft = get_peft_model(copy.deepcopy(base), config)
    unilora_torch.attach(base, rank=rank, d=d)
    return base, peft


def _ratio(times: dict[str, dict[str, float]], a: str, b: str) -> float:
    return round(times[a]["median_s"] / times[b]["median_s"], 4)


PARTS = {"groups": groups, "memory": memory, "projection": projection, "step": step}

if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("part", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    chosen = command.parse_args().part or list(PARTS)
    torch.manual_seed(0)
    for part in chosen:
        result = PARTS[part]()
        print(part, {key: value for key, value in result.items() if not isinstance(value, dict)})
        print(write(f"vs_peft_{part}", result))
