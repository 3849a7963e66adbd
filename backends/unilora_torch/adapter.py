"""Adapter: the one owner of θ_d, and the low-rank path beside each target.

The model is not rebuilt: each target keeps its class, its name and its place in `state_dict`, and a forward hook adds
B·A·x to its output. θ_d is the parameter ``unilora.theta_d`` of the model.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unilora_core import ProjectionSpec, TargetError, UniLoraError, ValuesError, rates, save_adapter
from unilora_core.header import write_identity, write_targets
from unilora_torch.base import identity
from unilora_torch.calls import Handle, surround
from unilora_torch.checks import plain_weight, weight_of, without_idle_experts
from unilora_torch.heads import check_apart
from unilora_torch.live import Entered, Live, alone
from unilora_torch.paths import add_paths
from unilora_torch.projection import project
from unilora_torch.reach import add_checks
from unilora_torch.tables import Tables
from unilora_torch.targets import Target, block_of, row_of, shaped, weight_name

__all__ = ["NAME", "Adapter", "adapters", "check_name", "device_of", "switch"]

NAME = "unilora"
"""The adapter's name among the model's submodules, unless another is given."""


class Adapter(nn.Module):
    """One trainable vector beside a frozen model. Made by `attach` and `load`.

    Attributes:
        theta_d: (d,) float32, the one trainable `nn.Parameter`; it stays float32 when the model is cast.
        spec: what fixes P.
        targets: what is adapted, in layout order.
        modules_to_save: names of modules that train in full and are saved with θ_d, such as a classifier.
        base: what tells the base model apart, for files, or None; see `unilora_torch.base.identity`.
        merged: whether the base weights hold B·A at the moment.
        enabled: whether it acts, in this thread or asyncio task; see `switch` and `disabled`.
        strength: what its B·A is multiplied by where several adapters act together; see `switch`.

    The model can be called by many threads at once. What would change the weights or the hooks under them (`merge`,
    `unmerge`, `swap`, `detach`, `switch`, `verify`) is refused while another thread is calling it.
    """

    theta_d: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        spec: ProjectionSpec,
        targets: tuple[Target, ...],
        modules_to_save: tuple[str, ...] = (),
    ):
        super().__init__()
        self.spec, self.targets, self.modules_to_save = spec, targets, modules_to_save
        self._tables = Tables.of(spec)
        origin = self._tables.origin  # drawing it takes a while, so it is not done twice
        self.theta_d = nn.Parameter(torch.from_numpy(spec.init()) if origin is None else origin.clone())
        self.to(device_of(model, targets))
        self._live = Live(self, (target.module for target in targets))
        self._unreached = self._live.unreached
        self._kept_heads: dict[str, Tensor] | None = None
        self._originals: dict[str, Tensor] = {}
        # read here once: torch.compile cannot trace the cached properties' lock
        self._slices, self._shapes = spec.layout.slices, spec.layout.shapes
        self.base = identity(model, (*modules_to_save, *adapters(model)))
        self._root = (model,)  # a tuple, so that the model does not become a submodule of its own submodule
        self._was_trainable = _trainable(model)
        self._claim: contextlib.AbstractContextManager[None] | None = None
        self._handles: list[Handle] = []

    def __repr__(self) -> str:
        return f"Adapter({self.summary()})"

    @property
    def name(self) -> str:
        """Its name among the model's submodules."""
        return next(name for name, child in self._root[0].named_children() if child is self)

    def forward(self, of: Any = None) -> Any:
        """All factors (no argument), or those of one `Target`.

        They are computed by calling the module, so that a wrapper of it, such as FSDP's, sees each use of θ_d. Whatever
        else comes is given back: an `nn.Sequential` calls the adapter as its last submodule.
        """
        if of is None or isinstance(of, Target):
            return self._factors(None if of is None else (f"{of.name}.A", f"{of.name}.B"))
        return of

    # ---- A and B ------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, Tensor]:
        """Name → A (r, in) or B (out, r) of each target, float32, differentiable in θ_d."""
        return self()

    def factors_of(self, target: Target) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), times `strength`, of one target; see `Live.factors_of`."""
        return self._live.factors_of(target)

    def _factors(self, names: tuple[str, str] | None) -> dict[str, Tensor]:
        if self.theta_d.dtype != torch.float32:
            raise ValuesError(
                f"theta_d is used as {self.theta_d.dtype}, expected float32; something casts parameters for the "
                "forward pass. With FSDP's mixed precision make the adapter a unit of its own, before the layers: "
                "fully_shard(model.unilora). With DeepSpeed load the base in the lower precision, without bf16 or fp16."
            )
        device = self.theta_d.device
        if self._tables.groups.device != device and device.type != "meta":  # where their values would be lost
            self._tables = self._tables.to(device)
        groups, scale, origin = self._tables.to(device)
        if names is None:
            return _split(project(self.theta_d, groups, scale, origin), self._shapes)
        A, B = (self._slices[name] for name in names)
        part = groups[A.start : B.stop]
        if A.stop != B.start:  # a file may hold another order
            part = torch.cat([groups[A], groups[B]])
        return _split(project(self.theta_d, part, scale, origin), {name: self._shapes[name] for name in names})

    def delta_weight(self, target: Target) -> Tensor:
        """B·A of one target in the orientation of its weight, float32, no gradient."""
        weight = weight_of(self._root[0].get_submodule(target.module), target)
        with torch.no_grad():
            A, B = self.factors_of(target)
            return shaped(B @ A, target, weight)

    @property
    def enabled(self) -> bool:
        """Whether it is switched on, and not disabled in this thread or asyncio task."""
        return self._live.enabled

    @property
    def merged(self) -> bool:
        """Whether the base weights hold B·A at the moment."""
        return self._live.merged

    @property
    def strength(self) -> float:
        """What its B·A is multiplied by."""
        return self._live.strength

    @property
    def active(self) -> bool:
        """Whether the low-rank paths add to the outputs: not disabled, not merged."""
        return self._live.acts()

    def put_on(self, name: str) -> None:
        """Hook it to its model, under this name: the base is frozen, the modules to save train.

        Raises:
            TargetError: another thread is calling the model.
        """
        model = self._root[0]
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        with self._alone("attach"):
            try:
                self._register()
                model.requires_grad_(False)
                for parameter in self._saved_parameters().values():
                    parameter.requires_grad_(True)
                model.add_module(name, self)
            except BaseException:  # nothing is left half done
                self._unregister()
                model._modules.pop(name, None)
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in trained)
                raise

    def _register(self) -> None:
        """The hooks, each with its handle in `_handles` as soon as it is there."""
        model, live = self._root[0], self._live
        self._handles.append(surround(model, live))
        self._handles.append(model.register_forward_pre_hook(live.open))
        add_paths(live, model, self.targets, self._handles)
        add_checks(live, model, self.targets, self._handles)
        self._handles.append(model.register_forward_hook(live.close, always_call=True))

    def _unregister(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _alone(self, what: str) -> contextlib.AbstractContextManager[None]:
        """See `live.alone`."""
        model = self._root[0]
        return alone(model, {self._live: None} | {other._live: None for other in adapters(model).values()}, what)

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
        with self._alone("verify"), torch.enable_grad(), _evaluating(model), self._live.watching() as seen:
            output = model(*args, **kwargs)
            for tensor in _floats(output):
                noise = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape).cos()
                loss = loss + (tensor.float() * noise).sum()
            grads = torch.autograd.grad(loss, list(seen.values()), allow_unused=True)
        alive = {name for name, grad in zip(seen, grads, strict=True) if grad is not None and grad.any()}
        names = {target.name: bool({f"{target.name}.A", f"{target.name}.B"} & alive) for target in self.targets}
        dead = without_idle_experts(names)
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
        """The base model's outputs inside the ``with``, in this thread or asyncio task only.

        Those of a merged adapter are in the weights, which all threads see: they are taken out and put back, and until
        then the calls of other threads are refused. Where some overlap, the last one that ends puts them back.

        Raises:
            TargetError: the adapter is merged, and another thread is calling the model.
        """
        off, entered = self._live.off, Entered(self._live.off, True)
        try:
            try:
                off.begin(entered)
                if self.merged:
                    self._take_out()
                else:
                    self._live.acts()  # where another thread has just taken it out, this one is refused
                yield
            finally:
                off.end(entered)
                self._put_back()
        finally:  # again, where an interrupt kept the first from being done
            off.end(entered)
            self._put_back()

    def _take_out(self) -> None:
        """What is merged, until `_put_back`."""
        claim = self._alone("disabled() of a merged adapter")
        claim.__enter__()
        self._claim = claim
        self.unmerge()

    def _put_back(self) -> None:
        """What was taken out, if it was, and once nobody has the adapter disabled any more."""
        claim = self._claim
        if claim is None or self._live.off.open:
            return
        try:
            try:
                self.merge()
            except UniLoraError:  # θ_d has become NaN, say: the weights stay the base's
                raise
            except BaseException:
                self.merge()
                raise
        finally:
            claim.__exit__(None, None, None)
            self._claim = None

    def merge(self) -> None:
        """Add B·A to each target's weight, once; a copy of the original weights is kept for `unmerge`.

        The sum is made in float32 and rounded once to the weight's dtype.

        Raises:
            TargetError: a quantised weight, which cannot take the update; or another adapter is merged, whose
                `unmerge` would take this one's update out as well; or another thread is calling the model, or has the
                adapter disabled.
            ValuesError: θ_d holds NaN or infinity, or the sum does in the weight's dtype. In each case nothing has
                changed, also after an interrupt.
        """
        if self.merged:
            return
        self._check_finite("merge")
        for name, other in adapters(self._root[0]).items():
            if other.merged:
                raise TargetError(
                    f"merge: the adapter {name!r} is merged; unmerge it, or detach(merge=True) it, first."
                )
        if self._live.off.open:
            raise TargetError("merge: it is disabled inside a `with`, which promises the base; leave that first.")
        with self._alone("merge"):
            weights = {weight_name(target): plain_weight(self._root[0], target) for target in self.targets}
            originals = {name: weight.detach().clone() for name, weight in weights.items()}
            try:
                self._originals = originals
                for target in self.targets:
                    self._add(target, weights[weight_name(target)])
                self._live.merged = True
            except BaseException:
                self._restore()
                raise

    @torch.no_grad()
    def _add(self, target: Target, weight: Tensor) -> None:
        """B·A of one target to its block of the weight."""
        block = block_of(weight, target)
        was_finite = block.isfinite()
        block.copy_(block.float() + self.delta_weight(target))
        if lost := int((was_finite & ~block.isfinite()).sum()):
            raise ValuesError(
                f"merge: {target.name}: {lost} of {block.numel()} weights would be infinite or NaN in {weight.dtype}, "
                "whose range the update leaves; merge into the base in float32 or bfloat16. Nothing was changed."
            )

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            TargetError: another thread is calling the model.
        """
        if self.merged:
            with self._alone("unmerge"):
                self._restore()

    def _restore(self) -> None:
        """The original weights; an interrupt lets it begin again, so that it is never half done."""
        try:
            self._copy_originals()
        except BaseException:
            self._copy_originals()
            raise

    @torch.no_grad()
    def _copy_originals(self) -> None:
        for name, original in self._originals.items():
            owner, _, key = name.rpartition(".")
            getattr(self._root[0].get_submodule(owner), key).copy_(original)
        self._live.merged = False
        self._originals = {}

    def rename(self, name: str) -> None:
        """Give the adapter another name among the model's submodules, and so in its `state_dict`.

        Raises:
            TargetError: the name is taken, or cannot be a submodule's; nothing has changed then.
        """
        model = self._root[0]
        check_name(model, name)
        renamed = {key: child for key, child in model._modules.items() if child is not self} | {name: self}
        model._modules = renamed  # at once, so that an interrupt leaves it with one name

    def swap(self, path: str | os.PathLike) -> None:
        """Put the adapter of a file in this one's place; see `unilora_torch.attach.swap`."""
        from unilora_torch.attach import swap

        before, theta_d = self.spec, self.theta_d.detach().clone()
        heads = {name: tensor.detach().clone() for name, tensor in self.heads().items()}
        with self._alone("swap"):
            try:
                swap(self, path)
            except BaseException:
                self._undo_swap(before, theta_d, heads)
                raise

    def _undo_swap(self, spec: ProjectionSpec, theta_d: Tensor, heads: Mapping[str, Tensor]) -> None:
        if self.spec is not spec:
            self.reseed(spec)
        with torch.no_grad():
            self.theta_d.copy_(theta_d)
            for name, tensor in self.heads().items():
                tensor.copy_(heads[name])

    def reseed(self, spec: ProjectionSpec) -> None:
        """Take the P of another spec of the same layout, d and start, in place."""
        before, self.spec = self.spec, spec
        try:
            self._fill_tables(Tables.of(spec))
        except BaseException:
            self._fill_tables(Tables.of(before))
            self.spec = before
            raise

    def _fill_tables(self, tables: Tables) -> None:
        for table, new in zip(self._tables, tables, strict=True):
            if table is not None and new is not None:
                table.copy_(new)

    def detach(self, merge: bool = False) -> None:
        """Take the adapter off: the base model is as before `attach`, but for the values of `modules_to_save`.

        Args:
            merge: leave B·A in the base weights for good.

        Raises:
            TargetError, ValuesError: it cannot be merged (see `merge`), or another thread is calling the model; it is
                still on the model then.
        """
        with self._alone("detach"):
            (self.merge if merge else self.unmerge)()
            try:
                self._take_off()
            except BaseException:  # what has begun is brought to its end
                self._take_off()
                raise

    def _take_off(self) -> None:
        model = self._root[0]
        self._unregister()
        others = {name: child for name, child in adapters(model).items() if child is not self}
        model._modules = {name: child for name, child in model._modules.items() if child is not self}
        still = {name for other in others.values() for name in other._saved_parameters()}
        for name in self._saved_parameters().keys() - still:
            model.get_parameter(name).requires_grad_(False)
        if not others:
            for name in self._was_trainable:
                model.get_parameter(name).requires_grad_(True)
        self._originals, self._live.merged = {}, False

    # ---- files --------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike,
        metadata: Mapping[str, str] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write θ_d, the spec, the targets and the modules to save as one file, atomically.

        Args:
            metadata: further strings for the header.
            state: the model's gathered `state_dict`, where one process has it of a model sharded over several;
                otherwise every process must call `save` on such a model.

        Raises:
            ValuesError: θ_d holds NaN or infinity; an old file at ``path`` is kept.
        """
        gathered = dict(state or {}) | (self._kept_heads or {})  # what is switched off is not in the model's state
        tensors = {name: _storable(gathered.get(name, tensor)) for name, tensor in self.heads().items()}
        written = write_targets(map(row_of, self.targets), self.modules_to_save)
        theta_d = _storable(self.theta_d if state is None else state[f"{self.name}.theta_d"])
        written |= write_identity(self.base) | dict(metadata or {})
        save_adapter(path, self.spec, theta_d, tensors=tensors, metadata=written)

    def heads(self) -> dict[str, Tensor]:
        """The state of the modules to save, under its names in the model's `state_dict`, also while switched off."""
        if self._kept_heads is not None:
            return self._kept_heads
        return {
            f"{module}.{name}": tensor
            for module in self.modules_to_save
            for name, tensor in self._root[0].get_submodule(module).state_dict().items()
        }

    def export_lora(
        self,
        folder: str | os.PathLike,
        base_model: str | None = None,
        rank: int | None = None,
        engine: str | None = None,
    ) -> None:
        """Write A and B, exactly, as a PEFT LoRA folder; see `unilora_torch.lora.export_lora`."""
        from unilora_torch.lora import export_lora

        self._check_finite("export_lora")
        export_lora(self, folder, base_model, rank, engine)

    # ---- switched ------------------------------------------------------------------------------------------------

    def _switch_off(self) -> None:
        self.unmerge()
        if self._kept_heads is None:
            self._kept_heads = {name: tensor.detach().clone() for name, tensor in self.heads().items()}
        self._live.on = False
        self.theta_d.requires_grad_(False)
        for parameter in self._saved_parameters().values():
            parameter.requires_grad_(False)

    def _switch_on(self, strength: float) -> None:
        self.unmerge()
        if self._kept_heads is not None:
            self._root[0].load_state_dict(self._kept_heads, strict=False)
            self._kept_heads = None
        self._live.on, self._live.strength = True, strength
        self.theta_d.requires_grad_(True)
        for parameter in self._saved_parameters().values():
            parameter.requires_grad_(True)

    # ---- internals ----------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but never to another dtype: θ_d and the scale stay float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _saved_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{module}.{name}": parameter
            for module in self.modules_to_save
            for name, parameter in self._root[0].get_submodule(module).named_parameters()
        }

    def _check_finite(self, what: str) -> None:
        if not torch.isfinite(self.theta_d).all():
            raise ValuesError(
                f"{what}: theta_d holds NaN or infinity; training diverged (a lower learning rate, or gradient "
                "clipping). Nothing was changed."
            )


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, in the order in which they were attached."""
    return {name: child for name, child in model.named_children() if isinstance(child, Adapter)}


def switch(model: nn.Module, to: str | Iterable[str] | Mapping[str, float]) -> None:
    """Choose which adapters of a model act, and train; the others are off and frozen.

    Each adapter has modules to save of its own: those of one that is switched off are kept with it, and put back when
    it is switched on.

    Args:
        to: a name; several names, whose updates add up; names with the weights of their updates; or ``()`` for the
            base model alone.

    Raises:
        TargetError: there is no adapter of that name, two of them save one module, or another thread is calling the
            model. Nothing has changed then.
    """
    weights = {to: 1.0} if isinstance(to, str) else dict(to) if isinstance(to, Mapping) else dict.fromkeys(to, 1.0)
    there = adapters(model)
    for name in weights:
        if name not in there:
            raise TargetError(f"switch: the model has no adapter {name!r}; it has {list(there) or 'none'}.")
    check_apart({name: there[name].modules_to_save for name in weights})
    with alone(model, (adapter._live for adapter in there.values()), "switch"):
        try:
            _switch(there, weights)
        except BaseException:  # what has begun is brought to its end
            _switch(there, weights)
            raise


def _switch(there: Mapping[str, Adapter], weights: Mapping[str, float]) -> None:
    for name in there.keys() - weights.keys():
        there[name]._switch_off()
    for name, strength in weights.items():
        there[name]._switch_on(strength)


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that an adapter cannot have.

    Raises:
        TargetError: with the remedy.
    """
    if isinstance(getattr(model, name, None), Adapter):
        raise TargetError(
            f"the model already has an adapter {name!r}; call model.{name}.detach() first, or give another name=."
        )
    if hasattr(model, name) or not name.isidentifier():
        raise TargetError(f"{name!r} cannot be an adapter's name: it is no identifier, or the model has it already.")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; the mode of each module is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        try:
            model.eval()
            yield
        finally:
            _train(training)
    finally:  # again, where an interrupt kept the first from being done
        _train(training)


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def _trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that trained before there was an adapter."""
    first = next(iter(adapters(model).values()), None)
    if first is not None:
        return first._was_trainable
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def device_of(model: nn.Module, targets: tuple[Target, ...]) -> torch.device:
    """Where the first layer that has values has them."""
    layers = (model.get_submodule(target.module) for target in targets)
    tensors = (tensor for layer in layers for tensor in itertools.chain(layer.parameters(), layer.buffers()))
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def _split(theta_D: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """As `Layout.split`, by one `torch.split`, whose gradient is one concatenation (that of a slice fills D zeros)."""
    parts = theta_D.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


def _storable(tensor: Tensor) -> Any:
    """A NumPy array; bfloat16, which NumPy lacks, as float32 (exact); a DTensor gathered from every process."""
    tensor = tensor.detach()
    tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor with a gradient in a nested output."""
    leaves = torch.utils._pytree.tree_leaves(output if not hasattr(output, "to_tuple") else output.to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
