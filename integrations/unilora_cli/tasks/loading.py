"""How a base model is loaded for training: its device, its precision, and what saves memory."""

import importlib.util
from typing import Any

import torch
from torch import nn

from unilora_cli.console import CommandError, one_line
from unilora_cli.options.finetune import Memory
from unilora_cli.tasks.models import Base, build, readable_errors
from unilora_torch import Adapter

__all__ = ["check_available", "device_of", "loaded", "prepare"]

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        CommandError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name}: there is no such device here ({one_line(error, 120)}).") from error
    if device.type == "meta":
        raise CommandError("--device meta: nothing is computed there; say cpu, cuda or auto.")
    return device


def check_available(options: Memory, shard: bool = False) -> None:
    """Say what is missing before anything is read.

    Raises:
        CommandError: ``--load-in-4bit`` without bitsandbytes, or with ``--shard``.
    """
    if options.load_in_4bit and shard:
        raise CommandError("--load-in-4bit and --shard exclude each other: FSDP2 does not part quantised weights here.")
    if options.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise CommandError(
            "--load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes accelerate"
        )


def loaded(base: Base, options: Memory, shard: bool = False) -> tuple[Any, list[str]]:
    """A base model of transformers in the precision of the options, and the names of its parameters that no
    checkpoint gave values; on its device, so that no check of a large model runs on the CPU. One that ``--shard`` is
    going to part stays on the CPU till then, as the whole may not fit on a device.

    Precision is no part of `Base`: an adapter of a 4-bit base is merged into the same base unquantised.

    Raises:
        CommandError: it cannot be built so.
    """
    how: dict[str, Any] = {}
    if options.dtype != "auto":
        how["dtype"] = DTYPES[options.dtype]
    if options.load_in_4bit:
        from transformers import BitsAndBytesConfig

        from unilora_transformers.targets import HEADS

        how["device_map"] = {"": device_of(options.device)}
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[rf"(.*\.)?{name}" for name in ("lm_head", "pooler", *HEADS)],  # some train in full
        )
    model, fresh = build(base, **how)
    if not getattr(model, "is_quantized", False):  # that one is where it was loaded to
        device = device_of(options.device)
        if not shard:
            model.to(device)
        if device.type == "cpu" and any(p.dtype == torch.float16 for p in model.parameters()):
            model.float()  # the same values: a CPU's norms take no float16 beside the bfloat16 of autocast
    if options.gradient_checkpointing:
        from unilora_transformers.checkpointing import enable_checkpointing

        with readable_errors(f"--gradient-checkpointing of {base.name!r}"):
            enable_checkpointing(model, {"use_reentrant": False})
    return model, fresh


def prepare(model: nn.Module, adapter: Adapter) -> bool:
    """Make the modules to save float32, however the base is stored; whether the base is in half precision.

    Beside such a base training runs under autocast.
    """
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if half:
        for group in adapter.parameter_groups(1.0):
            for parameter in group["params"]:
                parameter.data = parameter.data.float()
    return half
