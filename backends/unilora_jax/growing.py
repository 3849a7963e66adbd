"""Another d for the same function; see `unilora_core.resizing`."""

import dataclasses

from jax import Array

from unilora_core import ProjectionSpec
from unilora_core.resizing import moved
from unilora_jax.chains import Chains, numbers_of
from unilora_jax.checks import checked_theta
from unilora_jax.gather import Gathered

__all__ = ["resized"]


def resized(chains: Chains, after: ProjectionSpec, theta_d: Array, what: str) -> tuple[Chains, Array]:
    """Return the chains of the spec of another d, with groups cached where they were, and θ_d carried there."""
    theta_d = checked_theta(chains, theta_d, what)
    cached = isinstance(chains.numbers, Gathered) and None not in chains.numbers.tables
    numbers = numbers_of(after, chains.targets, cached=cached)
    return dataclasses.replace(chains, numbers=numbers), moved(chains.spec, after, theta_d)
