"""`unilora merge`: a plain model with the adapter in its weights."""

import argparse
from pathlib import Path

from unilora_cli.console import CommandError, say
from unilora_cli.models import AUTO, Base, build, config_of, load_adapter, readable_errors, remembered, tokenizer
from unilora_core import read_adapter
from unilora_core.header import read_header

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Write the merged model.

    Raises:
        CommandError: the base model is not known or cannot be built; the output folder is not empty; ``--onnx`` without
            the packages it needs, or for a model that torch cannot export. The folder is left as it was then.
    """
    folder = Path(arguments.out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{arguments.out}: exists and is not an empty folder; choose another --out.")
    file = read_adapter(arguments.file)
    base = remembered(file.metadata, arguments, arguments.file)
    if base.kind == "vit":
        written = _merge_timm(base, arguments.file, folder, arguments.onnx)
    elif arguments.onnx:
        raise CommandError(f"--onnx goes with models of timm; {base.name!r} is one of transformers.")
    else:
        written = _merge_transformers(base, arguments.file, folder)
    count, size = len(read_header(arguments.file, file).targets), sum(path.stat().st_size for path in folder.iterdir())
    say(f"merged {count} targets of {base.name} into {arguments.out}: {size:,} bytes. Load it with\n  {written}")
    if not base.pretrained and not base.checkpoint:
        say(
            f"note: the base has random weights, made again from seed {base.seed}; they depend on the version of torch."
        )


def _merge_transformers(base: Base, file: str, folder: Path) -> str:
    """Checkpoint to checkpoint, one of its files in memory at a time."""
    from tqdm import tqdm

    from unilora_transformers.merging import merge_checkpoint

    config, tokens = dict(base.arguments), tokenizer(base)
    if base.kind == "text" and getattr(config_of(base), "pad_token_id", None) is None:
        tokens.pad_token = tokens.pad_token or tokens.eos_token
        config["pad_token_id"] = tokens.pad_token_id  # as in training: decoders find the last token of a text by it
    with readable_errors(f"cannot merge into {base.name!r}"):
        merge_checkpoint(file, base.name, folder, config=config, progress=lambda files: tqdm(files, unit="file"))
    tokens.save_pretrained(folder)
    auto = AUTO[base.kind]
    return f'transformers.{auto}.from_pretrained("{folder}")'


def _merge_timm(base: Base, file: str, folder: Path, onnx: bool) -> str:
    """Weights and config as on the hub: model.safetensors and config.json; model.onnx beside them."""
    from timm.models import save_for_hf

    from unilora_timm.saving import check_onnx, save_onnx

    if onnx:
        try:
            check_onnx()
        except ModuleNotFoundError as error:
            raise CommandError(f"--onnx: {error}") from error
    model, _ = build(base)
    load_adapter(base, model, file).detach(merge=True)
    if onnx:  # first, so that a model that cannot be exported leaves nothing behind
        with readable_errors(f"--onnx: cannot export {base.name!r}"):
            save_onnx(model, folder / "model.onnx")
    config = {"label_names": list(base.labels)} if base.labels else None
    save_for_hf(model, folder, model_config=config, model_args=base.arguments, safe_serialization=True)
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'
