"""A compiled training step of a small Llama in JAX: Uni-LoRA beside qwix's LoRA, and one base under many adapters.

    python benchmarks/jax_step.py           # everything, some minutes on two cores
    python benchmarks/jax_step.py step      # one part

Each part times its cases in turn in one process; ratios of medians are what counts. Needs flax, optax, qwix and torch
(the model of the tests is copied from its PyTorch twin).
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import SMOKE, interleaved, parser, write
from flax import nnx

import unilora_jax
from unilora_core import Layout, ProjectionSpec
from unilora_jax.gather import gathered

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "jax"))
import twins

SIZES = {"vocabulary": 1000, "hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "kv_heads": 8}
if SMOKE:
    SIZES |= {"hidden": 64, "intermediate": 172, "layers": 1}
TARGETS = r".*_proj/kernel"
MODULES = ".*_proj"
RANK = 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, SIZES["vocabulary"], (8, 16 if SMOKE else 128)))


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Next-token cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


class Case:
    """A compiled step, its arguments, and what of its outputs becomes its next arguments."""

    def __init__(self, step: Callable, state: tuple, rest: tuple):
        lowered, before = jax.jit(step, donate_argnums=(0, 1)).lower(*state, *rest), time.process_time()
        self.compiled = lowered.compile()
        self.compile_s = time.process_time() - before
        self.state, self.rest = state, rest

    def __call__(self) -> None:
        """One step."""
        loss, *state = self.compiled(*self.state, *self.rest)
        self.state = tuple(state)
        loss.block_until_ready()

    def costs(self) -> dict:
        """What XLA says of the compiled step."""
        memory = self.compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes
        return {
            "compile_cpu_s": self.compile_s,
            "flops": self.compiled.cost_analysis()["flops"],
            "bytes_accessed": self.compiled.cost_analysis()["bytes accessed"],
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": arguments,
            "temporary_and_argument_bytes": memory.temp_size_in_bytes + arguments,
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
    import qwix  # here, since the other cases run where it is not installed

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
        whole = "temporary_and_argument_bytes"
        found[name]["temporary and arguments/qwix"] = found[name][whole] / found["qwix"][whole]
        found[name]["flops/qwix"] = found[name]["flops"] / found["qwix"]["flops"]
    return {"sizes": SIZES, "tokens": TOKENS.shape, "rank": RANK, "D": D, "d": adapter.spec.d, **found}


def vmap(repeats: int) -> dict:
    """The forward pass of one adapter, and of 64 on one base: each with one row of its own, or with eight."""
    model = twins.nnx_llama(twins.torch_llama(**SIZES))
    graph, params = nnx.split(model)
    adapter = unilora_jax.plan(params, TARGETS, rank=RANK, groups="cached")
    several = adapter.init() + 0.01 * jax.random.normal(jax.random.key(0), (64, adapter.spec.d))
    apply = adapter.wrap(lambda params, tokens: nnx.merge(graph, params)(tokens))
    one, many = jax.jit(apply), jax.jit(jax.vmap(apply, in_axes=(None, 0, 0)))
    base = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    rows = jnp.asarray(np.random.default_rng(0).integers(0, SIZES["vocabulary"], (64, 1, 32)))
    cases = {
        "one adapter, 1 row": lambda: one(params, several[0], rows[0]).block_until_ready(),
        "one adapter, 64 rows": lambda: one(params, several[0], rows[:, 0]).block_until_ready(),
        "64 adapters, a row each": lambda: many(params, several, rows).block_until_ready(),
        "no adapter, 64 rows": lambda: base(params, rows[:, 0]).block_until_ready(),
    }
    times = interleaved(cases, repeats=repeats, warmup=2)
    together = times["64 adapters, a row each"]["median_s"]
    return {
        "sizes": SIZES,
        "tokens a row": rows.shape[-1],
        "D": adapter.spec.D,
        "d": adapter.spec.d,
        **times,
        "64 adapters / one adapter, 64 rows": together / times["one adapter, 64 rows"]["median_s"],
        "64 adapters / (64 x one adapter)": together / (64 * times["one adapter, 1 row"]["median_s"]),
        "bytes of 64 adapters": several.nbytes,
        "bytes of 64 LoRAs": 64 * 4 * adapter.spec.D,
    }


def groups(repeats: int) -> dict:
    """P and its transpose for 10 M LoRA parameters, the groups cached or computed."""
    layers = range(1 if SMOKE else 152)
    shapes = {f"layers.{i}.q_proj.{f}": (8, 4096) if f == "A" else (4096, 8) for i in layers for f in "AB"}
    spec = ProjectionSpec(Layout(shapes.items()), sum(a * b for a, b in shapes.values()) // 16)
    stacks = [((name,), name.endswith(".B")) for name in shapes]
    theta_d, gradient = jnp.asarray(spec.init()), jax.jit(jax.grad(_sum_of_squares, argnums=1))
    cases: dict[str, Callable] = {}
    for name in ("computed", "cached"):
        factors = gathered(spec, stacks, cached=name == "cached")
        cases[f"{name}, forward"] = functools.partial(_wait, jax.jit(_sum_of_squares), factors, theta_d)
        cases[f"{name}, with gradient"] = functools.partial(_wait, gradient, factors, theta_d)
    whole = jnp.zeros(spec.D)
    cases["copy of D floats"] = functools.partial(_wait, jax.jit(lambda x: x + 1), whole)
    return {"D": spec.D, "d": spec.d, **interleaved(cases, repeats=repeats, warmup=2)}


def _sum_of_squares(factors: object, theta_d: jax.Array) -> jax.Array:
    return sum((array * array).sum() for array in factors(theta_d).values())


def _wait(function: Callable, *args: object) -> None:
    jax.block_until_ready(function(*args))


PARTS = {"step": step, "vmap": vmap, "groups": groups}

if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("part", nargs="?", choices=PARTS)
    command.add_argument("--repeats", type=int, default=15)
    options = command.parse_args()
    for name in [options.part] if options.part else PARTS:
        results = PARTS[name](options.repeats)
        print(name, *(f"{key}: {value}" for key, value in results.items()), sep="\n  ")
        print(write(f"jax_{name}", results))
