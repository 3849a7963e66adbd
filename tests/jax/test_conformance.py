"""The conformance suite on unilora_jax's own projection, eager and under `jax.jit`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unilora_core
import unilora_jax
from unilora_core.testing import Backend, cases
from unilora_jax.generic import mapped


def groups(spec, start, stop):
    return spec.groups(start, stop, xp=jnp)


def table(spec):
    """The groups in layout order; of what starts at zero, those of the second half of the table."""
    found = np.asarray(spec.groups(xp=jnp)).copy()
    if spec.start == "identity":
        for name, at in spec.layout.slices.items():
            found[at] += spec.d * spec.shifted(name)
    return jnp.asarray(found)


def project(spec):
    if spec.map.groups is None:
        numbers = mapped(spec, [(name,) for name in spec.layout.shapes])
        return lambda theta_d: spec.layout.join({name: stack[0] for (name,), stack in numbers(theta_d).items()})
    at, scale = table(spec), spec.scale(xp=jnp)
    origin = spec.init(xp=jnp) if spec.start == "identity" else None
    return lambda theta_d: unilora_jax.project(theta_d, at, scale, origin)


def project_transpose(spec):
    if spec.map.groups is None:
        return functools.partial(unilora_core.project_transpose, spec)
    at, scale = groups(spec, 0, spec.D), spec.scale(xp=jnp)
    return lambda y: unilora_jax.project_transpose(y, at, scale)


BACKEND = Backend(
    name="unilora_jax",
    xp=jnp,
    groups=groups,
    project=project,
    project_transpose=project_transpose,
    pullback=lambda function, x, y: jax.vjp(function, x)[1](y)[0],
    compile=jax.jit,
    dtypes=("float16", "bfloat16", "float32"),
)


@pytest.mark.parametrize("case", cases(BACKEND), ids=str)
def test_conformance(case):
    case()
