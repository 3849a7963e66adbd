"""The LoRA of parameters, such as the experts of a mixture, in PEFT's format (``target_parameters``).

PEFT wraps a module once for each of its parameters that is adapted, the last one outermost; the names in the file say
how deep. A (experts·r, in) holds the experts' rows one after the other. B (out, r·experts) holds their columns, with
the expert running fastest. Source: `peft.tuners.lora.layer.ParamWrapper` of PEFT 0.21.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn

from unilora_core import SpecError, TargetError
from unilora_torch.targets import Target, weight_name

__all__ = ["parameter_state", "parameters_of", "rank_of"]


def parameters_of(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Return the targets that adapt blocks of each parameter, by its qualified name."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        if target.parameter is not None:
            found.setdefault(weight_name(target), []).append(target)
    return found


Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""The factors of each target: its name → A and B."""


def rank_of(parts: Iterable[Target], pairs: Pairs) -> int:
    """Return the rank that the blocks of one parameter add up to."""
    return sum(pairs[part.name][0].shape[-2] for part in parts)


def parameter_state(
    model: nn.Module, parameters: Mapping[str, list[Target]], pairs: Pairs, rank: int
) -> dict[str, np.ndarray]:
    """Return the tensors of ``adapter_model.safetensors`` for parameters, all of one rank.

    Raises:
        TargetError: PEFT would add the update in another place, or in another orientation.
        SpecError: a parameter needs a rank above ``rank``.
    """
    state: dict[str, np.ndarray] = {}
    for name, parts in parameters.items():
        owner = model.get_submodule(parts[0].module)
        weight = model.get_parameter(name)
        stored = bool(getattr(owner, "is_transposed", False)) and weight.dim() == 3
        kernels = weight.dim() > 2 and not parts[0].experts
        if "." in (parts[0].parameter or "") or parts[0].transposed != stored or kernels:
            raise TargetError(
                f"export_lora: {name}: PEFT has no LoRA for a parameter that another module uses, for one stored "
                "(in, out) by a module that does not say so in is_transposed, nor for the kernels of a convolution "
                "that has groups or is not linear in them; merge the adapter instead."
            )
        if rank < (needed := rank_of(parts, pairs)):
            raise SpecError(f"{name}: expected rank ≥ {needed}, which its blocks add up to, got {rank}.")
        A, B = _joined(parts, pairs, rank, weight.shape[-1 if stored else -2])
        inner = sum(f"{parts[0].module}.{other}" in parameters for other in _after(owner, parts[0].parameter))
        prefix = f"base_model.model.{parts[0].module}" + ".base_layer" * inner
        state[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(A.reshape(-1, A.shape[-1]))
        state[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(B.transpose(1, 2, 0).reshape(B.shape[1], -1))
    return state


def _joined(parts: list[Target], pairs: Pairs, rank: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Join the blocks side by side, filled up with zeros: A (experts, rank, in) and B (experts, height, rank)."""
    experts = parts[0].experts or 1
    A = np.zeros((experts, rank, parts[0].in_features), np.float32)
    B, row = np.zeros((experts, height, rank), np.float32), 0
    for part in parts:
        a, b = pairs[part.name]
        ranks, rows = slice(row, row + a.shape[-2]), slice(part.first_row, part.first_row + part.out_features)
        A[:, ranks], B[:, rows, ranks] = a, b
        row += a.shape[-2]
    return A, B


def _after(module: nn.Module, parameter: str | None) -> list[str]:
    """Return the names of the module's parameters after this one."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return names[names.index(parameter or "") + 1 :]
