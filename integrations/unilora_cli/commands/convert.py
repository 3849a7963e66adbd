"""`unilora convert`: adapter files, plain LoRA folders, and PEFT's Uni-LoRA folders."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, path_of, say
from unilora_cli.options.files import Convert
from unilora_cli.tasks.models import Base, build, load_adapter, remembered
from unilora_core import read_adapter
from unilora_core.engines import check, read_lora
from unilora_core.files import try_files
from unilora_core.header import BaseArguments, Header, read_header

__all__ = ["run"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = {"SEQ_CLS": "text", "CAUSAL_LM": "lm"}


def run(options: Convert) -> None:
    """Convert as the options say.

    Raises:
        CommandError: the source does not fit the wanted format, or there is a file where the result goes.
        OSError: the result cannot be written, which is tried first.
    """
    source = path_of(options.source)
    if not source.exists():
        raise CommandError(f"{options.source}: no such adapter file or folder.")
    if source.is_dir() != (options.to == "unilora"):
        wanted = "a PEFT folder" if options.to == "unilora" else "an adapter file"
        raise CommandError(f"{options.source}: --to {options.to} starts from {wanted}.")
    if options.to != "lora" and (options.engine or options.rank):
        raise CommandError(f"--engine and --rank go with --to lora, not with --to {options.to}.")
    out = path_of(options.out)
    files = [out] if source.is_dir() or options.to == "gguf" else [out / WEIGHTS, out / CONFIG]
    if not options.overwrite and (there := [file for file in files if file.is_file()]):
        raise CommandError(f"{there[0]}: there is a file already; add --overwrite, or choose another OUT.")
    try_files(*files)
    (_from_peft if source.is_dir() else _from_file)(source, options)


def _from_file(source: Path, options: Convert) -> None:
    base = remembered(read_header(source, read_adapter(source)), options)
    if options.to in ("peft-unilora", "gguf") and base.kind == "vit":
        raise CommandError(f"--to {options.to} is for transformers models; for a timm model use --to lora.")
    model, _ = build(base)
    adapter = load_adapter(base, model, source, options.any_rank)
    if options.to == "lora":
        adapter.export_lora(options.out, base_model=base.name, rank=options.rank, engine=options.engine)
    elif options.to == "gguf":
        from unilora_transformers import save_gguf

        save_gguf(adapter, options.out)
    else:
        from unilora_transformers import save_peft

        save_peft(adapter, options.out)
    _report(options, adapter, Path(options.out) / ("" if options.to == "gguf" else WEIGHTS))
    if options.to == "lora":
        found = check(options.out)
        say(f"served by: {', '.join(name for name, reasons in found.items() if not reasons) or 'no engine'}")
        say(f"`unilora check {options.out}` says how, and why not by others")


def _from_peft(source: Path, options: Convert) -> None:
    from unilora_transformers import load_peft

    base = _peft_base(source, options)
    model, _ = build(base)
    adapter = load_peft(model, source, any_rank=options.any_rank)
    names = getattr(model.config, "id2label", None) if base.kind == "text" else None
    labels = tuple(str(names[i]) for i in sorted(names)) if names else ()
    adapter.save(options.out, metadata=Base(base.kind, base.name, labels, base.arguments).metadata())
    _report(options, adapter, Path(options.out))


def _peft_base(source: Path, options: Convert) -> Base:
    """The base model, from the folder's config and the command line; the number of classes from the saved head."""
    found = read_lora(source)
    kind: Any = options.kind or KINDS.get(found.config.get("task_type") or "")
    classes = _classes(found.shapes.values()) if kind == "text" else 0
    said = Header(
        targets=(),
        modules_to_save=(),
        base=None,
        base_model=found.config.get("base_model_name_or_path"),
        base_class=None,
        task=kind,
        labels=(),
        base_arguments=BaseArguments({"num_labels": classes} if classes else {}),
        where=str(source),
    )
    return remembered(said, options)


def _classes(shapes: Iterable[tuple[int, ...]]) -> int:
    """The outputs of the saved head; 0 without one. A head of several layers narrows to its classes."""
    return min((shape[0] for shape in shapes if len(shape) == 2 and all(shape)), default=0)


def _report(options: Convert, adapter: Any, written: Path) -> None:
    say(
        f"{options.source} → {options.out} ({options.to}): {len(adapter.targets)} targets, "
        f"d = {adapter.spec.d:,}, D = {adapter.spec.D:,}, {written.stat().st_size:,} bytes"
    )
