"""`unilora merge`: a plain model with the adapter in its weights."""

import json
import tempfile
from pathlib import Path

from unilora_cli.console import CommandError, path_of, say
from unilora_cli.options.files import Merge
from unilora_cli.tasks.models import AUTO, Base, build, config_of, load_adapter, readable_errors, remembered, tokenizer
from unilora_core import read_adapter
from unilora_core.files import new_folder, try_folder
from unilora_core.header import read_header

__all__ = ["run"]

CONFIG = "config.json"
"""Without it neither transformers nor timm takes a folder for a model."""


def run(options: Merge) -> None:
    """Write the merged model.

    Raises:
        CommandError: the base model is not known or cannot be built; ``--onnx`` without the packages it needs, or for a
            model that torch cannot export.
        FileExistsError: the output folder is not empty.
        OSError: it cannot be written. In each case it is left as it was.
    """
    folder = path_of(options.out)
    try_folder(folder)
    header = read_header(options.file, read_adapter(options.file))
    base = remembered(header, options)
    if base.kind == "vit":
        written = _merge_timm(base, options, folder)
    elif options.onnx:
        raise CommandError(f"--onnx goes with models of timm; {base.name!r} is one of transformers.")
    else:
        written = _merge_transformers(base, options, folder)
    count, size = len(header.targets), sum(path.stat().st_size for path in folder.iterdir())
    say(f"merged {count} targets of {base.name} into {options.out}: {size:,} bytes. Load it with\n  {written}")
    if not base.pretrained and not base.checkpoint:
        say(
            f"note: the base has random weights, made again from seed {base.seed}; they depend on the version of torch."
        )


def _merge_transformers(base: Base, options: Merge, folder: Path) -> str:
    """Checkpoint to checkpoint, one of its files in memory at a time."""
    from tqdm import tqdm

    from unilora_transformers.merging import merge_checkpoint

    config, tokens = base.trust | base.arguments, tokenizer(base)
    if base.kind == "text" and getattr(config_of(base), "pad_token_id", None) is None:
        tokens.pad_token = tokens.pad_token or tokens.eos_token
        config["pad_token_id"] = tokens.pad_token_id  # as in training: decoders find the last token of a text by it
    with new_folder(folder, CONFIG) as new, readable_errors(f"cannot merge into {base.name!r}"):
        with tempfile.TemporaryDirectory() as trial:
            tokens.save_pretrained(trial)  # what cannot be saved is said before the work
        merge_checkpoint(
            options.file,
            base.name,
            new,
            any_rank=options.any_rank,
            config=config,
            progress=lambda files: tqdm(files, unit="file"),
        )
        tokens.save_pretrained(new)
    return f"transformers.{AUTO[base.kind]}.from_pretrained({json.dumps(str(folder))})"


def _merge_timm(base: Base, options: Merge, folder: Path) -> str:
    """Weights and config as on the hub: model.safetensors and config.json; model.onnx beside them."""
    from timm.models import save_for_hf

    from unilora_timm.saving import check_onnx, save_onnx

    if options.onnx:
        try:
            check_onnx()
        except ModuleNotFoundError as error:
            raise CommandError(f"--onnx: {error}") from error
    model, _ = build(base)
    load_adapter(base, model, options.file, options.any_rank).detach(merge=True)
    config = {"label_names": list(base.labels)} if base.labels else None
    with new_folder(folder, CONFIG) as new:
        if options.onnx:
            with readable_errors(f"--onnx: cannot export {base.name!r}"):
                save_onnx(model, new / "model.onnx")
        save_for_hf(model, new, model_config=config, model_args=base.arguments, safe_serialization=True)
    return f"timm.create_model({json.dumps(f'local-dir:{folder}')}, pretrained=True)"
