"""Read an adapter with NumPy alone and compare θ_D with PyTorch's: ``python numpy_alone.py ADAPTER THETA_D.npy``."""

import sys

import numpy as np

from unilora_core import load_adapter, project


def main(adapter: str, expected: str) -> None:
    """Exit with a message unless θ_D = P θ_d (D,) float32 has the bits that the file ``expected`` holds."""
    spec, theta_d = load_adapter(adapter)
    if project(spec, theta_d).tobytes() != np.load(expected).tobytes():
        sys.exit(f"{adapter}: θ_D computed by NumPy differs from PyTorch's.")
    if "torch" in sys.modules:
        sys.exit("unilora_core imported torch; it should need NumPy only.")


if __name__ == "__main__":
    main(*sys.argv[1:])
