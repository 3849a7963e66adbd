"""Adapter: the one owner of θ_d, and the low-rank path beside each target.

The model is not rebuilt: each target keeps its class, its name and its place in `state_dict`, and a forward hook adds
B·A·x to its output. θ_d is the parameter ``unilora.theta_d`` of the model.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import ProjectionSpec, TargetError, ValuesError, rates, save_adapter
from unilora_core.targets import write_targets
from unilora_torch.paths import LowRankPath
from unilora_torch.projection import project
from unilora_torch.targets import Target

__all__ = ["NAME", "Adapter"]

NAME = "unilora"
"""The adapter's name among the model's submodules."""


class Adapter(nn.Module):
    """One trainable vector beside a frozen model. Made by `attach` and `load`.

    Attributes:
        theta_d: (d,) float32, the one trainable `nn.Parameter`; it stays float32 when the model is cast.
        spec: what fixes P.
        targets: what is adapted, in layout order.
        modules_to_save: names of modules that train in full and are saved with θ_d, such as a classifier.
        merged: whether the base weights hold B·A at the moment.
    """

    theta_d: nn.Parameter
    _groups: Tensor
    _scale: Tensor
    _origin: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        spec: ProjectionSpec,
        targets: tuple[Target, ...],
        modules_to_save: tuple[str, ...] = (),
    ):
        super().__init__()
        self.spec, self.targets, self.modules_to_save = spec, targets, modules_to_save
        self.theta_d = nn.Parameter(torch.from_numpy(spec.init()))
        identity = spec.start == "identity"
        self.register_buffer("_groups", _table_index(spec), persistent=False)
        self.register_buffer("_scale", torch.from_numpy(spec.scale()), persistent=False)
        self.register_buffer("_origin", self.theta_d.detach().clone() if identity else None, persistent=False)
        self.to(model.get_submodule(targets[0].module).weight.device)
        self.merged = False
        self._enabled = True
        self._current: dict[str, Tensor] | None = None
        self._unreached = {target.module for target in targets}
        self._originals: dict[str, Tensor] = {}
        self._slices = spec.layout.slices  # read here once: torch.compile cannot trace the cached property's lock
        self._root = (model,)  # a tuple, so that the model does not become a submodule of its own submodule
        self._was_trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._handles = [model.register_forward_pre_hook(self._open)]
        for module in dict.fromkeys(target.module for target in targets):
            parts = tuple(target for target in targets if target.module == module)
            layer = model.get_submodule(module)
            self._handles.append(layer.register_forward_hook(LowRankPath(self, parts), with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._close, always_call=True))

    def __repr__(self) -> str:
        return f"Adapter({self.summary()})"

    def forward(self, x: Any) -> Any:
        """``x`` itself: an `nn.Sequential` calls the adapter as its last submodule."""
        return x

    # ---- A and B ------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, Tensor]:
        """Name → A (r, in) or B (out, r) of each target, float32, differentiable in θ_d."""
        theta_D = project(self.theta_d, self._groups, self._scale, self._origin)
        return _split(theta_D, self.spec.layout.shapes)

    def factors_of(self, target: Target) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one target.

        Inside the model's forward pass they are views of one θ_D, projected once for all targets. Elsewhere (a
        submodule called alone, or recomputed by gradient checkpointing) they are projected alone. Autograd saves the
        same tensors on both ways, so that non-reentrant checkpointing accepts the one for the other.
        """
        names = f"{target.name}.A", f"{target.name}.B"
        factors = self._current
        if factors is None:
            A, B = (self._slices[name] for name in names)
            groups = self._groups[A.start : B.stop]
            if A.stop != B.start:  # a file may hold another order
                groups = torch.cat([self._groups[A], self._groups[B]])
            both = project(self.theta_d, groups, self._scale, self._origin)
            factors = _split(both, {name: self.spec.layout.shapes[name] for name in names})
        return factors[names[0]], factors[names[1]]

    def delta_weight(self, target: Target) -> Tensor:
        """B·A of one target in the orientation of its weight, float32, no gradient."""
        with torch.no_grad():
            A, B = self.factors_of(target)
            return (B @ A).T if target.transposed else B @ A

    @property
    def active(self) -> bool:
        """Whether the low-rank paths add to the outputs: not disabled, not merged."""
        return self._enabled and not self.merged

    def _open(self, _module: nn.Module, _args: Any) -> None:
        self._current = self.factors() if self.active else None

    def _close(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._current = None
        if output is not None and self.active:
            self._check_reached()

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def _check_reached(self) -> None:
        if not self._unreached:
            return
        names, self._unreached = sorted(self._unreached), set()
        raise TargetError(
            f"{names[0]}: the model's forward pass never calls this module ({len(names)} such targets), so its update "
            "would do nothing; some models use a layer's weight directly. Exclude it, or choose other targets."
        )

    # ---- training -----------------------------------------------------------------------------------------------

    def learning_rate(self, lora_rate: float) -> float:
        """The rate for θ_d that trains as LoRA would at ``lora_rate`` (see `unilora_core.rates`)."""
        return rates.theta_rate(self.spec, lora_rate)

    def parameter_groups(self, lora_rate: float, head_rate: float | None = None) -> list[dict]:
        """Groups for a torch optimiser: θ_d at `learning_rate` without weight decay, then the modules to save.

        Args:
            lora_rate: the learning rate that LoRA would have.
            head_rate: the rate of the modules to save; ``lora_rate`` unless given.
        """
        groups = [{"params": [self.theta_d], "lr": self.learning_rate(lora_rate), "weight_decay": 0.0}]
        if head := list(self._saved_parameters().values()):
            groups.append({"params": head, "lr": lora_rate if head_rate is None else head_rate})
        return groups

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once and check that every target is reached and gives θ_d a gradient.

        Args:
            *args, **kwargs: example inputs of the model.

        Raises:
            TargetError: a target that is bypassed, or through which no gradient flows; or the adapter is merged or
                disabled.
        """
        if not self.active:
            raise TargetError(
                "verify: the adapter is merged or disabled, so no gradient reaches θ_d; unmerge it first."
            )
        model, loss = self._root[0], self.theta_d.new_zeros((), requires_grad=True)
        was_training = [module for module in model.modules() if module.training]
        seen: dict[str, Tensor] = {}
        try:
            model.eval()
            with torch.enable_grad():
                handle = model.register_forward_pre_hook(lambda *_: seen.update(self._current or {}))
                try:
                    output = model(*args, **kwargs)
                finally:
                    handle.remove()
                for tensor in _floats(output):
                    noise = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape).cos()
                    loss = loss + (tensor.float() * noise).sum()
                grads = torch.autograd.grad(loss, list(seen.values()), allow_unused=True)
        finally:
            for module in was_training:
                module.training = True
        alive = {name for name, grad in zip(seen, grads, strict=True) if grad is not None and grad.any()}
        dead = [target.name for target in self.targets if not {f"{target.name}.A", f"{target.name}.B"} & alive]
        if dead:
            raise TargetError(f"{dead[0]}: no gradient reaches θ_d through this target ({len(dead)} such); exclude it.")

    def summary(self) -> str:
        """One line: what trains, and how little of the model it is."""
        head = sum(parameter.numel() for parameter in self._saved_parameters().values())
        total = sum(parameter.numel() for parameter in self._root[0].parameters())
        trained = self.spec.d + head
        return (
            f"θ_d: {self.spec.d:,} numbers for D = {self.spec.D:,} LoRA parameters of {len(self.targets)} targets"
            + (f"; {', '.join(self.modules_to_save)}: {head:,}" if head else "")
            + f"; trained: {trained:,} of {total:,} ({trained / total:.3%})"
        )

    # ---- on, off, merged ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model's outputs inside the ``with`` (merged weights are taken out and put back)."""
        enabled, merged = self._enabled, self.merged
        if merged:
            self.unmerge()
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = enabled
            if merged:
                self.merge()

    def merge(self) -> None:
        """Add B·A to each target's weight, once; a copy of the original weights is kept for `unmerge`.

        The sum is made in float32 and rounded once to the weight's dtype.

        Raises:
            TargetError: a quantised weight, which cannot take the update.
            ValuesError: θ_d holds NaN or infinity. Nothing has changed then.
        """
        if self.merged:
            return
        self._check_finite("merge")
        weights = {target.module: self._weight(target) for target in self.targets}
        originals = {module: weight.detach().clone() for module, weight in weights.items()}
        with torch.no_grad():
            for target in self.targets:
                block = _block(weights[target.module], target)
                block.copy_(_block(originals[target.module], target).float() + self.delta_weight(target))
        self._originals, self.merged = originals, True

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        with torch.no_grad():
            for module, original in self._originals.items():
                weight = self._root[0].get_submodule(module).weight
                weight.copy_(original)
        self._originals, self.merged = {}, False

    def detach(self) -> None:
        """Take the adapter off: the base model is as before `attach`, but for the values of `modules_to_save`."""
        model = self._root[0]
        self.unmerge()
        for handle in self._handles:
            handle.remove()
        delattr(model, NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._was_trainable)

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """Write θ_d, the spec, the targets and the modules to save as one file, atomically.

        Raises:
            ValuesError: θ_d holds NaN or infinity; an old file at ``path`` is kept.
        """
        model = self._root[0]
        tensors = {
            f"{module}.{name}": _storable(tensor)
            for module in self.modules_to_save
            for name, tensor in model.get_submodule(module).state_dict().items()
        }
        rows = [(t.name, t.module, t.first_row, t.transposed) for t in self.targets]
        written = write_targets(rows, self.modules_to_save)
        theta_d = self.theta_d.detach().cpu().numpy()
        save_adapter(path, self.spec, theta_d, tensors=tensors, metadata=written | dict(metadata or {}))

    def export_lora(self, folder: str | os.PathLike, base_model: str | None = None) -> None:
        """Write A and B, exactly, as a PEFT LoRA folder; see `unilora_torch.lora.export_lora`."""
        from unilora_torch.lora import export_lora

        self._check_finite("export_lora")
        export_lora(self, folder, base_model)

    # ---- internals ----------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but never to another dtype: θ_d and the scale stay float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        was_meta = self._groups.is_meta
        super()._apply(move, recurse)
        if was_meta and not self._groups.is_meta:  # `to_empty`: P is made again, θ_d waits for its `load_state_dict`
            device = self._groups.device
            self._groups, self._scale = _table_index(self.spec).to(device), self.spec.scale(xp=torch, device=device)
            if self._origin is not None:
                self._origin = self.spec.init(xp=torch, device=device)
        return self

    def _saved_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{module}.{name}": parameter
            for module in self.modules_to_save
            for name, parameter in self._root[0].get_submodule(module).named_parameters()
        }

    def _weight(self, target: Target) -> Tensor:
        weight = self._root[0].get_submodule(target.module).weight
        if not weight.is_floating_point():
            raise TargetError(
                f"{target.module}: a weight of {weight.dtype} cannot take the update; merge into an unquantised copy "
                "of the base model."
            )
        return weight

    def _check_finite(self, what: str) -> None:
        if not torch.isfinite(self.theta_d).all():
            raise ValuesError(
                f"{what}: theta_d holds NaN or infinity; training diverged (a lower learning rate, or gradient "
                "clipping). Nothing was changed."
            )


def _table_index(spec: ProjectionSpec) -> Tensor:
    """The groups, (D,) int32; for the identity start those of the factors B point into the second half of the table."""
    groups = torch.from_numpy(spec.groups())
    if spec.start == "identity":
        for name, at in spec.layout.slices.items():
            if name.endswith(".B"):
                groups[at] += spec.d
    return groups


def _split(theta_D: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """As `Layout.split`, by one `torch.split`, whose gradient is one concatenation (that of a slice fills D zeros)."""
    parts = theta_D.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


def _block(weight: Tensor, target: Target) -> Tensor:
    rows = slice(target.first_row, target.first_row + target.out_features)
    return weight[:, rows] if target.transposed else weight[rows]


def _storable(tensor: Tensor) -> Any:
    """A NumPy array; bfloat16, which NumPy lacks, as float32 (exact)."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor with a gradient in a nested output."""
    leaves = torch.utils._pytree.tree_leaves(output if not hasattr(output, "to_tuple") else output.to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
