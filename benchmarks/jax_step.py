"""A compiled training step of a small Llama in JAX: Uni-LoRA beside qwix's LoRA, and one base under many adapters.

    python benchmarks/jax_step.py           # everything, some minutes on two cores
    python benchmarks/jax_step.py step      # one part

Each part times its cases in turn in one process; ratios of medians are what counts. Needs flax, optax, qwix and torch
(the model of the tests is copied from its PyTorch twin).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from common import interleaved, write
from flax import nnx

import unilora_jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "jax"))
import twins

SIZES = {"vocabulary": 1000, "hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "kv_heads": 8}
TARGETS = r".*_proj/kernel"
MODULES = ".*_proj"
RANK = 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SIZES["vocabulary"], (8, 128)))


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Next-token cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


class Case:
    """A compiled step, its arguments, and what of its outputs becomes its next arguments."""

    def __init__(self, step: Callable, state: tuple, rest: tuple):
        self.compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, *rest).compile()
        self.state, self.rest = state, rest

    def __call__(self) -> None:
        """One step."""
        loss, *state = self.compiled(*self.state, *self.rest)
        self.state = tuple(state)
        loss.block_until_ready()

    def costs(self) -> dict:
        """What XLA says of the compiled step."""
        memory = self.compiled.memory_analysis()
        return {
            "flops": self.compiled.cost_analysis()["flops"],
            "bytes_accessed": self.compiled.cost_analysis()["bytes accessed"],
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
        }


def trained(model_loss: Callable, leaf: object, rest: tuple) -> Case:
    """Adam on ``leaf``, the loss being ``model_loss(leaf, *rest)``."""
    optimiser = optax.adam(1e-3)

    def step(leaf: object, moments: object, *rest: object) -> tuple:
        loss, gradient = jax.value_and_grad(model_loss)(leaf, *rest)
        updates, moments = optimiser.update(gradient, moments)
        return loss, optax.apply_updates(leaf, updates), moments

    return Case(step, (leaf, optimiser.init(leaf)), rest)


def qwix_case(model: nnx.Module) -> tuple[Case, int]:
    """Plain low-rank LoRA, and its number of trained parameters."""
    provider = qwix.LoraProvider(module_path=MODULES, rank=RANK, alpha=float(RANK))
    adapted = qwix.apply_lora_to_model(model, provider, TOKENS[:1, :8], rngs=nnx.Rngs(0))
    graph, lora, rest = nnx.split(adapted, nnx.LoRAParam, ...)

    def model_loss(lora: nnx.State, rest: nnx.State, tokens: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graph, lora, rest)(tokens), tokens)

    return trained(model_loss, lora, (rest, TOKENS)), sum(x.size for x in jax.tree.leaves(lora))


def unilora_case(model: nnx.Module, groups: str, *, merged: bool = False) -> tuple[Case, unilora_jax.Adapter]:
    """θ_d, by the low-rank path or by merging B·A into the weights in each step."""
    graph, params = nnx.split(model)
    adapter = unilora_jax.plan(params, TARGETS, rank=RANK, groups=groups)

    def apply(params: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    def model_loss(theta_d: jax.Array, adapter: object, params: nnx.State, tokens: jax.Array) -> jax.Array:
        if merged:
            return loss_of(apply(adapter.merge(params, theta_d), tokens), tokens)
        return loss_of(adapter.wrap(apply)(params, theta_d, tokens), tokens)

    return trained(model_loss, adapter.init(), (adapter, params, TOKENS)), adapter


def step(repeats: int) -> dict:
    """Time, flops and memory of a step."""
    model = twins.nnx_llama(twins.torch_llama(**SIZES))
    lora, D = qwix_case(model)
    cases = {"qwix": lora}
    for groups in ("computed", "cached"):
        cases[groups], adapter = unilora_case(model, groups)
    cases["merged"], _ = unilora_case(model, "computed", merged=True)
    assert adapter.spec.D == D, (adapter.spec.D, D)
    times = interleaved(cases, repeats=repeats, warmup=2)
    found = {name: {**times[name], **case.costs()} for name, case in cases.items()}
    for name in found:
        found[name]["time/qwix"] = found[name]["median_s"] / found["qwix"]["median_s"]
        found[name]["temporary/qwix"] = found[name]["temporary_bytes"] / found["qwix"]["temporary_bytes"]
        found[name]["flops/qwix"] = found[name]["flops"] / found["qwix"]["flops"]
    return {"sizes": SIZES, "tokens": TOKENS.shape, "rank": RANK, "D": D, "d": adapter.spec.d, **found}


PARTS = {"step": step}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for name in [options.part] if options.part else PARTS:
        results = PARTS[name](options.repeats)
        print(name, *(f"{key}: {value}" for key, value in results.items()), sep="\n  ")
        print(write(f"jax_{name}", results))
