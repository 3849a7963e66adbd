"""``python demo``: see comparison.py."""

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks")]  # the tasks and the training are those of the benchmarks

if __name__ == "__main__":
    importlib.import_module("comparison").main()
