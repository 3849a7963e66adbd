"""Maps θ_d → θ_D by name, as `ProjectionSpec.grouping` and files say it."""

from unilora_core.maps.codebook import CODEBOOK
from unilora_core.maps.dense import FASTFOOD, GAUSSIAN
from unilora_core.maps.gather import GATHERS, IDENTITY
from unilora_core.maps.mapping import FIRST_D, Frozen, Instance, Map, Options

__all__ = ["FIRST_D", "MAPS", "Frozen", "Instance", "Map", "Options"]

MAPS: dict[str, Map] = {
    **GATHERS,
    "identity": IDENTITY,
    "fastfood": FASTFOOD,
    "gaussian": GAUSSIAN,
    "codebook": CODEBOOK,
}
