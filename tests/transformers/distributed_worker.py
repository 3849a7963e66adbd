"""One process of test_distributed: runs the named cases one after the other and writes what they found as JSON.

The environment says which process it is, as torchrun does.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import unilora_transformers
from unilora_core import read_adapter

STEPS, BATCH = 20, 4
CONFIG = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def llama(seed=0, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    return model, unilora_transformers.attach(model, "all-linear", seed=seed, **options)


def rows():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 60, (24, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def shard(model, policy=None, adapter=True):
    """FSDP2 as by hand: the adapter, each layer, then the rest."""
    policy = policy or MixedPrecisionPolicy()
    if adapter:
        fully_shard(model.unilora)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def loop(rank, world, wrap=lambda model: model, checkpointing=False):
    """Losses of a plain loop over this process's share of each batch, and θ_d at the end."""
    model, adapter = llama()
    rates = [group["lr"] for group in adapter.parameter_groups(1e-2)]
    net = wrap(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([model.unilora.theta_d], lr=rates[0], weight_decay=0)
    data, losses = torch.stack([row["input_ids"] for row in rows()]), []
    for step in range(STEPS):
        ids = data[BATCH * step % 24 :][:BATCH].chunk(world)[rank]
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if world > 1:
        for loss in losses:
            distributed.all_reduce(loss, distributed.ReduceOp.SUM)
    return model, {"losses": [loss.item() / world for loss in losses]}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def run_loop(rank, world, folder, kind):
    wraps = {
        "alone": lambda model: model,
        "ddp": DistributedDataParallel,
        "fsdp": shard,
        "fsdp checkpointing": shard,
        "fsdp bf16": lambda model: shard(model, MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    }
    model, found = loop(rank, world, wraps[kind], checkpointing="checkpointing" in kind)
    found["theta_d"] = whole(model.unilora.theta_d).tolist()
    if kind == "fsdp":
        found |= _files(model, rank, Path(folder))
    return found


def _files(model, rank, folder):
    """What is written from shards is whole; a state dict of shards goes into another model."""
    model.save_pretrained(folder / f"by-{rank}")
    state = get_model_state_dict(model)
    other = shard(llama()[0])
    set_model_state_dict(other, state)
    with torch.no_grad():
        same = torch.equal(whole(other.unilora.theta_d), whole(model.unilora.theta_d))
    file = read_adapter(folder / f"by-{rank}" / "adapter.safetensors")
    return {"same": same, "written": file.theta_d.tolist(), "class": file.metadata["base_class"]}


def run_error(rank, world, folder, kind):
    """Mixed precision over the adapter would round θ_d."""
    model, _ = llama()
    shard(model, MixedPrecisionPolicy(torch.bfloat16), adapter=False)
    ids = rows()[0]["input_ids"][None]
    try:
        model(input_ids=ids)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


def run_trainer(rank, world, folder, kind):
    """The Trainer, stopped in the middle and resumed in a fresh model, or run through."""
    found = {}
    for part, resume in (("whole", None), ("again", f"{folder}/{kind}-whole/checkpoint-10")):
        transformers.set_seed(0)
        model, adapter = llama()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        options = {"fsdp": True, "fsdp_config": dict(FSDP)} if "fsdp" in kind else {}
        arguments = TrainingArguments(
            f"{folder}/{kind}-{part}",
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // world,
            logging_steps=1,
            save_steps=10,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            bf16="bf16" in kind,
            **options,
        )
        if "fsdp" in kind:
            force_fsdp(arguments, ram_efficient="efficient" in kind)
        if "bf16" in kind:
            fully_shard(model.unilora)
        groups = {"params": adapter.parameter_groups(1e-2)}
        trainer = Trainer(model, arguments, train_dataset=rows(), optimizer_cls_and_kwargs=(torch.optim.AdamW, groups))
        trainer.train(resume_from_checkpoint=resume)
        found[part] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found["theta_d"] = whole(model.unilora.theta_d).tolist()
        if world > 1:
            distributed.barrier()
    checkpoint = Path(folder) / f"{kind}-whole" / "checkpoint-20"
    found["files"] = sorted(path.name for path in checkpoint.iterdir())
    if (checkpoint / "model.safetensors").exists():
        found["saved"] = load_file(checkpoint / "model.safetensors")["unilora.theta_d"].tolist()
    return found


def force_fsdp(arguments, ram_efficient):
    """Accelerate turns FSDP on for GPUs and their like only; here its state is told to, on CPUs."""
    assert arguments.device.type == "cpu"
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args | {"cpu_ram_efficient_loading": ram_efficient})
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # left by the case before
    state = Accelerator(cpu=True, mixed_precision="bf16" if arguments.bf16 else "no").state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if arguments.bf16:
        plugin.set_mixed_precision("bf16")
    state.fsdp_plugin = plugin


def run(rank, world, folder, kind):
    """One case, by its name."""
    case = run_trainer if kind.startswith("trainer") else run_error if kind == "error" else run_loop
    return case(rank, world, folder, kind)


def main(folder, *kinds):
    """Meet the other processes, then run each case; what they find goes to a file."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    found = {}
    for kind in kinds:
        found[kind] = run(rank, world, folder, kind)
        distributed.barrier()
    distributed.destroy_process_group()
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
