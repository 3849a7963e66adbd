"""Imports point down only, read from the syntax tree: integrations → backends → core → numpy and friends."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "unilora_core": ROOT / "unilora_core",
    "unilora_torch": ROOT / "backends" / "unilora_torch",
    "unilora_jax": ROOT / "backends" / "unilora_jax",
    "unilora_transformers": ROOT / "integrations" / "unilora_transformers",
    "unilora_timm": ROOT / "integrations" / "unilora_timm",
    "unilora_vllm": ROOT / "integrations" / "unilora_vllm",
    "unilora_cli": ROOT / "integrations" / "unilora_cli",
}
INTEGRATION = {"unilora_core", "unilora_torch", "numpy", "torch", "huggingface_hub", "safetensors", "typing_extensions"}
ALLOWED = {
    "unilora_core": {"numpy", "safetensors"},
    "unilora_torch": {"unilora_core", "numpy", "torch", "safetensors", "typing_extensions"},
    "unilora_jax": {"unilora_core", "numpy", "jax", "safetensors"},
    "unilora_transformers": {*INTEGRATION, "gguf", "regex", "transformers"},
    "unilora_timm": {*INTEGRATION, "timm"},
    "unilora_vllm": {*INTEGRATION, "unilora_transformers", "vllm"},  # what vLLM serves are transformers' models
}
"""Beside the standard library and the package itself."""

COMMAND = {"unilora_core"}
"""What the command may load before it knows the subcommand; a subcommand's own modules may import anything."""

SEAM = "_namespace.py"
"""The one file that imports array_api_compat."""

HEADER = {"unilora_core": {"header.py"}, "unilora_cli": {"options/fields.py"}}
"""The file that looks into what an adapter file says; and one that reads the metadata of a dataclass's field."""

KERNELS = "kernels/"
"""Triton's kernels, imported on CUDA only: the one folder of a backend that imports triton."""

SUITE = "testing/"
"""The conformance suite, imported on request only: the one folder of the core that imports hypothesis."""


def imports(source, *, top_level=False):
    """The dotted names of all modules that are imported; ``top_level``: outside functions only."""
    found, todo = set(), [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else node.module
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            todo += ast.iter_child_nodes(node)
    return found


def foreign(names, package):
    """The packages that these names belong to, without the standard library and the package itself."""
    return {name.partition(".")[0] or "." for name in names} - sys.stdlib_module_names - {package}


def strays(package, name, source):
    """What the file ``name`` of ``package`` (its path in there) imports and must not."""
    seam = {"array_api_compat"} if (package, name) == ("unilora_core", SEAM) else set()
    suite = {"hypothesis"} if package == "unilora_core" and name.startswith(SUITE) else set()
    triton = {"triton"} if package == "unilora_torch" and name.startswith(KERNELS) else set()
    return foreign(imports(source), package) - ALLOWED[package] - seam - suite - triton


def readings(source):
    """The lines in which a file's ``metadata`` is looked into, rather than made (``metadata()``) or shown whole."""
    nodes = list(ast.walk(ast.parse(source)))
    inside = {node.value for node in nodes if isinstance(node, (ast.Subscript, ast.Attribute))}
    shown = {node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "items"}
    made = {node.func for node in nodes if isinstance(node, ast.Call) and node not in inside}
    found = (node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "metadata")
    return {node.lineno for node in found if isinstance(node.ctx, ast.Load) and node not in shown | made}


def loaded_at_once(sources, start="main"):
    """The packages that loading one module of ``unilora_cli`` loads; ``sources``: module name → source."""
    todo, done, names = [start], set(), set()
    while todo:
        module = todo.pop()
        done.add(module)
        found = imports(sources[module], top_level=True)
        names |= found
        todo += [n for n in sources if f"unilora_cli.{n}" in found and n not in done]
    return foreign(names, "unilora_cli")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert files, f"{package}: no files in {FOLDERS[package]}"
    names = {path: path.relative_to(FOLDERS[package]).as_posix() for path in files}
    found = {name: strays(package, name, path.read_text("utf-8")) for path, name in names.items()}
    assert not {name: modules for name, modules in found.items() if modules}


@pytest.mark.parametrize("package", FOLDERS)
def test_what_a_file_says_reaches_a_call_through_the_header_only(package):
    """There it is given a type, a range, or a refusal."""
    files = {path.relative_to(FOLDERS[package]).as_posix(): path for path in FOLDERS[package].rglob("*.py")}
    found = {name: readings(path.read_text("utf-8")) for name, path in files.items() if not name.startswith(SUITE)}
    assert {name for name, lines in found.items() if lines} == HEADER.get(package, set())


@pytest.mark.parametrize(
    "source",
    [
        'file.metadata["base_model"]',
        'file.metadata.get("base_model")',
        "said = file.metadata",
        "dict(read_adapter(path).metadata)",
        "build(**file.metadata)",
        'safe_open(path).metadata()["spec"]',
    ],
)
def test_a_planted_reading_is_caught(source):
    assert readings(source) == {1}


def test_what_is_no_reading_is_not_caught():
    assert not readings('for name, text in file.metadata.items(): print(name, text)\nsave(path, metadata={"a": "b"})')


def test_the_command_starts_light():
    paths = {
        path.relative_to(FOLDERS["unilora_cli"]).with_suffix(""): path for path in FOLDERS["unilora_cli"].rglob("*.py")
    }
    sources = {".".join(name.parts): path.read_text("utf-8") for name, path in paths.items()}
    assert loaded_at_once(sources) <= COMMAND


def test_every_package_has_its_rule():
    built = {path.parent.name for path in ROOT.glob("**/unilora_*/__init__.py") if ".nox" not in path.parts}
    assert built - {"build"} <= {*FOLDERS, "unilora_jax"}
    assert set(FOLDERS) == {*ALLOWED, "unilora_cli"}


@pytest.mark.parametrize(
    ("package", "name", "source", "stray"),
    [
        ("unilora_core", "spec.py", "import torch", "torch"),
        ("unilora_core", "spec.py", "from array_api_compat import device", "array_api_compat"),
        ("unilora_core", "spec.py", "def f():\n    import jax.numpy as jnp", "jax"),
        ("unilora_core", "spec.py", "if True:\n    from unilora_torch import attach", "unilora_torch"),
        ("unilora_core", "spec.py", "from . import layout", "."),
        ("unilora_core", "spec.py", "import hypothesis", "hypothesis"),
        ("unilora_core", "testing/suite.py", "import pytest", "pytest"),
        ("unilora_core", "testing/_namespace.py", "import array_api_compat", "array_api_compat"),
        ("unilora_torch", "testing/suite.py", "import hypothesis", "hypothesis"),
        ("unilora_torch", "adapter.py", "try:\n    import transformers\nexcept ImportError: pass", "transformers"),
        ("unilora_torch", "adapter.py", "import array_api_compat.torch", "array_api_compat"),
        ("unilora_jax", "plan.py", "from unilora_torch import attach", "unilora_torch"),
        ("unilora_jax", "plan.py", "from flax import nnx", "flax"),
        ("unilora_timm", "attach.py", "import unilora_transformers", "unilora_transformers"),
        ("unilora_timm", "attach.py", "from unilora_cli import main", "unilora_cli"),
        ("unilora_transformers", "attach.py", "class A:\n    import timm", "timm"),
        ("unilora_transformers", "served.py", "import unilora_vllm", "unilora_vllm"),
        ("unilora_vllm", "cache.py", "import unilora_timm", "unilora_timm"),
    ],
)
def test_a_planted_import_is_caught(package, name, source, stray):
    assert strays(package, name, source) == {stray}


@pytest.mark.parametrize(
    ("package", "name", "source"),
    [
        ("unilora_core", SEAM, "from array_api_compat import device"),
        ("unilora_core", "testing/suite.py", "from hypothesis import given"),
        ("unilora_core", "spec.py", "import json\nimport numpy as np\nfrom unilora_core.layout import Layout"),
        ("unilora_timm", "attach.py", "import timm\nfrom unilora_torch import attach"),
    ],
)
def test_what_is_allowed_is_not_caught(package, name, source):
    assert not strays(package, name, source)


@pytest.mark.parametrize("way", ["from unilora_cli import tools", "import unilora_cli.tools", "import torch"])
def test_a_planted_import_in_the_command_is_caught(way):
    assert loaded_at_once({"main": way, "tools": "try:\n    import torch\nfinally: pass"}) == {"torch"}


def test_a_late_import_in_the_command_is_not_caught():
    sources = {"main": "import argparse\ndef run():\n    from unilora_cli import tools", "tools": "import torch"}
    assert loaded_at_once(sources) == set()
