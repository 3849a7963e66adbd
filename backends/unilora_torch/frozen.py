"""The frozen arrays in a target's chain: drawn from the seed, or made of the layer's own weight."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from unilora_core import MismatchError, ProjectionSpec, TargetError
from unilora_core.header import FROZEN
from unilora_torch.chains import Frozen, sizes_of
from unilora_torch.checks import REMEDY, computed, is_plain, kind_of, weight_of
from unilora_torch.targets import Target, matrix_of

__all__ = ["check_names", "frozen_in_file", "frozen_of", "tensors_of"]


def frozen_of(model: nn.Module, spec: ProjectionSpec, targets: Iterable[Target]) -> Frozen:
    """Make the frozen arrays of each target, by its name: float32 or int32, on the CPU or where the weight is; none for
    a pair.

    Raises:
        TargetError: the values of a weight are not at hand, or are no numbers.
    """
    form, by_size, found = spec.form, {}, {}
    for target in targets:
        sizes = sizes_of(target)
        if form.of_weight is not None:
            arrays = form.of_weight(_matrix(model, target), int(spec.chosen["rank"]))
            found[target.name] = {name: array.contiguous() for name, array in arrays.items()}  # as a file gives them
            continue
        if sizes not in by_size:
            arrays = form.frozen(sizes, spec.seed, spec.chosen)
            by_size[sizes] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        found[target.name] = by_size[sizes]
    return {name: arrays for name, arrays in found.items() if arrays}


def check_names(spec: ProjectionSpec, modules_to_save: Iterable[str]) -> None:
    """Refuse a module to save whose tensors would have the names of what a file keeps.

    Raises:
        TargetError: there is such a module; the error has the remedy.
    """
    for name in modules_to_save if spec.form.of_weight is not None else ():
        if f"{name}.".startswith(FROZEN):
            raise TargetError(
                f"modules_to_save: {name}: the tensors that this method keeps in a file are called {FROZEN}…, too; "
                "rename the module, or choose another method."
            )


def _matrix(model: nn.Module, target: Target) -> Tensor:
    module = model.get_submodule(target.module)
    if says := computed(module, target):
        raise TargetError(
            f"{target.name}: the method is made of the singular vectors of the weight, and {says}; {REMEDY}, or choose "
            "another method."
        )
    weight = weight_of(module, target)
    if weight is None or not is_plain(weight) or weight.is_meta:
        kind = "a weight on the meta device" if weight is not None and weight.is_meta else kind_of(weight)
        raise TargetError(
            f"{target.name}: the method is made of the singular vectors of the weight, and {kind} has no plain values "
            "here; attach to the base in float32 or bfloat16, whole, save the adapter, and load that file beside this "
            "base."
        )
    matrix = matrix_of(weight.detach(), target).float()
    if not matrix.isfinite().all():
        raise TargetError(f"{target.name}: its weight holds NaN or infinity, and has no singular vectors; exclude it.")
    return matrix


def tensors_of(spec: ProjectionSpec, frozen: Frozen) -> dict[str, Tensor]:
    """Return the frozen arrays that a file has to keep, by name: an SVD is not reproducible bit by bit."""
    if spec.form.of_weight is None:
        return {}
    return {f"{FROZEN}{target}.{name}": array for target, arrays in frozen.items() for name, array in arrays.items()}


def frozen_in_file(
    where: object, spec: ProjectionSpec, targets: Iterable[Target], tensors: Mapping[str, np.ndarray]
) -> Frozen | None:
    """Return the frozen arrays that a file keeps; None where it has nothing to keep.

    Raises:
        MismatchError: an array is missing, or has another shape or dtype.
    """
    if spec.form.of_weight is None:
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for target in targets:
        for name, shape in spec.form.kept(sizes_of(target), spec.chosen).items():
            key = f"{FROZEN}{target.name}.{name}"
            array = tensors.get(key)
            if array is None or array.shape != shape or array.dtype != np.float32:
                got = "none" if array is None else f"{array.shape} {array.dtype}"
                raise MismatchError(
                    f"{where}: expected the tensor {key} {shape} float32, which the method keeps, got {got}."
                )
            found.setdefault(target.name, {})[name] = torch.from_numpy(array)
    return found
