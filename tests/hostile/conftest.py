"""The scripts beside this file are run by `nox -s fuzz`, `kill` and `stress`; pytest finds what hypothesis tries."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for mutations and readers


def pytest_collect_file():
    """Skips the folder."""
    pytest.importorskip("torch", reason="the hostile tests need torch")
