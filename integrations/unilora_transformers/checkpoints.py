"""A base model as its safetensors checkpoint describes it: its tensors' names and shapes, without its weights.

The model is built on the meta device, without values, to learn its layers' names.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from unilora_core import CorruptFileError, MismatchError
from unilora_core.header import Header
from unilora_transformers.class_names import read_classes
from unilora_transformers.saving import model_class, refuse_kernels

__all__ = ["COPIED", "Checkpoint", "Names", "load_small", "local", "on_meta"]

COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
"""The endings of the files that lie beside the weights: tokenizer, chat template, generation config, code."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint: where each lies, and its shape and dtype."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a checkpoint's files."""
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            paths = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        else:
            paths = [folder / SAFE_WEIGHTS_NAME]
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    files[key], shapes[key] = path, tuple(part.get_shape())
                    empty = part[tuple(slice(0, 0) for _ in shapes[key])] if shapes[key] else file.get_tensor(key)
                    dtypes[key] = empty.dtype
        return cls(files, shapes, dtypes)

    def read(self, key: str) -> Tensor:
        """Return a tensor, whose values are read from its file where they are used."""
        with _opened(self.files[key]) as file:
            return file.get_tensor(key)

    def size(self, key: str) -> int:
        """Return the size of a tensor in bytes."""
        return torch.Size(self.shapes[key]).numel() * self.dtypes[key].itemsize


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a checkpoint of safetensors files. Load the model and save it again with "
            "save_pretrained, which writes one."
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error}); fetch it again.") from error


def local(base: str | os.PathLike, fetch: bool = True) -> Path:
    """Return the folder of a checkpoint: itself, or where the hub's cache has it.

    Args:
        fetch: whether to download what the cache lacks.
    """
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME, *(f"*{end}" for end in sorted(COPIED))]
    return Path(snapshot_download(os.fspath(base), allow_patterns=patterns, local_files_only=not fetch))


@dataclass(frozen=True)
class Names:
    """The names of tensors: which of the checkpoint become which of the model's.

    Attributes:
        plain: the model's name → the checkpoint's, where loading only renames.
        converted: the model's name → the checkpoint's, where several become one, or one is transposed.
    """

    plain: dict[str, str]
    converted: dict[str, list[str]]

    @classmethod
    def of(cls, model: PreTrainedModel, checkpoint: Checkpoint) -> "Names":
        """Find the names as `from_pretrained` finds them."""
        transforms, known = get_model_conversion_mapping(model), model.state_dict()
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        plain: dict[str, str] = {}
        converted: dict[str, list[str]] = {}
        for key in checkpoint.files:
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if pattern is None:
                plain[name] = key
            else:
                converted.setdefault(name, []).append(key)
        return cls({name: key for name, key in plain.items() if name in known}, converted)


def on_meta(header: Header, folder: Path, changes: dict[str, Any]) -> PreTrainedModel:
    """Make the model that the file adapts, from the checkpoint's config and without values."""
    config = AutoConfig.from_pretrained(folder, **{"trust_remote_code": False} | changes)
    refuse_kernels(header.where, config)
    classes = read_classes(header)
    if classes.count is not None:
        config.num_labels = classes.count
    architectures = [*(config.architectures or ()), ""]
    kind = header.base_class or (header.base.kind if header.base else architectures[0])
    cls = model_class(header.where, kind)
    try:
        with torch.device("meta"):
            model = cls._from_config(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)
    except Exception as error:  # a class may raise anything on the config of another
        raise MismatchError(
            f"{header.where}: it adapts a {kind}, which cannot be built of the config of {folder} "
            f"({type(config).__name__}: {error!r:.300}); is it the base that the adapter was trained on?"
        ) from error
    classes.put_in(model.config)
    return model


def load_small(model: PreTrainedModel, checkpoint: Checkpoint, names: Names) -> None:
    """Load the vectors and embeddings, which identify a base; not a head of another size."""
    small: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.dim() == 1}
    tables = ((f"{name}.weight", module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    small |= {name: module.weight for name, module in tables}
    there = {name: names.plain[name] for name in small if name in names.plain}
    state = {name: checkpoint.read(key) for name, key in there.items() if checkpoint.shapes[key] == small[name].shape}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
