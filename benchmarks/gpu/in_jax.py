"""The compiled step of ``benchmarks/jax_step.py`` on the GPU, and Pᵀ by scatter-add beside a gather and sums.

jaxlib 0.10.2 to 0.11.0 compile a float32 scatter-add on CUDA to a loop of compare-and-swap: figures name the jaxlib.
"""

import importlib.util
import time
from functools import partial
from typing import Any

from common import SMOKE, interleaved

from gpu.correct import jax_on_the_device
from gpu.rows import Row, Skip
from unilora_core import Layout, ProjectionSpec

POINTS = [(4000, 250)] if SMOKE else [(10_000_000, 625_000), (10_000_000, 65_536), (50_000_000, 524_288)]
KINDS = ("cached",) if SMOKE else ("cached", "computed")
PATIENCE = 2.0
"""Seconds of one product beyond which it is measured twice, not twenty times."""


def rows() -> list[Row]:
    """Pᵀ at several D and d, then the step."""
    found = [Row({"what": "transpose", "D": D, "d": d}, partial(transpose, D, d)) for D, d in POINTS]
    return [*found, Row({"what": "step"}, step)]


def transpose(D: int, d: int) -> dict[str, Any]:
    """Milliseconds of Pᵀ in three ways, of P, and of a copy."""
    jax_on_the_device()
    import jax
    import jax.numpy as jnp

    from unilora_jax.members import sums, table_of
    from unilora_jax.projection import project, project_transpose

    spec = ProjectionSpec(Layout([("m.A", (D,))]), d)
    groups, scale, theta = (jnp.asarray(make()) for make in (spec.groups, spec.scale, spec.init))
    y = jax.random.normal(jax.random.key(0), (D,))

    cases = {
        "copy": (lambda y: y + 1, y),
        "P": (project, theta, groups, scale),
        "Pᵀ, by unilora_jax": (project_transpose, y, groups, scale),
        "Pᵀ, .at[].add": (lambda y, g, s: jnp.zeros(d).at[g].add(y) * s, y, groups, scale),
        "Pᵀ, by members": (lambda y, table, s: sums(spec, y, table) * s, y, jnp.asarray(table_of(spec)), scale),
    }
    waited = {name: waiting(jax.jit(function), *arguments) for name, (function, *arguments) in cases.items()}
    longest = max(once(case) for case in waited.values())
    times = interleaved(waited, repeats=20 if longest < PATIENCE else 2)
    return versions() | {"ms": {name: 1000 * each["median_s"] for name, each in times.items()}}


def waiting(function: Any, *arguments: Any) -> Any:
    """A call that waits for its end; compiled by now."""
    import jax

    jax.block_until_ready(function(*arguments))
    return lambda: jax.block_until_ready(function(*arguments))


def once(case: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def step() -> dict[str, Any]:
    """Milliseconds and temporary bytes of each case of jax_step.py; of qwix where it is installed."""
    jax_on_the_device()
    if absent := [name for name in ("flax", "optax") if not importlib.util.find_spec(name)]:
        raise Skip(f"{', '.join(absent)} not installed")
    import jax_step

    model = jax_step.twins.nnx_llama(jax_step.twins.torch_llama(**jax_step.SIZES))
    cases = {groups: jax_step.unilora_case(model, groups)[0] for groups in KINDS}
    if importlib.util.find_spec("qwix") and not SMOKE:
        cases["qwix"] = jax_step.qwix_case(model)[0]
    times = interleaved(cases, repeats=20, warmup=3)
    return versions() | {
        name: {"ms": 1000 * times[name]["median_s"], "temporary_bytes": case.costs()["temporary_bytes"]}
        for name, case in cases.items()
    }


def versions() -> dict[str, Any]:
    """Of JAX and jaxlib, and whether this one's scatter-add is the slow one."""
    import jax
    import jaxlib

    from unilora_jax.projection import slow_scatter

    slow = slow_scatter("cuda", jaxlib.__version__) is not None
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "slow_scatter": slow}
