"""Flax NNX: attention adapted under `nnx.jit`, trained by optax, with θ_d in an orbax checkpoint."""

import tempfile

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx

import unilora_jax

blocks = [nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(i)) for i in range(2)]
graph, params = nnx.split(nnx.Sequential(nnx.Embed(64, 64, rngs=nnx.Rngs(2)), *blocks))
tokens = jax.random.randint(jax.random.key(0), (16, 12), 0, 64)
adapter = unilora_jax.plan(params, ["query", "value"], rank=8)  # params stay as they are
adam = optax.adam(adapter.learning_rate(5e-3))  # from the rate that you would give LoRA


def loss_of(params):
    return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(tokens), tokens).mean()


@nnx.jit
def step(theta_d, moments, adapter, params):
    gradient = jax.grad(adapter.wrap(loss_of), argnums=1)(params, theta_d)
    updates, moments = adam.update(gradient, moments)
    return optax.apply_updates(theta_d, updates), moments


theta_d, moments = adapter.init(), adam.init(adapter.init())
for _ in range(100):
    theta_d, moments = step(theta_d, moments, adapter, params)
before, after = map(nnx.jit(loss_of), (params, adapter.merge(params, theta_d)))  # merge makes a new tree
print(f"{adapter.summary()}\nloss of the base {before:.3f}, adapted and merged {after:.3f}")
assert after < before
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{folder}/step", {"theta_d": theta_d, "moments": moments})
    checkpointer.wait_until_finished()
    adapter.save(f"{folder}/adapter.safetensors", checkpointer.restore(f"{folder}/step")["theta_d"])
    assert (unilora_jax.load(params, f"{folder}/adapter.safetensors")[1] == theta_d).all()
