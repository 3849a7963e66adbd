"""The conformance suite on the core itself, in every namespace (``core_case``: see ``tests/conftest.py``)."""

import numpy as np

from unilora_core.testing import Backend


def backend(namespace):
    """What the suite is told of a namespace."""
    name, module = namespace.name.lower(), namespace.load()
    if name == "torch":
        return in_torch(name, module)
    if name == "jax":
        return in_jax(name, module)
    if name == "strict":
        return Backend(name, module, dtypes=("float32", "float64"))  # it has no float16
    return Backend(
        name,
        np,
        asarray=lambda values, dtype: namespace.asarray(values.astype(dtype)),
        dtypes=("float16", "float32", "float64"),
    )


def in_torch(name, torch):
    def pullback(function, x, y):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(function(x), x, y)[0]

    def compiled(function):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend="eager")

    return Backend(
        name,
        torch,
        asnumpy=lambda tensor: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(),
        pullback=pullback,
        compile=compiled,
        compiled=("groups",),  # torch.compile cannot trace array_api_compat; what it compiles is unilora_torch
        dtypes=("float16", "bfloat16", "float32", "float64"),
    )


def in_jax(name, module):
    import jax

    return Backend(
        name,
        module,
        pullback=lambda function, x, y: jax.vjp(function, x)[1](y)[0],
        compile=jax.jit,
        dtypes=("float16", "bfloat16", "float32"),  # JAX makes float32 of float64 unless jax_enable_x64 is set
    )


def test_the_core_conforms(core_case):
    core_case()
