"""One process of test_distributed: trains on its share of the batch and prints its losses and θ_d as JSON."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from small_models import mlp

import unilora_torch

WIDTH, BATCH, STEPS = 8, 8, 6
CASES = {
    "uni-lora": {"d": 30, "start": "identity"},
    "tied-lora": {"method": "tied-lora", "grouping": "fastfood", "d": 30},
}
"""What `unilora_torch.attach` gets: a gather; factors that layers share, of another map."""


def train(rank: int, world: int, case: str, wrap=lambda model: model) -> dict:
    """Losses over the steps, and θ_d at the end."""
    torch.set_num_threads(1)
    model = mlp(width=WIDTH, checkpointing=False)
    adapter = unilora_torch.attach(model, modules_to_save=["head"], **CASES[case])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, WIDTH, generator=generator).chunk(world)[rank]
    y = torch.randint(0, 3, (BATCH,), generator=generator).chunk(world)[rank]
    opt = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    net, losses = wrap(model), []
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return {"losses": losses, "theta_d": adapter.theta_d.tolist(), "keys": sorted(net.state_dict())}


def main(rank: int, world: int, meeting: str, case: str) -> None:
    """Meet the other processes over a file, then train."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    found = train(rank, world, case, torch.nn.parallel.DistributedDataParallel)
    torch.distributed.destroy_process_group()
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
