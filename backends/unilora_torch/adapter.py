"""Adapter: all that can be done with one trained vector beside a model. Its state is in `vector`."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from unilora_core import rates
from unilora_core.methods import method_of
from unilora_torch import growing, hooking, merging, saving, swapping, switching, verifying
from unilora_torch.computed import computes
from unilora_torch.export import export_lora
from unilora_torch.heads import listed
from unilora_torch.targets import Target
from unilora_torch.vector import Vector

__all__ = ["NAME", "Adapter", "adapters"]

NAME = "unilora"
"""The name of the adapter among the model's submodules, unless another is given."""


class Adapter(Vector):
    """One trainable vector beside a frozen model; `attach` and `load` make it.

    Attributes:
        theta_d: (d,) float32, the one trainable `nn.Parameter`; it stays float32 when the model is cast.
        spec: the spec, which fixes P.
        targets: the adapted layers and parameters, in layout order.
        modules_to_save: names of modules that train in full and are saved with θ_d, such as a classifier.
        base: what identifies the base model, for files, or None; see `unilora_torch.base.identity`.
        merged: whether the base weights hold B·A at the moment.
        enabled: whether it acts, in this thread or asyncio task; see `switch` and `disabled`.
        strength: the factor on its B·A where several adapters act together; see `switch`.

    The model can be called by many threads at once. Methods that change the weights or the hooks (`merge`, `unmerge`,
    `swap`, `grow`, `shrink`, `detach`, `switch`, `verify`) are refused while another thread is calling the model.
    """

    def __repr__(self) -> str:
        return f"Adapter({self.summary()})"

    def factors(self) -> dict[str, Tensor]:
        """Compute A (r, in) and B (out, r) of each target by name, or a frame's other pieces; float32, in the graph."""
        return self()

    def factors_of(self, target: Target) -> tuple[Tensor, ...]:
        """Compute A (r, in) and B (out, r), times `strength`, of one target, or another chain; see `Live.chain_of`."""
        return self.live.chain_of(target)

    @property
    def enabled(self) -> bool:
        """Whether the adapter is switched on, and not disabled in this thread or asyncio task."""
        return self.live.enabled

    @property
    def merged(self) -> bool:
        """Whether the base weights hold B·A at the moment."""
        return self.live.merged

    @property
    def strength(self) -> float:
        """The factor on its B·A."""
        return self.live.strength

    @property
    def active(self) -> bool:
        """Whether the low-rank paths add to the outputs: not disabled, not merged."""
        return self.live.acts()

    def put_on(self, name: str) -> None:
        """Hook the adapter to its model, under this name: the base is frozen, the modules to save train.

        Raises:
            TargetError: another thread is calling the model.
        """
        hooking.put_on(self, name)

    # ---- training -----------------------------------------------------------------------------------------------

    def learning_rate(self, lora_rate: float) -> float:
        """Return the rate for θ_d that trains as LoRA would at ``lora_rate`` (see `unilora_core.rates`)."""
        return rates.theta_rate(self.spec, lora_rate)

    def parameter_groups(self, lora_rate: float, head_rate: float | None = None) -> list[dict]:
        """Make the groups for a torch optimiser: θ_d at `learning_rate` without weight decay, then the modules to save.

        Args:
            lora_rate: the learning rate that LoRA would have.
            head_rate: the rate of the modules to save; ``lora_rate`` unless given.
        """
        groups = [{"params": [self.theta_d], "lr": self.learning_rate(lora_rate), "weight_decay": 0.0}]
        if head := list(self.saved_parameters().values()):
            groups.append({"params": head, "lr": lora_rate if head_rate is None else head_rate})
        return groups

    def grow(self, factor: int = 2, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
        """Split each number of θ_d in ``factor``, with the same function; see `unilora_torch.growing.grow`."""
        growing.grow(self, factor, optimizer, scheduler)

    def shrink(self, factor: int = 2, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
        """Join ``factor`` numbers of θ_d to one each; see `unilora_torch.growing.shrink`."""
        growing.shrink(self, factor, optimizer, scheduler)

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Run the model in evaluation and in training mode and check that every target is reached and gives θ_d a
        gradient. The runs leave no trace on the model.

        Args:
            *args, **kwargs: example inputs of the model.

        Raises:
            TargetError: a target is bypassed, no gradient flows through it, or the adapter is merged or disabled.
        """
        verifying.verify(self, args, kwargs)

    def summary(self) -> str:
        """Say in one line what trains, and how little of the model it is."""
        head = sum(parameter.numel() for parameter in self.saved_parameters().values())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        spec, trained = self.spec, self.spec.d + head
        what = "LoRA parameters" if spec.frame == "pair" else f"({method_of(spec) or spec.frame})"
        return (
            f"θ_d: {spec.d:,} numbers for D = {spec.D:,} {what} of {len(self.targets)} targets"
            + (f"; {listed(self.modules_to_save)}: {head:,}" if head else "")
            + (f"; random, frozen and in no file: {listed(self.base.fresh)}" if self.base and self.base.fresh else "")
            + f"; trained: {trained:,} of {total:,} ({trained / total:.3%})"
            + (f"; groups computed by {computes(spec, self.theta_d.device)}" if self.groups == "computed" else "")
        )

    # ---- on, off, merged ----------------------------------------------------------------------------------------

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Give the base model's outputs inside the ``with``, in this thread or asyncio task only.

        The update of a merged adapter is in the weights, which all threads see: it is taken out and put back, and until
        then the calls of other threads are refused. Where several overlap, the last one that ends puts it back.

        Raises:
            TargetError: the adapter is merged, and another thread is calling the model.
        """
        return merging.disabled(self)

    def merge(self) -> None:
        """Add B·A to each target's weight, once; a copy of the original weights is kept for `unmerge`.

        The sum is computed in float32 and rounded once to the weight's dtype.

        Raises:
            TargetError: a weight cannot take the update, as it is quantised, computed from others, tied or elsewhere; a
                layer was replaced since, or is not linear in its weight; another adapter is merged, whose `unmerge`
                would take this one's update out as well; or another thread is calling the model, or has the adapter
                disabled.
            ValuesError: θ_d holds NaN or infinity, or the sum does in the weight's dtype. In each case nothing has
                changed, also after an interrupt.
        """
        merging.merge(self)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            TargetError: another thread is calling the model, or a layer was replaced while merged.
        """
        merging.unmerge(self)

    def rename(self, name: str) -> None:
        """Give the adapter another name among the model's submodules, and so in its `state_dict`.

        Raises:
            TargetError: the name is taken, or cannot be a submodule's; nothing has changed then.
        """
        switching.rename(self, name)

    def swap(self, path: str | os.PathLike) -> None:
        """Put the adapter of a file in the place of this one; see `unilora_torch.attach.swap`."""
        swapping.swap(self, path)

    def detach(self, merge: bool = False) -> None:
        """Take the adapter off: the base model is as before `attach`, except for the values of `modules_to_save`.

        Args:
            merge: whether to leave B·A in the base weights for good.

        Raises:
            TargetError, ValuesError: it cannot be merged (see `merge`), or another thread is calling the model; it is
                still on the model then.
        """
        hooking.detach(self, merge)

    # ---- files --------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike,
        metadata: Mapping[str, str] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write θ_d, the spec, the targets and the modules to save as one file, atomically.

        Args:
            metadata: more strings for the header.
            state: for a model that is sharded over several processes: its gathered `state_dict`, where one process has
                it; otherwise every process must call `save`.

        Raises:
            ValuesError: θ_d holds NaN or infinity.
            TargetError: a layer was replaced since the adapter was put on. An old file at ``path`` is kept.
        """
        self.structure.check("save")
        saving.save(self, path, metadata, state)

    def export_lora(
        self,
        folder: str | os.PathLike,
        base_model: str | None = None,
        rank: int | None = None,
        engine: str | None = None,
    ) -> None:
        """Write A and B, exactly, as a PEFT LoRA folder; see `unilora_torch.export.export_lora`."""
        export_lora(self, folder, base_model, rank, engine)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by name, in the order in which they were attached."""
    return {name: child for name, child in model.named_children() if isinstance(child, Adapter)}
