"""``python benchmarks/gpu``: see command.py."""

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # the benchmarks, also where PYTHONSAFEPATH leaves them out

if __name__ == "__main__":
    importlib.import_module("gpu.command").main()
