"""The JAX twins compute what their PyTorch models compute."""

import jax
import numpy as np
import pytest
import twins

torch = pytest.importorskip("torch", reason="the twins are copies of PyTorch models")

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))


def nnx_logits(model):
    nnx = pytest.importorskip("flax.nnx", reason="this twin needs flax")
    return nnx.jit(lambda twin: twin(TOKENS))(twins.nnx_llama(model))


def eqx_logits(model):
    pytest.importorskip("equinox", reason="this twin needs equinox")
    return jax.jit(jax.vmap(twins.eqx_llama(model)))(TOKENS)


def linen_logits(model):
    pytest.importorskip("flax.linen", reason="this twin needs flax")
    module, params = twins.linen_llama(model)
    return jax.jit(module.apply)({"params": params}, TOKENS)


def stacked_logits(model, remat=False):
    return twins.stacked_llama_apply(twins.stacked_llama(model), TOKENS, remat, model.config)


def remat_logits(model):
    return stacked_logits(model, remat=True)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logits", [nnx_logits, eqx_logits, linen_logits, stacked_logits, remat_logits])
@pytest.mark.parametrize("sizes", [{}, {"hidden": 24, "intermediate": 40, "layers": 3, "heads": 3, "kv_heads": 1}])
def test_llama(logits, sizes):
    model = twins.torch_llama(**sizes)
    assert_close(logits(model), model(torch.from_numpy(TOKENS)))


def test_vit():
    nnx = pytest.importorskip("flax.nnx", reason="this twin needs flax")
    model = twins.torch_vit()
    images = torch.randn(2, 3, 16, 16)
    found = nnx.jit(lambda twin: twin(images.permute(0, 2, 3, 1).numpy()))(twins.nnx_vit(model))
    assert_close(found, model(images))


@pytest.mark.parametrize("remat", [False, True])
def test_gradient(remat):
    model = twins.torch_llama()
    model(torch.from_numpy(TOKENS)).square().mean().backward()
    wanted = torch.stack([layer.self_attn.q_proj.weight.grad.T for layer in model.layers])

    def loss(params):
        return (twins.stacked_llama_apply(params, TOKENS, remat) ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(twins.stacked_llama(model))
    assert wanted.abs().max() > 1e-3
    assert_close(gradient["layers"]["self_attn"]["q_proj"]["kernel"], wanted)
