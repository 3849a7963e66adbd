"""The built wheel: exactly the intended packages, and an import without any framework. Run by `nox -s build`."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile

import pytest

PACKAGES = {"unilora_cli", "unilora_core", "unilora_jax", "unilora_timm", "unilora_torch", "unilora_transformers"}
PACKAGES |= {"unilora_vllm"}


@pytest.fixture
def wheel():
    if "UNILORA_WHEEL" not in os.environ:
        pytest.skip("UNILORA_WHEEL names no wheel; `nox -s build` makes one")
    return os.environ["UNILORA_WHEEL"]


def test_wheel_ships_exactly_the_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert {name for name in names if name.endswith("py.typed")} == {f"{package}/py.typed" for package in PACKAGES}


def test_wheel_ships_only_code_and_its_licence(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    recipes = {name for name in names if name.startswith("unilora_cli/recipes/") and name.endswith(".toml")}
    others = {name for name in names if not name.endswith((".py", "/py.typed"))}
    maps = ("balanced", "iid", "numpy-shuffle", "local", "by-factor", "unnormalised", "identity")
    vectors = ("adapter", "methods", "members", "codebook", "fastfood", "gaussian", "resized", *maps)
    assert others == recipes | {f"unilora_core/testing/vectors/{name}.json" for name in vectors}
    assert len(recipes) == 32
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_core_imports_in_an_empty_environment_without_a_framework(wheel):
    code = "import sys, unilora_core; print(unilora_core.__version__, {'torch', 'jax', 'timm'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.split(maxsplit=1) == [importlib.metadata.version("unilora"), "set()\n"]


def test_the_conformance_suite_runs_from_the_wheel(wheel):
    code = (
        "import numpy; from unilora_core.testing import Backend, cases\n"
        "for case in cases(Backend('numpy', numpy)): case()\n"
        "print('all')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout == "all\n"


def test_command_tells_its_version_without_a_framework(wheel):
    run = subprocess.run(["unilora", "--help"], capture_output=True, text=True, check=True, cwd="/")
    assert "finetune" in run.stdout
