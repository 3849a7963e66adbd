"""Every example runs as it stands, and every script of benchmarks/ with ``--smoke``, without a trace in what is kept.

Each takes seconds, most of them to import frameworks, so `nox -s examples` and `nox -s benchmarks` run them side by
side, in environments of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif("UNILORA_SCRIPTS" not in os.environ, reason="nox -s examples benchmarks runs them")

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.py"))
FILES = [path for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")]
FOLDERS = [path.parent for path in (ROOT / "benchmarks").glob("*/__main__.py")]
BENCHMARKS = sorted(path.relative_to(ROOT) for path in FILES + FOLDERS)


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def results_and_pages():
    """Every file of the results and of docs/, with what is in it."""
    folders = (ROOT / "benchmarks" / "results", ROOT / "docs")
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def nothing_changes():
    before = results_and_pages()
    yield
    after = results_and_pages()
    assert [str(path) for path in sorted(before | after) if before.get(path) != after.get(path)] == []


@pytest.mark.parametrize("script", EXAMPLES, ids=str)
def test_example(script):
    assert not run(script).startswith("skipped")


@pytest.mark.parametrize("script", BENCHMARKS, ids=str)
def test_benchmark(script):
    run(script, "--smoke")
