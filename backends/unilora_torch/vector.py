"""Vector: θ_d beside a model, and all its state. Functions of other modules use it.

The model is not rebuilt: each target keeps its class, its name and its place in `state_dict`, and a forward hook adds
its update to the output. θ_d is the parameter ``unilora.theta_d`` of the model.
"""

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unilora_core import ProjectionSpec, SpecError, TargetError, ValuesError
from unilora_core.header import BaseIdentity
from unilora_torch.base import identity
from unilora_torch.calls import Handle
from unilora_torch.chains import Chains, Frozen, product
from unilora_torch.checks import weight_of
from unilora_torch.computed import Computed
from unilora_torch.frozen import check_names, frozen_of
from unilora_torch.gather import Gather
from unilora_torch.generic import Mapped
from unilora_torch.heads import parameters_of, state_of
from unilora_torch.live import Live, Streamed, alone
from unilora_torch.options import Groups
from unilora_torch.projection import Projection
from unilora_torch.streamed import Place
from unilora_torch.structure import Structure
from unilora_torch.targets import Target, shaped

__all__ = ["Vector", "attached", "check_name", "device_of", "projection_of"]

Part = TypeVar("Part", Projection, Chains)


class Vector(nn.Module):
    """The state of an adapter: θ_d, the spec that fixes P, and the model that it stands beside.

    Attributes:
        theta_d, spec, targets, modules_to_save, base: see `Adapter`.
        projection: P; ``projection(theta_d, spans)`` gives numbers of θ_D.
        groups: whether it has a table of the groups, or computes them.
        chains: from the factors of a target to its chain.
        placed: the device of the tensors of these two; None before it is known.
        live: the live state that its hooks read.
        structure: the modules of its targets, and what has their names now.
        handles: the handles that `detach` removes, in this order.
        kept_heads: the state of the modules to save, while it is switched off.
        originals: the weights as they were before `merge`, by name; empty while not merged.
        taken_out: the claim on the model of a merged adapter that is disabled.
        trained_before: the names of the parameters that trained before the first adapter came.
    """

    theta_d: nn.Parameter
    spec: ProjectionSpec
    targets: tuple[Target, ...]
    modules_to_save: tuple[str, ...]
    base: BaseIdentity | None
    projection: Projection
    placed: torch.device | None

    def __init__(
        self,
        model: nn.Module,
        spec: ProjectionSpec,
        targets: tuple[Target, ...],
        modules_to_save: tuple[str, ...] = (),
        frozen: Frozen | None = None,
        groups: Groups = "cached",
    ):
        """Make the state of an adapter; ``frozen`` holds the frozen arrays of a file, None makes them from the seed or
        the weights.
        """
        super().__init__()
        check_names(spec, modules_to_save)
        self.spec, self.targets, self.modules_to_save = spec, targets, modules_to_save
        self.chains = Chains.of(spec, targets, frozen_of(model, spec, targets) if frozen is None else frozen)
        self.groups = groups
        self.projection, self.placed = projection_of(spec, groups), None
        origin = self.projection.origin  # drawing it takes a while, so it is reused
        self.theta_d = nn.Parameter(torch.from_numpy(spec.init()) if origin is None else origin.clone())
        self.to(device_of(model, targets))
        self._settle()
        self.live = Live(self, (target.module for target in targets))
        self.structure = Structure(self.live, model, (target.module for target in targets))
        self.kept_heads: dict[str, Tensor] | None = None
        self.originals: dict[str, Tensor] = {}
        # read here once: torch.compile cannot trace the cached properties' lock; views of them cannot be copied
        self._slices, self._shapes, self._whole = dict(spec.layout.slices), dict(spec.layout.shapes), [slice(0, spec.D)]
        self.base = identity(model, (*modules_to_save, *attached(model)))
        self._model = (model,)  # a tuple, so that the model is no submodule of its own submodule
        self.trained_before = _trainable(model)
        self.taken_out: contextlib.AbstractContextManager[None] | None = None
        self.handles: list[Handle] = []

    @property
    def model(self) -> nn.Module:
        """The model that the adapter stands beside."""
        return self._model[0]

    @property
    def name(self) -> str:
        """The adapter's name among the model's submodules."""
        return next(name for name, child in self.model.named_children() if child is self)

    def forward(self, of: Any = None) -> Any:
        """Compute all factors (no argument), or the factors of one `Target`; for `Streamed` the product of its update
        with x.

        They are computed by calling the module, so that a wrapper of it, such as FSDP's, sees each use of θ_d. Whatever
        else comes is given back: an `nn.Sequential` calls the adapter as its last submodule.
        """
        if of is None or isinstance(of, Target):
            return self._factors(None if of is None else self.chains.names[of.name])
        if isinstance(of, Streamed):
            return self._product(of.x, of.target)
        return of

    def _product(self, x: Tensor, target: Target) -> Tensor:
        self._settle()
        projection, (name,) = self._placed(self.projection), self.chains.names[target.name]
        assert isinstance(projection, Computed)
        place = Place(self._slices[name].start, target.out_features, target.in_features)
        return projection.product(x, self.theta_d, place)

    @property
    def whole(self) -> bool:
        """Whether θ_D is projected at once, when a pass begins: it is small enough to be kept until its end."""
        return not (isinstance(self.projection, Computed) and self.spec.frame == "dense")

    def chain(self, factors: Mapping[str, Tensor], target: Target) -> tuple[Tensor, ...]:
        """Make the chain of one target from the factors."""
        chains = self.chains
        if chains.frozen:
            chains = self._placed(chains)
        return chains(factors, target)

    def _settle(self) -> None:
        """Refuse another dtype, and move the tensors of P and the chains to the device of θ_d."""
        if self.theta_d.dtype != torch.float32:
            raise ValuesError(
                f"theta_d is used as {self.theta_d.dtype}, expected float32; something casts parameters for the "
                "forward pass. With FSDP's mixed precision make the adapter a unit of its own, before the layers: "
                "fully_shard(model.unilora). With DeepSpeed load the base in the lower precision, without bf16 or fp16."
            )
        device = self.theta_d.device
        if self.placed != device and device.type != "meta":  # its values would be lost there
            self.projection, self.chains = self.projection.to(device), self.chains.to(device)
            self.placed = device

    def _placed(self, part: Part) -> Part:
        """Return P or the chains on the device of θ_d, where that is the meta device; else as they are."""
        return part.to(self.theta_d.device) if self.theta_d.is_meta else part

    def _factors(self, names: tuple[str, ...] | None) -> dict[str, Tensor]:
        self._settle()
        projection = self._placed(self.projection)
        if names is None:
            return _split(projection(self.theta_d, self._whole), self._shapes)
        numbers = projection(self.theta_d, [self._slices[name] for name in names])
        return _split(numbers, {name: self._shapes[name] for name in names})

    def delta_weight(self, target: Target) -> Tensor:
        """Compute the update of one target, B·A, in the orientation of its weight, float32, without gradient."""
        weight = weight_of(self.structure.modules[target.module], target)
        with torch.no_grad():
            return shaped(product(self.live.chain_of(target)), target, weight)

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script.

        Raises:
            TargetError: TorchScript has no hooks that are objects.
        """
        raise TargetError(
            "torch.jit.script: the hooks of an adapter cannot be scripted; merge it first by detach(merge=True), or "
            "use torch.jit.trace or torch.export, which keep the adapted outputs."
        )

    def heads(self) -> dict[str, Tensor]:
        """Return the state of the modules to save, under its names in the model's `state_dict`, also while switched
        off.
        """
        if self.kept_heads is not None:
            return self.kept_heads
        return {key: tensor for name in self.modules_to_save for key, tensor in state_of(self.model, name).items()}

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the modules to save, under their names in the model."""
        found = (parameters_of(self.model, name) for name in self.modules_to_save)
        return {name: parameter for parameters in found for name, parameter in parameters.items()}

    def reseed(self, spec: ProjectionSpec, frozen: Frozen | None = None) -> None:
        """Take the P and the frozen arrays of another spec of the same layout, map, d and start, in place."""
        frozen = frozen_of(self.model, spec, self.targets) if frozen is None else frozen
        held = self.chains.clones()
        before, self.spec = self.spec, spec
        try:
            self._take(spec, frozen)
        except BaseException:
            self._take(before, held)
            self.spec = before
            raise

    def _take(self, spec: ProjectionSpec, frozen: Frozen) -> None:
        self.projection.copy_(projection_of(spec, self.groups))
        self.chains.copy_(frozen)

    def alone(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Keep other threads from the model; see `live.alone`."""
        lives = {self.live: None} | {other.live: None for other in attached(self.model).values()}
        return alone(self.model, lives, what)

    def check_finite(self, what: str) -> None:
        """Refuse a θ_d that holds NaN or infinity.

        Raises:
            ValuesError: it does; the error names ``what``.
        """
        if not torch.isfinite(self.theta_d).all():
            raise ValuesError(
                f"{what}: theta_d holds NaN or infinity; training diverged (a lower learning rate, or gradient "
                "clipping). Nothing was changed."
            )

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but never to another dtype: θ_d and the scale stay float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def attached(model: nn.Module) -> dict[str, Vector]:
    """Return the adapters of a model by name, in the order in which they were attached."""
    return {name: child for name, child in model.named_children() if isinstance(child, Vector)}


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that an adapter cannot have.

    Raises:
        TargetError: the name is taken or invalid; the error has the remedy.
    """
    if isinstance(getattr(model, name, None), Vector):
        raise TargetError(
            f"the model already has an adapter {name!r}; call model.{name}.detach() first, or give another name=."
        )
    if hasattr(model, name) or not name.isidentifier():
        raise TargetError(
            f"{name!r} cannot be an adapter's name: it is no identifier, or the model has it already; give another "
            "name=."
        )


def device_of(model: nn.Module, targets: tuple[Target, ...]) -> torch.device:
    """Return the device of the first layer that has values."""
    layers = (model.get_submodule(target.module) for target in targets)
    tensors = (tensor for layer in layers for tensor in itertools.chain(layer.parameters(), layer.buffers()))
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def projection_of(spec: ProjectionSpec, groups: Groups = "cached") -> Gather | Computed | Mapped:
    """Make the projection of a spec: a table, or groups that are computed (also where D is that of ΔW itself), or
    another map.

    Raises:
        SpecError: the groups cannot be computed one by one; the error has the remedy.
    """
    if groups not in ("cached", "computed"):
        raise SpecError(f"groups must be 'cached' or 'computed', got {groups!r}.")
    if groups == "computed" and (spec.map.groups is None or spec.grouping == "numpy-shuffle"):
        raise SpecError(f"groups='computed': the grouping {spec.grouping!r} has no computed groups; leave groups out.")
    if spec.map.groups is None:
        return Mapped.of(spec)
    return Computed.of(spec) if spec.frame == "dense" or groups == "computed" else Gather.of(spec)


def _trainable(model: nn.Module) -> set[str]:
    """Return the names of the parameters that trained before there was an adapter."""
    first = next(iter(attached(model).values()), None)
    if first is not None:
        return first.trained_before
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _split(numbers: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Split numbers as `Layout.split` does, by one `torch.split`, whose gradient is one concatenation (that of a slice
    fills D zeros).
    """
    parts = numbers.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
