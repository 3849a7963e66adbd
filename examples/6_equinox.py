"""Equinox: three adapters on one base, trained together by `jax.vmap` over θ_d, and written for PEFT."""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import unilora_jax

base = eqx.nn.MLP(32, 32, width_size=32, depth=2, key=jax.random.key(0))
x, tasks = jax.random.normal(jax.random.key(1), (128, 32)), jax.random.randint(jax.random.key(2), (3, 128), 0, 4)
adapter = unilora_jax.plan(base, r"layers/\d/weight", rank=8)  # the module itself is the tree of parameters
adam = optax.adam(adapter.learning_rate(5e-3))  # from the rate that you would give LoRA


def loss_of(model, labels):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), labels).mean()


@eqx.filter_jit
def step(thetas, moments, adapter, base):
    several = jax.vmap(jax.value_and_grad(adapter.wrap(loss_of), argnums=1), in_axes=(None, 0, 0))
    losses, gradients = several(base, thetas, tasks)
    updates, moments = adam.update(gradients, moments)
    return losses, optax.apply_updates(thetas, updates), moments


thetas = jnp.stack([adapter.init()] * 3)
first, thetas, moments = step(thetas, adam.init(thetas), adapter, base)
for _ in range(100):
    losses, thetas, moments = step(thetas, moments, adapter, base)
print(f"{adapter.summary()}\nlosses {first} at the start, {losses} at the end")
assert (losses < first).all()
losses, *_ = step(thetas, moments, adapter, base)
merged = eqx.filter_jit(loss_of)(adapter.merge(base, thetas[0]), tasks[0])  # of the first as a plain model
assert jnp.allclose(merged, losses[0])
with tempfile.TemporaryDirectory() as folder:
    adapter.export_lora(folder, thetas[0])  # for the same layers in PyTorch
