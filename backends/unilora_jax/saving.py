"""Saving of an adapter as a file that every backend reads."""

import os
from collections.abc import Callable, Mapping

import numpy as np
from jax import Array

from unilora_core import save_adapter
from unilora_core.header import write_targets
from unilora_jax.chains import Chains
from unilora_jax.checks import checked_theta
from unilora_jax.frozen import tensors_of

__all__ = ["save"]


def save(
    chains: Chains,
    path: str | os.PathLike,
    theta_d: Array,
    rename: Callable[[str], str],
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str],
) -> None:
    """Write the file; see `Adapter.save`."""
    theta_d = checked_theta(chains, theta_d, f"save: {path}")
    modules_to_save = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    written = write_targets(_rows(chains, rename), modules_to_save) | dict(metadata)
    made = {} if chains.spec.form.of_weight is None else tensors_of(chains.targets, chains.frozen)
    save_adapter(path, chains.spec, np.asarray(theta_d), tensors=dict(tensors) | made, metadata=written)


def _rows(chains: Chains, rename: Callable[[str], str]) -> list[tuple]:
    """Return a row of the header for each layer; the factors of a pair tell its sizes."""
    return [
        (name, rename(module), target.first_row, False)
        + (() if chains.spec.frame == "pair" else (None, target.in_features, target.out_features, 0))
        for target in chains.targets
        for name, module in zip(target.names, target.modules, strict=True)
    ]
