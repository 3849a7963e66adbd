"""``import unilora_core`` loads no framework and no test library: proven in a fresh process, and the proof can fail."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

HEAVY = ("torch", "jax", "jaxlib", "tensorflow", "transformers", "timm", "peft", "datasets", "matplotlib")
TESTING = ("hypothesis", "pytest")


def loaded_by(statement):
    """Which of these packages a fresh interpreter has loaded after the statement."""
    program = f"{statement}\nimport sys\nprint(*(set({HEAVY + TESTING}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_core_loads_no_framework():
    assert loaded_by("import unilora_core") == set()


def test_using_the_core_with_numpy_loads_no_framework(tmp_path):
    program = f"""
from unilora_core import Layout, ProjectionSpec, load_adapter, project, project_transpose, save_adapter
spec = ProjectionSpec(Layout([("m.A", (4, 8))]), d=4)
save_adapter({str(tmp_path / "a")!r}, spec, project_transpose(spec, project(spec, spec.init())))
load_adapter({str(tmp_path / "a")!r})
"""
    assert loaded_by(program) == set()


def test_the_conformance_suite_loads_hypothesis_and_no_framework():
    assert loaded_by("import unilora_core.testing") == {"hypothesis"}


@pytest.mark.skipif(find_spec("unilora_cli") is None, reason="unilora_cli is not installed")
def test_the_command_loads_no_framework_before_it_must():
    assert loaded_by("import unilora_cli.main") == set()


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_proof_can_fail(name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    assert name in loaded_by(f"import unilora_core, {name}")


def test_the_proof_can_fail_without_any_framework():
    assert loaded_by("import sys; sys.modules['timm'] = sys") == {"timm"}
