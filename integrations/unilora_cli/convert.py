"""`unilora convert`: adapter files, plain LoRA folders, and PEFT's Uni-LoRA folders."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unilora_cli.console import CommandError, say
from unilora_cli.models import Base, build, load_adapter, remembered
from unilora_core import read_adapter
from unilora_core.engines import check

__all__ = ["run"]

WEIGHTS = "adapter_model.safetensors"
KINDS = {"SEQ_CLS": "text", "CAUSAL_LM": "lm"}


def run(arguments: argparse.Namespace) -> None:
    """Convert as the arguments say.

    Raises:
        CommandError: the source does not fit the wanted format.
    """
    source = Path(arguments.source).expanduser()
    if not source.exists():
        raise CommandError(f"{arguments.source}: no such adapter file or folder.")
    if source.is_dir() != (arguments.to == "unilora"):
        wanted = "a PEFT folder" if arguments.to == "unilora" else "an adapter file"
        raise CommandError(f"{arguments.source}: --to {arguments.to} starts from {wanted}.")
    if arguments.to != "lora" and (arguments.engine or arguments.rank):
        raise CommandError(f"--engine and --rank go with --to lora, not with --to {arguments.to}.")
    (_from_peft if source.is_dir() else _from_file)(source, arguments)


def _from_file(source: Path, arguments: argparse.Namespace) -> None:
    base = remembered(read_adapter(source).metadata, arguments, str(source))
    if arguments.to == "peft-unilora" and base.kind == "vit":
        raise CommandError("PEFT's Uni-LoRA folders are for transformers models; for a timm model use --to lora.")
    model, _ = build(base)
    adapter = load_adapter(base, model, source)
    if arguments.to == "lora":
        adapter.export_lora(arguments.out, base_model=base.name, rank=arguments.rank, engine=arguments.engine)
    else:
        from unilora_transformers import save_peft

        save_peft(adapter, arguments.out)
    _report(arguments, adapter, Path(arguments.out) / WEIGHTS)
    if arguments.to == "lora":
        found = check(arguments.out)
        say(f"served by: {', '.join(name for name, reasons in found.items() if not reasons) or 'no engine'}")
        say(f"`unilora check {arguments.out}` says how, and why not by others")


def _from_peft(source: Path, arguments: argparse.Namespace) -> None:
    from unilora_transformers import load_peft

    base = _peft_base(source, arguments)
    model, _ = build(base)
    adapter = load_peft(model, source)
    names = getattr(model.config, "id2label", None) if base.kind == "text" else None
    labels = tuple(names[i] for i in sorted(names)) if names else ()
    adapter.save(arguments.out, metadata=Base(base.kind, base.name, labels, base.arguments).metadata())
    _report(arguments, adapter, Path(arguments.out))


def _peft_base(source: Path, arguments: argparse.Namespace) -> Base:
    """The base model, from the folder's config and the command line; the number of classes from the saved head."""
    try:
        config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{source}: there is no adapter_config.json in it, so it is no PEFT folder.") from None
    except ValueError as error:
        raise CommandError(f"{source / 'adapter_config.json'}: not JSON ({error}).") from error
    base = remembered(_known(config), arguments, str(source))
    if base.kind == "text" and "num_labels" not in base.arguments and (classes := _classes(source)):
        return replace(base, arguments=base.arguments | {"num_labels": classes})
    return base


def _known(config: dict[str, Any]) -> dict[str, str]:
    known = {"task": KINDS.get(str(config.get("task_type"))), "base_model": config.get("base_model_name_or_path")}
    return {key: value for key, value in known.items() if value}


def _classes(folder: Path) -> int:
    """The outputs of the saved head; 0 without one. A head of several layers narrows to its classes."""
    if not (folder / WEIGHTS).is_file():
        return 0  # load_peft says what is missing
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise CommandError(f"{folder / WEIGHTS}: not a whole safetensors file ({error}); fetch it again.") from error
    return min((shape[0] for shape in shapes if len(shape) == 2), default=0)


def _report(arguments: argparse.Namespace, adapter: Any, written: Path) -> None:
    say(
        f"{arguments.source} → {arguments.out} ({arguments.to}): {len(adapter.targets)} targets, "
        f"d = {adapter.spec.d:,}, D = {adapter.spec.D:,}, {written.stat().st_size:,} bytes"
    )
