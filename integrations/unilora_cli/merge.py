"""`unilora merge`: a plain model with the adapter in its weights."""

import argparse
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, say
from unilora_cli.models import Base, build, load_adapter, pad_with, remembered, tokenizer
from unilora_core import read_adapter

__all__ = ["merged", "run"]


def run(arguments: argparse.Namespace) -> None:
    """Write the merged model.

    Raises:
        CommandError: the base model is not known or cannot be built; the output folder is not empty.
    """
    folder = Path(arguments.out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{arguments.out}: exists and is not an empty folder; choose another --out.")
    base = remembered(read_adapter(arguments.file).metadata, arguments, arguments.file)
    model, _ = build(base)
    adapter = load_adapter(base, model, arguments.file)
    count = len(adapter.targets)
    merged(model, adapter)
    written = (_write_timm if base.kind == "vit" else _write_transformers)(base, model, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"merged {count} targets of {base.name} into {arguments.out}: {size:,} bytes. Load it with\n  {written}")
    if not base.pretrained and not base.checkpoint:
        say(
            f"note: the base has random weights, made again from seed {base.seed}; they depend on the version of torch."
        )


def merged(model: Any, adapter: Any) -> None:
    """Take the adapter off and leave B·A in the weights."""
    import torch

    adapter.merge()
    modules = dict.fromkeys(target.module for target in adapter.targets)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in modules}
    adapter.detach()
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)


def _write_transformers(base: Base, model: Any, folder: Path) -> str:
    tokens = tokenizer(base)
    if base.kind == "text":
        pad_with(model, tokens)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    auto = "AutoModelForCausalLM" if base.kind == "lm" else "AutoModelForSequenceClassification"
    return f'transformers.{auto}.from_pretrained("{folder}")'


def _write_timm(base: Base, model: Any, folder: Path) -> str:
    """Weights and config as on the hub: model.safetensors and config.json."""
    from timm.models import save_for_hf

    config = {"label_names": list(base.labels)} if base.labels else None
    save_for_hf(model, folder, model_config=config, model_args=base.arguments, safe_serialization=True)
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'
