"""What was asked for is there: "skipped" cannot look like "passed"."""

import os
import subprocess
import sys
from pathlib import Path


def collect(expected):
    """The exit code and the messages of a run that expects these packages."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(Path(__file__).with_name("test_layout.py"))]
    done = subprocess.run(
        command,
        env={**os.environ, "UNILORA_EXPECT": expected, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_run_fails_that_lacks_what_it_expects():
    code, message = collect("numpy,no_such_framework")
    assert code == 4
    assert "UNILORA_EXPECT lists no_such_framework, not installed here" in message


def test_a_run_starts_that_has_what_it_expects():
    assert collect("numpy, safetensors") == (0, "")
