"""A tree of shapes is planned as it is, whatever its size."""

import tracemalloc

import jax
import jax.numpy as jnp

import unilora_jax


def test_a_model_of_405_billion_parameters_is_planned_from_shapes():
    sides = {"q": (16384, 16384), "k": (16384, 1024), "v": (16384, 1024), "o": (16384, 16384)}
    sides |= {"gate": (16384, 53248), "up": (16384, 53248), "down": (53248, 16384)}
    shapes = jax.eval_shape(
        lambda: {
            f"layers.{block}": {name: {"kernel": jnp.zeros(each)} for name, each in sides.items()}
            for block in range(126)
        }
    )
    tracemalloc.start()
    spec = unilora_jax.plan(shapes, ".*kernel", rank=16).spec
    _, held = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(spec.layout), spec.D, spec.d) == (2 * 882, 623_443_968, 9_741_312)
    assert held < 40 * spec.d < spec.D  # θ_d⁰ and the scale are made, and nothing of D
