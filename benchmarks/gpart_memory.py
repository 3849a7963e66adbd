"""GPart on the shapes of Llama-3.2-1B: what a layer's forward and backward pass take above the base.

    python benchmarks/gpart_memory.py            # a minute on two cores, no GPU; `nox -s figures` runs it
    python benchmarks/gpart_memory.py --write    # benchmarks/results/gpart_memory.json

Each shape of layer, in bfloat16, at its place in a θ_D of all 112 layers (D = 973 M), with d = 524,288. What counts is
the most that all tensors hold at once in a pass with the adapter, less that of a pass without. Beside it stand the
bytes of the layer's ΔW in float32, and of θ_d. Seconds are those of the processor, one thread, with the adapter.
"""

import json
import sys
import time

import common
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unilora_core.frames import Sizes
from unilora_core.methods import plan_spec
from unilora_torch.streamed import Place, gradient, product, streamed

OPERATORS = {torch.ops.unilora.streamed.default: product, torch.ops.unilora.streamed_gradient.default: gradient}
"""What would hide its temporaries from a dispatch mode."""

HIDDEN, KV, INTERMEDIATE, LAYERS, d, TOKENS = 2048, 512, 8192, 16, 524_288, 256
if common.SMOKE:
    HIDDEN, KV, INTERMEDIATE, LAYERS, d, TOKENS = 512, 128, 2048, 2, 32_768, 64
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}


class Live(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and count."""
        if func in OPERATORS:
            with self:
                return OPERATORS[func](*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.held = {at: each for at, each in self.held.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return output


def measure(name: str) -> dict[str, float]:
    """The last layer of this name, with the adapter and without."""
    targets = [(f"layers.{i}.{n}", Sizes(*SHAPES[n])) for i in range(LAYERS) for n in SHAPES]
    spec = plan_spec(targets, method="gpart", d=d)
    width, height = SHAPES[name]
    layer = nn.Linear(width, height, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
    theta_d, scale = torch.zeros(d, requires_grad=True), torch.from_numpy(spec.scale())
    told = json.dumps(spec.to_json())
    place = Place(spec.layout.slices[f"layers.{LAYERS - 1}.{name}.W"].start, height, width)

    def measured(adapted: bool) -> tuple[int, float]:
        x.grad = theta_d.grad = None
        start = time.process_time()
        with Live() as live:
            output = layer(x)
            (output + streamed(x, theta_d * scale, told, place) if adapted else output).sum().backward()
        return live.most, time.process_time() - start

    base, _ = measured(False)
    with_adapter, seconds = measured(True)
    assert theta_d.grad is not None
    assert theta_d.grad.any()
    return {"D": spec.D, "above_base": with_adapter - base, "delta_w": 4 * width * height, "seconds": seconds}


def main() -> None:
    """Every shape."""
    parser = common.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpart_memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in SHAPES:
        rows[name] = row = measure(name)
        print(f"{name:10} {row['above_base'] / 1e6:7.1f} MB; its ΔW {row['delta_w'] / 1e6:6.1f} MB", row, flush=True)
    most, allowed = (
        max(row["above_base"] for row in rows.values()),
        max(row["delta_w"] for row in rows.values()) + 4 * d,
    )
    print(f"most {most / 1e6:.1f} MB; the largest ΔW and θ_d have {allowed / 1e6:.1f} MB")
    if most > allowed and not common.SMOKE:  # small layers have less than one block
        sys.exit("more than the largest ΔW and θ_d")
    if options.write or common.SMOKE:
        common.write("gpart_memory", {"d": d, "tokens": TOKENS, "rows": rows, "most": most, "allowed": allowed})


if __name__ == "__main__":
    main()
