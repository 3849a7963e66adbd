"""Processes of test_scale: each trains in every way, and writes what a step hands to collectives as JSON."""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from small_models import mlp

import unilora_torch

D_SMALL, WIDTH, RANKS = 40, 8, (2, 6)


class Counting(TorchDispatchMode):
    """Numbers that each kind of collective is given: the longer of what goes in and what comes out."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.found[func.__name__.partition(".")[0].strip("_")] += longest(args)
        return func(*args, **(kwargs or {}))


def longest(value):
    if isinstance(value, torch.Tensor):
        return value.numel()
    return max(map(longest, value), default=0) if isinstance(value, (list, tuple)) else 0


def sharded(model):
    fully_shard(model.unilora)
    fully_shard(model.head)
    return fully_shard(model)


def step(wrap, rank):
    """What the third step of a model with factors of this rank hands over."""
    model = mlp(width=WIDTH, classes=4)
    adapter = unilora_torch.attach(model, modules_to_save=["head"], rank=rank, d=D_SMALL)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    net = wrap(model)
    for _ in range(3):  # DDP settles its buckets in the second
        with Counting() as counted:
            net(torch.ones(2, WIDTH)).sum().backward()
    return {"D": adapter.spec.D, "trained": trained, **counted.found}


def run(rank, world, folder):
    """One process: meet the others over a file, then train."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    ways = {"DDP": DistributedDataParallel, "FSDP2": sharded}
    found = {name: [step(wrap, r) for r in RANKS] for name, wrap in ways.items()}
    torch.distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":  # forked, so that torch is imported once
    count = int(sys.argv[1])
    torch.multiprocessing.start_processes(run, (count, sys.argv[2]), nprocs=count, start_method="fork")
