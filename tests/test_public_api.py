"""``__all__`` is sorted, true in both directions, and everything in it is documented."""

import importlib
import inspect
import pkgutil
from importlib.util import find_spec

import pytest

NEEDS = {
    "unilora_core": [],
    "unilora_core.testing": ["hypothesis"],
    "unilora_torch": ["torch"],
    "unilora_jax": ["jax"],
    "unilora_transformers": ["torch", "transformers"],
    "unilora_timm": ["torch", "timm"],
    "unilora_vllm": [],
}
"""The libraries and the conformance suite, and what each needs; the command is no library."""


@pytest.fixture(scope="module", params=NEEDS)
def package(request):
    for name in NEEDS[request.param]:
        if find_spec(name) is None:
            pytest.skip(f"{request.param} needs {name}, which is not installed")
    return importlib.import_module(request.param)


def own(module):
    """What a module defines itself, by public name: functions and classes."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    }


def test_all_is_sorted_and_without_repeats(package):
    assert list(package.__all__) == sorted(set(package.__all__))


def test_all_names_exist(package):
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_what_the_package_shows_is_in_all(package):
    assert set(own(package)) <= set(package.__all__)


def test_everything_public_is_documented(package):
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), f"{package.__name__}.{name} has no docstring"
        if inspect.isclass(value) and value.__module__.startswith("unilora_"):
            bare = [m for m, f in own(value).items() if m in vars(value) and not inspect.getdoc(f)]
            assert not bare, f"{package.__name__}.{name} has no docstring in {bare}"


def test_all_of_each_module_of_the_core_is_true():
    """Both ways, save for `grouping`, whose algorithms are reached by name, and the checks of the suite."""
    import unilora_core

    modules = [found.name for found in pkgutil.walk_packages(unilora_core.__path__, "unilora_core.")]
    assert "unilora_core.maps.gather" in modules
    for path in modules:
        module = importlib.import_module(path)
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], module
        if not hasattr(module, "checks") and path != "unilora_core.grouping":
            public = {name for name, value in own(module).items() if value.__module__ == module.__name__}
            assert public <= set(module.__all__), module


def test_the_core_offers_what_the_documents_rely_on():
    from unilora_core import Layout, ProjectionSpec, load_adapter, project, project_transpose, save_adapter

    assert all(map(callable, (Layout, ProjectionSpec, load_adapter, project, project_transpose, save_adapter)))
