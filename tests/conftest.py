"""What all tests share: the namespaces, the data folder, and the rule that what was asked for is there.

``UNILORA_EXPECT=torch,jax`` makes the run fail unless these are installed, so that "skipped" cannot look like "passed".
"""

import os
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest


class Namespace(Enum):
    """Where the core is tested: the module to import, and what NumPy arrays go through on their way there."""

    NUMPY = "numpy"
    READONLY = "numpy, read-only"
    STRICT = "array_api_strict"
    TORCH = "torch"
    JAX = "jax.numpy"

    @property
    def module_name(self):
        return self.value.split(",")[0]

    @property
    def installed(self):
        return _installed(self.module_name)

    def load(self):
        """The module, at its strictest; skips the test where it is not installed."""
        if not self.installed:
            pytest.skip(f"{self.module_name} is not installed")
        module = import_module(self.module_name)
        if self is Namespace.STRICT:
            module.set_array_api_strict_flags(
                data_dependent_shapes=False, boolean_indexing=False, enabled_extensions=()
            )
        return module

    def asarray(self, values):
        """A NumPy array in this namespace, the same dtype."""
        if self is Namespace.NUMPY:
            return values
        if self is Namespace.READONLY:
            values = np.array(values)
            values.flags.writeable = False
            return values
        return self.load().asarray(np.array(values))


def _installed(name):
    return find_spec(name.partition(".")[0]) is not None


TRACING = (
    "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.*torch.jit.script.*deprecated:DeprecationWarning",
)
"""What PyTorch says to itself while it traces or compiles; it is seen only where warnings are errors."""


def pytest_configure(config):
    config.addinivalue_line("markers", "traces: PyTorch traces or compiles, and its own warnings of that are let pass")
    expected = os.environ.get("UNILORA_EXPECT", "").replace(",", " ").split()
    if missing := [name for name in expected if not _installed(name)]:
        raise pytest.UsageError(f"UNILORA_EXPECT lists {', '.join(missing)}, not installed here")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("traces"):
            item.add_marker(pytest.mark.filterwarnings(*TRACING))


def pytest_generate_tests(metafunc):
    """``core_case``: the conformance suite on each namespace, of which the module's ``backend`` makes a `Backend`."""
    if "core_case" not in metafunc.fixturenames:
        return
    from unilora_core.testing import cases

    found = []
    for namespace in Namespace:
        if namespace.installed:
            found += [pytest.param(case, id=str(case)) for case in cases(metafunc.module.backend(namespace))]
        else:
            skip = pytest.mark.skip(reason=f"{namespace.module_name} is not installed")
            found.append(pytest.param(None, id=namespace.name.lower(), marks=skip))
    metafunc.parametrize("core_case", found)


@pytest.fixture(params=Namespace, ids=lambda n: n.name.lower(), scope="session")
def namespace(request):
    """Each namespace in turn, as a `Namespace`: for tests with arrays as inputs."""
    request.param.load()
    return request.param


@pytest.fixture(
    params=[n for n in Namespace if n is not Namespace.READONLY], ids=lambda n: n.name.lower(), scope="session"
)
def xp(request):
    """Each namespace in turn, as its module."""
    return request.param.load()


@pytest.fixture(scope="session")
def torch():
    """PyTorch, or a skip."""
    return Namespace.TORCH.load()


@pytest.fixture(scope="session")
def jax():
    """JAX, or a skip."""
    Namespace.JAX.load()
    return import_module("jax")


@pytest.fixture(scope="session")
def data():
    """The folder of data sets that some tests read."""
    if not os.environ.get("UNILORA_DATA"):
        pytest.skip("UNILORA_DATA, the folder of the data sets, is not set")
    return Path(os.environ["UNILORA_DATA"])


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, which serves until the test ends: `tests/hub.py`."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with import_module("hub").Hub() as serving:
        yield serving
