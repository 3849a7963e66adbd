"""A small Llama and a small ViT in PyTorch, and the same models, with the same weights, in each style of JAX.

torch, flax and equinox are imported where they are needed: the module loads without them.
"""

import re
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path


@dataclass(frozen=True)
class LlamaConfig:
    vocabulary: int = 50
    hidden: int = 32
    intermediate: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    rope_base: float = 10000.0
    eps: float = 1e-6

    @property
    def head_size(self):
        return self.hidden // self.heads

    @property
    def projections(self):
        """Block → projection → (inputs, outputs)."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "self_attn": {
                "q_proj": (self.hidden, queries),
                "k_proj": (self.hidden, keys),
                "v_proj": (self.hidden, keys),
                "o_proj": (queries, self.hidden),
            },
            "mlp": {
                "gate_proj": (self.hidden, self.intermediate),
                "up_proj": (self.hidden, self.intermediate),
                "down_proj": (self.intermediate, self.hidden),
            },
        }


@dataclass(frozen=True)
class ViTConfig:
    image: int = 16
    patch: int = 4
    channels: int = 3
    hidden: int = 32
    mlp_ratio: int = 2
    layers: int = 2
    heads: int = 4
    classes: int = 5
    eps: float = 1e-6

    @property
    def patches(self):
        return (self.image // self.patch) ** 2


SMALL_LLAMA = LlamaConfig()


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def torch_llama(seed=0, **sizes):
    """model(tokens (batch, length)) → logits (batch, length, vocabulary), with the names of Hugging Face."""
    return _seeded(_torch_llama_class(), LlamaConfig(**sizes), seed)


def torch_vit(seed=0, **sizes):
    """model(images (batch, channels, height, width)) → logits (batch, classes), with the names of timm."""
    return _seeded(_torch_vit_class(), ViTConfig(**sizes), seed)


def _seeded(cls, config, seed):
    """A model in which the norms and the tokens of a ViT are random too."""
    import torch

    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name in ("cls_token", "pos_embed"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@cache
def _torch_llama_class():
    import torch
    from torch import nn
    from torch.nn import functional as F

    def rotate(x, base):
        """Rotary positions for (…, length, head_size)."""
        length, half = x.shape[-2], x.shape[-1] // 2
        frequencies = base ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(length, device=x.device)[:, None] * frequencies
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Projections(nn.Module):
        def __init__(self, config, block):
            super().__init__()
            self.config = config
            for name, (inputs, outputs) in config.projections[block].items():
                self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    class Attention(Projections):
        def forward(self, x):
            q, k, v = (
                projection(x).unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)
                for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = rotate(q, self.config.rope_base), rotate(k, self.config.rope_base)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(y.transpose(1, 2).flatten(2))

    class Mlp(Projections):
        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.input_layernorm = nn.RMSNorm(config.hidden, config.eps)
            self.self_attn = Attention(config, "self_attn")
            self.post_attention_layernorm = nn.RMSNorm(config.hidden, config.eps)
            self.mlp = Mlp(config, "mlp")

        def forward(self, x):
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))

    class Llama(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.hidden, config.eps)
            self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

        def forward(self, tokens):
            x = self.embed_tokens(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(self.norm(x))

    return Llama


@cache
def _torch_vit_class():
    import torch
    from torch import nn
    from torch.nn import functional as F

    class PatchEmbed(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.proj = nn.Conv2d(config.channels, config.hidden, config.patch, config.patch)

        def forward(self, images):
            return self.proj(images).flatten(2).transpose(1, 2)

    class Attention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.heads = config.heads
            self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
            self.proj = nn.Linear(config.hidden, config.hidden)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.fc1 = nn.Linear(config.hidden, config.mlp_ratio * config.hidden)
            self.fc2 = nn.Linear(config.mlp_ratio * config.hidden, config.hidden)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.norm1 = nn.LayerNorm(config.hidden, config.eps)
            self.attn = Attention(config)
            self.norm2 = nn.LayerNorm(config.hidden, config.eps)
            self.mlp = Mlp(config)

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.patch_embed = PatchEmbed(config)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden))
            self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, config.hidden))
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.hidden, config.eps)
            self.head = nn.Linear(config.hidden, config.classes)

        def forward(self, images):
            x = self.patch_embed(images)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    return ViT


# ---- what the JAX twins share ---------------------------------------------------------------------------------------


def _array(parameter):
    """A copy: training one twin leaves the others alone."""
    return jnp.array(parameter.detach().cpu().numpy())


def _flax_like(tree, torch_model):
    """The tree with each leaf from the torch parameter of the same name; kernels get the inputs before the outputs."""
    parameters = dict(torch_model.named_parameters())

    def value(path, _):
        name = re.sub(r"layers_(\d+)", r"layers.\1", _dotted(path)).removesuffix(".value")  # Linen, NNX
        module, _, leaf = name.rpartition(".")
        if leaf in ("scale", "embedding"):
            return _array(parameters[f"{module}.weight"])
        if leaf == "kernel":
            weight = parameters[f"{module}.weight"]
            return _array(weight.permute(*range(2, weight.ndim), 1, 0))
        return _array(parameters[name])

    return tree_map_with_path(value, tree)


def _dotted(path):
    return keystr(path, simple=True, separator=".")


def _rotate(x, base):
    """Rotary positions for (…, length, heads, head_size)."""
    length, half = x.shape[-3], x.shape[-1] // 2
    angles = jnp.arange(length)[:, None, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(q, k, v, config):
    """Causal attention; everything is (…, length, features)."""
    q, k, v = (x.reshape(*x.shape[:-1], -1, config.head_size) for x in (q, k, v))
    q, k = _rotate(q, config.rope_base), _rotate(k, config.rope_base)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return y.reshape(*y.shape[:-2], -1)


# ---- Flax NNX -------------------------------------------------------------------------------------------------------


def nnx_llama(torch_model):
    """model(tokens (batch, length)) → logits."""
    return _nnx_twin(_nnx_llama_class(), torch_model)


def nnx_vit(torch_model):
    """model(images (batch, height, width, channels)) → logits."""
    return _nnx_twin(_nnx_vit_class(), torch_model)


def _nnx_twin(cls, torch_model):
    from flax import nnx

    model = nnx.eval_shape(lambda: cls(torch_model.config, nnx.Rngs(0)))
    nnx.update(model, _flax_like(nnx.state(model, nnx.Param), torch_model))
    return model


@cache
def _nnx_llama_class():
    from flax import nnx

    class Projections(nnx.Module):
        def __init__(self, config, block, rngs):
            self.config = config
            for name, (inputs, outputs) in config.projections[block].items():
                setattr(self, name, nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs))

    class Attention(Projections):
        def __call__(self, x):
            return self.o_proj(_attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.config))

    class Mlp(Projections):
        def __call__(self, x):
            return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(nnx.Module):
        def __init__(self, config, rngs):
            self.input_layernorm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
            self.self_attn = Attention(config, "self_attn", rngs)
            self.post_attention_layernorm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
            self.mlp = Mlp(config, "mlp", rngs)

        def __call__(self, x):
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))

    class Llama(nnx.Module):
        def __init__(self, config, rngs):
            self.config = config
            self.embed_tokens = nnx.Embed(config.vocabulary, config.hidden, rngs=rngs)
            self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
            self.norm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
            self.lm_head = nnx.Linear(config.hidden, config.vocabulary, use_bias=False, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed_tokens(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(self.norm(x))

    return Llama


@cache
def _nnx_vit_class():
    from flax import nnx

    class PatchEmbed(nnx.Module):
        def __init__(self, config, rngs):
            size = (config.patch, config.patch)
            self.proj = nnx.Conv(config.channels, config.hidden, size, size, padding="VALID", rngs=rngs)

        def __call__(self, images):
            x = self.proj(images)
            return x.reshape(len(x), -1, x.shape[-1])

    class Attention(nnx.Module):
        def __init__(self, config, rngs):
            self.heads = config.heads
            self.qkv = nnx.Linear(config.hidden, 3 * config.hidden, rngs=rngs)
            self.proj = nnx.Linear(config.hidden, config.hidden, rngs=rngs)

        def __call__(self, x):
            q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:-1], 3, self.heads, -1), -3, 0)
            return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))

    class Mlp(nnx.Module):
        def __init__(self, config, rngs):
            self.fc1 = nnx.Linear(config.hidden, config.mlp_ratio * config.hidden, rngs=rngs)
            self.fc2 = nnx.Linear(config.mlp_ratio * config.hidden, config.hidden, rngs=rngs)

        def __call__(self, x):
            return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))

    class Block(nnx.Module):
        def __init__(self, config, rngs):
            self.norm1 = nnx.LayerNorm(config.hidden, epsilon=config.eps, rngs=rngs)
            self.attn = Attention(config, rngs)
            self.norm2 = nnx.LayerNorm(config.hidden, epsilon=config.eps, rngs=rngs)
            self.mlp = Mlp(config, rngs)

        def __call__(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class ViT(nnx.Module):
        def __init__(self, config, rngs):
            self.config = config
            self.patch_embed = PatchEmbed(config, rngs)
            self.cls_token = nnx.Param(jnp.zeros((1, 1, config.hidden)))
            self.pos_embed = nnx.Param(jnp.zeros((1, config.patches + 1, config.hidden)))
            self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
            self.norm = nnx.LayerNorm(config.hidden, epsilon=config.eps, rngs=rngs)
            self.head = nnx.Linear(config.hidden, config.classes, rngs=rngs)

        def __call__(self, images):
            x = self.patch_embed(images)
            first = jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([first, x], 1) + self.pos_embed[...]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    return ViT


# ---- Equinox --------------------------------------------------------------------------------------------------------


def eqx_llama(torch_model):
    """model(tokens (length,)) → logits of one sequence; `jax.vmap(model)` for a batch."""
    import equinox as eqx

    parameters = dict(torch_model.named_parameters())
    shapes = eqx.filter_eval_shape(_eqx_llama_class(), torch_model.config, jax.random.key(0))
    return tree_map_with_path(lambda path, _: _array(parameters[_dotted(path)]), shapes)


@cache
def _eqx_llama_class():
    import equinox as eqx

    class Attention(eqx.Module):
        q_proj: eqx.nn.Linear
        k_proj: eqx.nn.Linear
        v_proj: eqx.nn.Linear
        o_proj: eqx.nn.Linear
        config: LlamaConfig = eqx.field(static=True)

        def __init__(self, config, key):
            self.config = config
            for name, (inputs, outputs) in config.projections["self_attn"].items():
                setattr(self, name, eqx.nn.Linear(inputs, outputs, use_bias=False, key=key))

        def __call__(self, x):
            q, k, v = (jax.vmap(projection)(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
            return jax.vmap(self.o_proj)(_attend(q, k, v, self.config))

    class Mlp(eqx.Module):
        gate_proj: eqx.nn.Linear
        up_proj: eqx.nn.Linear
        down_proj: eqx.nn.Linear

        def __init__(self, config, key):
            for name, (inputs, outputs) in config.projections["mlp"].items():
                setattr(self, name, eqx.nn.Linear(inputs, outputs, use_bias=False, key=key))

        def __call__(self, x):
            return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(eqx.Module):
        input_layernorm: eqx.nn.RMSNorm
        self_attn: Attention
        post_attention_layernorm: eqx.nn.RMSNorm
        mlp: Mlp

        def __init__(self, config, key):
            self.input_layernorm = eqx.nn.RMSNorm(config.hidden, eps=config.eps, use_bias=False)
            self.self_attn = Attention(config, key)
            self.post_attention_layernorm = eqx.nn.RMSNorm(config.hidden, eps=config.eps, use_bias=False)
            self.mlp = Mlp(config, key)

        def __call__(self, x):
            x = x + self.self_attn(jax.vmap(self.input_layernorm)(x))
            return x + jax.vmap(self.mlp)(jax.vmap(self.post_attention_layernorm)(x))

    class Llama(eqx.Module):
        embed_tokens: eqx.nn.Embedding
        layers: list
        norm: eqx.nn.RMSNorm
        lm_head: eqx.nn.Linear

        def __init__(self, config, key):
            self.embed_tokens = eqx.nn.Embedding(config.vocabulary, config.hidden, key=key)
            self.layers = [Layer(config, key) for _ in range(config.layers)]
            self.norm = eqx.nn.RMSNorm(config.hidden, eps=config.eps, use_bias=False)
            self.lm_head = eqx.nn.Linear(config.hidden, config.vocabulary, use_bias=False, key=key)

        def __call__(self, tokens):
            x = jax.vmap(self.embed_tokens)(tokens)
            for layer in self.layers:
                x = layer(x)
            return jax.vmap(self.lm_head)(jax.vmap(self.norm)(x))

    return Llama


# ---- Flax Linen -----------------------------------------------------------------------------------------------------


def linen_llama(torch_model):
    """(module, params), for module.apply({"params": params}, tokens (batch, length)) → logits."""
    module = _linen_llama_class()(torch_model.config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    return module, _flax_like(shapes, torch_model)


@cache
def _linen_llama_class():
    from flax import linen

    class Attention(linen.Module):
        """In the compact style; the other modules are in that of setup."""

        config: LlamaConfig

        @linen.compact
        def __call__(self, x):
            sizes = {name: outputs for name, (_, outputs) in self.config.projections["self_attn"].items()}
            q, k, v = (
                linen.Dense(sizes[name], use_bias=False, name=name)(x) for name in ("q_proj", "k_proj", "v_proj")
            )
            y = _attend(q, k, v, self.config)
            return linen.Dense(sizes["o_proj"], use_bias=False, name="o_proj")(y)

    class Mlp(linen.Module):
        config: LlamaConfig

        def setup(self):
            self.gate_proj = linen.Dense(self.config.intermediate, use_bias=False)
            self.up_proj = linen.Dense(self.config.intermediate, use_bias=False)
            self.down_proj = linen.Dense(self.config.hidden, use_bias=False)

        def __call__(self, x):
            return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))

    class Layer(linen.Module):
        config: LlamaConfig

        def setup(self):
            self.input_layernorm = linen.RMSNorm(self.config.eps)
            self.self_attn = Attention(self.config)
            self.post_attention_layernorm = linen.RMSNorm(self.config.eps)
            self.mlp = Mlp(self.config)

        def __call__(self, x):
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))

    class Llama(linen.Module):
        config: LlamaConfig

        def setup(self):
            self.embed_tokens = linen.Embed(self.config.vocabulary, self.config.hidden)
            self.layers = [Layer(self.config) for _ in range(self.config.layers)]
            self.norm = linen.RMSNorm(self.config.eps)
            self.lm_head = linen.Dense(self.config.vocabulary, use_bias=False)

        def __call__(self, tokens):
            x = self.embed_tokens(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(self.norm(x))

    return Llama


# ---- functions on a dict of stacked parameters ----------------------------------------------------------------------


def stacked_llama(torch_model):
    """A dict of arrays; those under "layers" have one more axis in front, the layer."""
    config, parameters = torch_model.config, dict(torch_model.named_parameters())

    def stack(name):
        return jnp.stack([_array(parameters[f"layers.{i}.{name}.weight"]) for i in range(config.layers)])

    layers = {name: stack(name) for name in ("input_layernorm", "post_attention_layernorm")}
    for block, names in config.projections.items():
        layers[block] = {name: {"kernel": stack(f"{block}.{name}").mT} for name in names}
    return {
        "embed": _array(parameters["embed_tokens.weight"]),
        "layers": layers,
        "norm": _array(parameters["norm.weight"]),
        "lm_head": {"kernel": _array(parameters["lm_head.weight"].T)},
    }


def stacked_llama_apply(params, tokens, remat=False, config=SMALL_LLAMA):
    """Logits (batch, length, vocabulary), by a `jax.lax.scan` over the layers; ``remat`` checkpoints each of them."""

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.eps) * scale

    def layer(x, p):
        attn, mlp = p["self_attn"], p["mlp"]
        y = norm(x, p["input_layernorm"])
        q, k, v = (y @ attn[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj"))
        x = x + _attend(q, k, v, config) @ attn["o_proj"]["kernel"]
        y = norm(x, p["post_attention_layernorm"])
        y = jax.nn.silu(y @ mlp["gate_proj"]["kernel"]) * (y @ mlp["up_proj"]["kernel"])
        return x + y @ mlp["down_proj"]["kernel"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, params["embed"][tokens], params["layers"])
    return norm(x, params["norm"]) @ params["lm_head"]["kernel"]


# ---- adapters -------------------------------------------------------------------------------------------------------


def moved(adapter, seed=1):
    """θ_d somewhere else than where training starts, so that B is not 0 after an identity start."""
    return adapter.init() + 0.3 * jax.random.normal(jax.random.key(seed), adapter.spec.d)
