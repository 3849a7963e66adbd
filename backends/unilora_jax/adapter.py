"""Adapter: the meaning of θ_d for one tree of parameters. It is a pytree of its own; nothing is mutated."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from unilora_core import ProjectionSpec, rates
from unilora_core.methods import method_of
from unilora_core.resizing import grown, shrunk
from unilora_jax import export, growing, saving
from unilora_jax.chains import Chains
from unilora_jax.checks import checked_theta
from unilora_jax.merging import merged
from unilora_jax.targets import Target
from unilora_jax.wrapping import wrapped

__all__ = ["Adapter"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """The way in which θ_d adapts a tree of parameters. `plan` and `load` make it; it holds neither θ_d nor the
    parameters.

    An adapter is a pytree whose leaves are a few arrays (1/√n_j, θ_d⁰, cached groups, frozen arrays of the method).
    Where they are large, pass it to the jitted step as an argument: arrays that a jitted function closes over become
    constants of its program.

    Attributes:
        chains: the updates that θ_d makes for each leaf.
    """

    chains: Chains

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapted leaves, or blocks of them."""
        return self.chains.targets

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The paths and shapes of the adapted leaves."""
        return self.chains.shapes

    @property
    def spec(self) -> ProjectionSpec:
        """The spec, which fixes P and what its numbers build."""
        return self.chains.spec

    def init(self) -> Array:
        """Draw θ_d⁰: (d,) float32, where training starts."""
        return jnp.asarray(self.spec.init())

    def factors(self, theta_d: Array) -> dict[str, Array]:
        """Compute the factors by name, such as A (r, in) and B (out, r) of each pair; float32, differentiable in
        ``theta_d``.
        """
        return self.chains.factors(checked_theta(self.chains, theta_d, "factors"))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make the adapted model: ``function(params, …)`` becomes ``f(params, theta_d, …)``.

        Beside each product x·W of an adapted weight the low-rank path x·Aᵀ·Bᵀ is added; neither B·A nor a gradient of W
        is ever made. It composes with `jit`, `grad` (of ``theta_d``), `vmap` (over several θ_d, too), `scan`,
        `checkpoint` and sharding. Arrays among the arguments are traced, everything else is static.

        To `jax.jit` it shows a signature of its own: that of ``function`` with ``theta_d`` after the first argument.
        What is static or donated keeps its name; its position is one more.

        Raises (when the wrapped function is called):
            MismatchError: a leaf of ``params`` is missing or has another shape than the plan's.
            TargetError: the model never multiplies by an adapted weight, contracts other axes than the plan's inputs,
                or reads it in an operation that has no low-rank path.
            ValuesError: ``theta_d`` has another shape, or is no array of JAX or NumPy of float32 or wider; or the
                adapter was cast; or the function returns something that is no array and no number.
        """
        return wrapped(self.chains, function)

    def merge(self, params: Any, theta_d: Array) -> Any:
        """Make a new tree in which B·A is added to each adapted weight, in float32 or the weight's wider dtype, rounded
        once.

        Call it under `jax.jit`, as all that computes factors: outside, each operation is compiled by itself. Inside no
        value can be looked at, so NaN and infinity are not refused there.

        Raises:
            MismatchError: a leaf of ``params`` is missing or has another shape than the plan's.
            ValuesError: ``theta_d`` does not fit, or holds NaN or infinity; or a weight's dtype cannot hold W + B·A
                where it holds W.
        """
        return merged(self.chains, params, theta_d)

    def learning_rate(self, lora_rate: float) -> float:
        """Return the rate for θ_d that trains as LoRA would at ``lora_rate`` (see `unilora_core.rates`)."""
        return rates.theta_rate(self.spec, lora_rate)

    def grow(self, theta_d: Array, factor: int = 2) -> tuple["Adapter", Array]:
        """Return the adapter of ``factor`` times d, and its θ_d: the adapted model computes what it did.

        `unilora_core.resizing.carried` does the same with the state of an optimiser; `learning_rate` changes. Call it
        outside of `jax.jit`; inside, `unilora_core.resizing.grow` gives θ_d alone.

        Raises:
            SpecError: the map's P does not nest (only ``balanced`` does), or the new d is past D; the error has the
                remedy.
            ValuesError: ``theta_d`` does not fit.
        """
        chains, theta_d = growing.resized(self.chains, grown(self.spec, factor), theta_d, "grow")
        return Adapter(chains), theta_d

    def shrink(self, theta_d: Array, factor: int = 2) -> tuple["Adapter", Array]:
        """Return the adapter of d / ``factor``, and the θ_d that computes most nearly the same; it undoes a growth.

        Raises:
            SpecError: the map's P does not nest, or ``factor`` does not divide d.
            ValuesError: ``theta_d`` does not fit.
        """
        chains, theta_d = growing.resized(self.chains, shrunk(self.spec, factor), theta_d, "shrink")
        return Adapter(chains), theta_d

    def summary(self) -> str:
        """Say in one line what trains, and how little of the model it is."""
        spec, targets = self.spec, sum(len(target.names) for target in self.targets)
        D = f"{spec.D:,} LoRA parameters" if spec.frame == "pair" else f"{spec.D:,} ({method_of(spec) or spec.frame})"
        return f"θ_d: {spec.d:,} numbers for D = {D} of {targets} targets"

    def __repr__(self) -> str:
        return f"Adapter({self.summary()})"

    def __hash__(self) -> int:
        raise TypeError(
            "an Adapter holds arrays, so it has no hash: pass it to a jitted function as an argument that is not "
            "static; as a key take adapter.spec, or (adapter.spec, adapter.targets)."
        )

    # ---- files ----

    def save(
        self,
        path: str | os.PathLike,
        theta_d: Array,
        *,
        rename: Callable[[str], str] = str,
        tensors: Mapping[str, Array] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write θ_d, the spec and the targets as one file, atomically; `unilora_torch.load` reads it too.

        Args:
            rename: a function from a layer's name here (``layers_0.q_proj``) to its name in other frameworks.
            tensors: what was trained beside θ_d, by name (``head.weight``, in PyTorch's shape if PyTorch is to read
                it).

        Raises:
            ValuesError: ``theta_d`` does not fit, or holds NaN or infinity; an old file at ``path`` is kept.
            OSError: the file cannot be written; the error names the path.
        """
        saving.save(self.chains, path, theta_d, rename, tensors or {}, metadata or {})

    def export_lora(
        self,
        folder: str | os.PathLike,
        theta_d: Array,
        *,
        base_model: str | None = None,
        rename: Callable[[str], str] = str,
        rank: int | None = None,
        engine: str | None = None,
    ) -> None:
        """Write A and B, exactly, as a PEFT LoRA folder for the model of the same layers in PyTorch.

        Both files appear together; other files in the folder stay.

        Args:
            base_model: ``base_model_name_or_path``, the name or path of that model.
            rename: a function from a layer's name here (``layers.0.attn.q_proj``) to its name there.
            rank: the rank of every layer, smaller ones filled up with zeros; by default the largest that one needs, and
                for vLLM the next that it can be started with.
            engine: ``"vllm"``, ``"sglang"``, ``"lorax"`` or ``"llama.cpp"``, to write only what it would serve
                (`unilora_core.engines`).

        Raises:
            AdapterFileError: ``engine`` would not serve it; the error has every reason. Nothing is written.
            SpecError: a layer needs a rank above ``rank``, or the engine is unknown.
            ValuesError: ``theta_d`` does not fit, or it or a factor holds NaN or infinity; old files are kept.
            OSError: a file cannot be written; the error names the path.
        """
        export.export_lora(self.chains, folder, theta_d, base_model, rename, rank, engine)
