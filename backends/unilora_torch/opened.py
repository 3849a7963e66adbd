"""A file that was checked against a model: the one place where what a file says meets the model."""

import os
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unilora_core import AdapterFile, MismatchError, ProjectionSpec, TargetError, ValuesError, read_adapter
from unilora_core.header import Header, TargetRow, read_header
from unilora_core.lora import BLOCKS, check_rank, largest_rank
from unilora_torch.chains import Frozen
from unilora_torch.checks import check_initialised, check_parameter, check_targets
from unilora_torch.frozen import frozen_in_file
from unilora_torch.heads import check_heads, head_states, submodule
from unilora_torch.targets import Target, features, target_of

__all__ = ["Opened", "open_file"]


@dataclass(frozen=True)
class Opened:
    """An adapter file that fits a model.

    Attributes:
        spec, theta_d: its own; θ_d is (d,) float32.
        header: the rest of what it says.
        targets: the layers and parameters that it adapts, as this model stores its weights.
        heads: module → its saved state, in the file's dtypes.
        frozen: the frozen arrays that it keeps; None where they follow from the seed.
    """

    spec: ProjectionSpec
    theta_d: Tensor
    header: Header
    targets: tuple[Target, ...]
    heads: dict[str, dict[str, Tensor]]
    frozen: Frozen | None

    @property
    def fresh(self) -> tuple[str, ...]:
        """The names of the weights that come from no checkpoint, and that the file identifies but does not hold."""
        return tuple(self.header.base.fresh) if self.header.base else ()


def open_file(
    where: str | os.PathLike,
    model: nn.Module,
    *,
    file: AdapterFile | None = None,
    any_rank: bool = False,
    loaded: bool = True,
    known: Container[tuple[ProjectionSpec, tuple[Target, ...]]] = (),
) -> Opened:
    """Read a file and check that it fits a model; nothing of a size that the file states is made before it is checked.

    It does not check the values of the base: `base.check_base` does.

    Args:
        where: the file's path, or its name for messages.
        file: its contents, unless they are to be read from ``where``.
        any_rank: whether to take factors of any rank, not only up to `unilora_core.lora.largest_rank`.
        loaded: whether the model has its values; one without (``torch.device("meta")``) is checked by shape.
        known: specs and targets that are known to fit.

    Raises:
        AdapterFileError: the file is damaged, of an unknown version, or says what cannot exist.
        MismatchError: it belongs to another model; the error names the module, and what was expected and found.
        TargetError: a layer cannot be adapted rightly.
        ValuesError: a value is NaN or infinite, or the model's dtypes cannot hold it.
    """
    file = read_adapter(where) if file is None else file
    header = read_header(where, file)
    targets = tuple(target_of(row, submodule(model, row.module, str(where))) for row in header.targets)
    usual = file.spec.form.usual
    if (file.spec, targets) not in known:
        for row, target in zip(header.targets, targets, strict=True):
            _check_fits(where, model, target)
            if not any_rank:
                check_rank(where, row.name, row.rank, row.in_features, row.out_features, usual)
        check_initialised(model)
        check_targets(model, targets, loaded=loaded)
        if not any_rank:
            _check_blocks(where, header.targets, usual)
    heads = head_states(where, model, header.modules_to_save, file.tensors)
    if loaded:
        check_heads(model, header.modules_to_save)
    frozen = frozen_in_file(where, file.spec, targets, file.tensors)
    return Opened(file.spec, _theta(where, file), header, targets, heads, frozen)


def _check_blocks(where: str | os.PathLike, rows: Iterable[TargetRow], usual: int) -> None:
    """Refuse blocks of one weight that together are larger than a few blocks of the whole weight would be."""
    weights: dict[tuple[str, str | None], list[TargetRow]] = {}
    for row in rows:
        weights.setdefault((row.module, row.parameter), []).append(row)
    for (module, _), blocks in weights.items():
        total, height = sum(row.rank for row in blocks), max(row.first_row + row.out_features for row in blocks)
        if total > (most := BLOCKS * largest_rank(blocks[0].in_features, height, usual)):
            raise MismatchError(
                f"{where}: {module}: expected blocks whose ranks add up to at most {most}, those in the file add up to "
                f"{total}; if that is meant, and there is memory for it, say any_rank=True (--any-rank of the command)."
            )


def _check_fits(where: str | os.PathLike, model: nn.Module, target: Target) -> None:
    """Refuse a model without the layer that a file names, or with one of other widths."""
    module = model.get_submodule(target.module)
    if target.parameter is not None:
        try:
            check_parameter(module, target)
        except TargetError as error:
            raise MismatchError(f"{where}: {error}") from error
        return
    width, height = features(module, target.transposed)
    if not width:
        raise MismatchError(
            f"{where}: {target.module} should be a linear layer, the model has {type(module).__name__}."
        )
    if width != target.in_features or not 0 <= target.first_row <= height - target.out_features:
        raise MismatchError(
            f"{where}: {target.module}: expected a layer of {target.in_features} inputs and at least "
            f"{target.first_row + target.out_features} outputs, the model has {width} and {height}; the adapter was "
            "trained on another model."
        )


def _theta(where: str | os.PathLike, file: AdapterFile) -> Tensor:
    theta_d = torch.tensor(file.theta_d)
    if theta_d.shape != (file.spec.d,) or theta_d.dtype != torch.float32 or not theta_d.isfinite().all():
        raise ValuesError(
            f"{where}: expected theta_d ({file.spec.d},) float32 without NaN and infinity, got "
            f"{tuple(theta_d.shape)} {theta_d.dtype}, {int((~theta_d.isfinite()).sum())} of them NaN or infinite."
        )
    return theta_d
