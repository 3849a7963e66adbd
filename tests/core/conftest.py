"""What the tests of the core share."""

import sys
from pathlib import Path

import hypothesis
import pytest

from unilora_core import Layout, ProjectionSpec

sys.path.insert(0, str(Path(__file__).parent))  # for toy_backend

hypothesis.settings.register_profile("core", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("core")


@pytest.fixture(scope="session")
def spec_of():
    """A function (D, d, …) → a spec whose layout is one factor ``m.A`` of D numbers."""

    def make(D, d, **fields):
        return ProjectionSpec(Layout([("m.A", (D,))]), d, **fields)

    return make
