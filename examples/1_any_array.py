"""For library authors: the projection by itself, in NumPy or any Array API namespace."""

import tempfile
from pathlib import Path

import numpy as np

from unilora_core import Layout, ProjectionSpec, load_adapter, project, project_transpose, save_adapter

# The factors of your model, in the order in which they fill θ_D.
layout = Layout(
    [(f"blocks.{i}.attn.q.{side}", shape) for i in range(12) for side, shape in (("A", (4, 768)), ("B", (768, 4)))]
)
spec = ProjectionSpec(layout, d=layout.size // 16, seed=42)
print(f"D = {spec.D:,}, d = {spec.d:,}, groups of {spec.counts().min()} to {spec.counts().max()}")

theta_d = spec.init()  # (d,) float32, the same bits in every framework
factors = layout.split(project(spec, theta_d))  # name → A or B
delta_W = factors["blocks.0.attn.q.B"] @ factors["blocks.0.attn.q.A"]  # what LoRA would add to W

# One step of gradient descent on ½‖θ_D - y‖²: the gradient with respect to θ_d is Pᵀ of that with respect to θ_D.
y = np.random.default_rng(0).standard_normal(spec.D, dtype=np.float32)
theta_d = theta_d - project_transpose(spec, project(spec, theta_d) - y)
gradient = project_transpose(spec, project(spec, theta_d) - y)
print("PᵀP = I, so one full step reaches the optimum; the gradient left:", np.abs(gradient).max())

# Any slice of P on its own, however large D is.
huge = ProjectionSpec(Layout([("stack", (2**20, 2**20))]), d=2**20)
print("g at 2^40 - 3:", huge.groups(2**40 - 3, 2**40))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter.safetensors"
    save_adapter(path, spec, theta_d)
    loaded, again = load_adapter(path)
    assert loaded == spec
    assert (again == theta_d).all()
    print(f"{path.name}: {path.stat().st_size:,} bytes for {spec.D:,} LoRA parameters")
