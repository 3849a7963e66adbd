"""A typed program of someone who depends on the package; mypy reads it, strictly, beside the installed wheel."""

import numpy as np

from unilora_core import Layout, ProjectionSpec, project, read_adapter, save_adapter
from unilora_core.methods import MethodOptions


def shapes_of(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shape of each factor by its name."""
    return {name: layout.shapes[name] for name in layout}


def numbers_of(path: str) -> int:
    """Return d of a file."""
    return read_adapter(path).spec.d


layout = Layout([("q.A", (4, 64)), ("q.B", (64, 4))])
spec = ProjectionSpec(layout, d=32, seed=7)
theta_d: np.ndarray = spec.init()
save_adapter("a.safetensors", spec, theta_d)
options: MethodOptions = {"vectors": 64, "topk": 2}
factors = layout.split(project(spec, theta_d))
total: int = spec.D + len(shapes_of(layout)) + numbers_of("a.safetensors")
