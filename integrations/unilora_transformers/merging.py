"""Merging of an adapter into a checkpoint, tensor by tensor: the base model is never in memory as a whole.

What transformers renames, stacks or transposes between a checkpoint and the model is undone on the update by
transformers itself (`core_model_loading`), so that a checkpoint keeps its own form: one tensor per expert stays one
tensor per expert.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from unilora_core import MismatchError, TargetError, read_adapter
from unilora_core.files import new_folder, try_folder
from unilora_core.header import read_header
from unilora_torch import Adapter
from unilora_torch.base import check_base as check_identity
from unilora_torch.base import identity
from unilora_torch.checks import check_merged
from unilora_torch.heads import whole_names
from unilora_torch.merging import add_update
from unilora_torch.opened import Opened, open_file
from unilora_torch.targets import block_of, weight_name
from unilora_transformers.checkpoints import COPIED, Checkpoint, Names, load_small, local, on_meta

__all__ = ["merge_checkpoint"]

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REMEDY = "merge into the unquantised checkpoint that it was made from, and quantise the result."


def merge_checkpoint(
    adapter_file: str | os.PathLike,
    base: str | os.PathLike,
    out: str | os.PathLike,
    *,
    max_shard_size: int = 5 * 10**9,
    check_base: bool = True,
    any_rank: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Write a base model's checkpoint with an adapter merged into its weights.

    Each weight gets its update in float32 and is rounded once to its own dtype, as `Adapter.merge` does; modules that
    were trained in full replace the base's. One file of at most ``max_shard_size`` bytes is in memory at a time. The
    files beside the weights (tokenizer, generation config, …) are copied.

    Args:
        adapter_file: a file that `Adapter.save` wrote.
        base: the base model: a folder with safetensors files, or a name on the hub (fetched into its cache).
        out: the folder to write; it must not exist, or be empty. It appears when it is whole; in an empty folder that
            is there (a mounted or the current one) ``config.json`` comes last.
        max_shard_size: the largest size of a file, in bytes.
        check_base: whether to refuse a base with other values than the one that the file was made for.
        any_rank: whether to take factors of any rank, not only up to `unilora_core.lora.largest_rank`.
        config: fields of the model's config that differ from the base's, such as ``num_labels``.
        progress: a function around the loop over the written files, such as ``tqdm``.

    Raises:
        FileExistsError: ``out`` holds something.
        OSError: ``out`` cannot be written, which is tried first.
        FileNotFoundError: there is no safetensors checkpoint in ``base``.
        AdapterFileError: the file is damaged, or does not say which class of model it adapts.
        MismatchError: it belongs to another base, or a weight's place in the checkpoint cannot be known; the error
            names it.
        TargetError: the checkpoint is quantised. In each case nothing is written.
    """
    try_folder(out)
    file, folder = read_adapter(adapter_file), local(base)
    header = read_header(adapter_file, file)
    checkpoint = Checkpoint.of(folder)
    model = on_meta(header, folder, dict(config or {}))
    if getattr(model.config, "quantization_config", None) is not None:
        raise TargetError(f"{folder}: a quantised checkpoint, whose weights cannot take the update; {REMEDY}")
    names = Names.of(model, checkpoint)
    found = open_file(adapter_file, model, file=file, any_rank=any_rank, loaded=False)
    merged = _Merged.of(adapter_file, found, model, checkpoint, names)
    if check_base:
        load_small(model, checkpoint, names)
        check_identity(str(adapter_file), header.base, identity(model, header.modules_to_save))
    with new_folder(out, CONFIG_NAME) as new:
        for path in folder.iterdir():
            if path.suffix in COPIED and path.name not in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME):
                shutil.copyfile(path, new / path.name)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(new)  # first, as it may refuse, and the merge takes long
        _write(new, merged, max_shard_size, progress)


# ---- the merged checkpoint ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merged:
    """The tensors of the checkpoint with the adapter in them, computed one at a time.

    Attributes:
        adapter: the adapter, which computes the updates beside the model without values, and is never run.
        heads: the checkpoint's name → the value of a tensor that was trained in full.
        adapted: the checkpoint's name → the model's, for each weight that gets an update.
        keys: the names of all tensors, in the order of the base's files.
        pieces: the checkpoint's name → its part of an update that was split up already.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    names: Names
    adapter: Adapter
    heads: dict[str, Tensor]
    adapted: dict[str, str]
    keys: list[str]
    pieces: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: str | os.PathLike,
        found: Opened,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        names: Names,
    ) -> "_Merged":
        """Check that everything in the file has a place in the checkpoint."""
        trained = whole_names(found.heads)
        weights = dict.fromkeys(weight_name(target) for target in found.targets)
        _check_values(path, model, names, trained, weights)
        parts = {n: [names.plain[n]] if n in names.plain else names.converted[n] for n in weights}
        adapted = {key: name for name, keys in parts.items() for key in keys}
        for key in adapted:
            if checkpoint.dtypes[key] not in PLAIN:
                raise TargetError(f"{key}: a weight of {checkpoint.dtypes[key]} cannot take the update; {REMEDY}")
        adapter = Adapter(model, found.spec, found.targets, found.header.modules_to_save, found.frozen)
        with torch.no_grad():
            adapter.theta_d.copy_(found.theta_d)
        dtype = checkpoint.dtypes[next(iter(adapted))]
        heads = {}
        for name, value in trained.items():
            key = names.plain.get(name, name)
            heads[key] = value.to(checkpoint.dtypes.get(key, dtype)) if value.is_floating_point() else value
            check_merged(key, value, heads[key])
        kept = set(names.plain.values()) | {key for keys in names.converted.values() for key in keys}
        same_class = type(model).__name__ in (model.config.architectures or ())
        keys = [key for key in checkpoint.files if key in kept or same_class]
        keys += [key for key in heads if key not in checkpoint.files]
        return cls(model, checkpoint, names, adapter, heads, adapted, keys)

    def size(self, key: str) -> int:
        """Return the size of a tensor in bytes."""
        return self.heads[key].nbytes if key in self.heads else self.checkpoint.size(key)

    def tensor(self, key: str) -> Tensor:
        """Compute the merged value of a tensor."""
        if key in self.heads:
            return self.heads[key]
        weight = self.checkpoint.read(key)
        if key not in self.adapted:
            return weight
        name = self.adapted[key]
        if name in self.names.plain:
            merged = weight.clone()
            for target in (target for target in self.adapter.targets if weight_name(target) == name):
                add_update(merged, target, self.adapter.delta_weight(target))
        else:
            if key not in self.pieces:
                self.pieces.update(self._split_up(name))
            merged = (weight.float() + self.pieces.pop(key)).to(weight.dtype)
        check_merged(key, weight, merged)
        return merged

    def _split_up(self, name: str) -> dict[str, Tensor]:
        """Compute the update of a weight that loading puts together, in the form of the checkpoint."""
        full = torch.zeros(self.model.get_parameter(name).shape)
        for target in (target for target in self.adapter.targets if weight_name(target) == name):
            block_of(full, target).copy_(self.adapter.delta_weight(target))
        parts = revert_weight_conversion(self.model, {name: full})
        wanted = {key: self.checkpoint.shapes[key] for key in self.names.converted[name]}
        if {key: tuple(part.shape) for key, part in parts.items()} != wanted:
            raise MismatchError(
                f"{name}: transformers puts it together from {len(wanted)} tensors of the checkpoint, but cannot take "
                "it apart again; load the base model and the adapter, and merge there: adapter.detach(merge=True)."
            )
        return parts


def _check_values(
    path: str | os.PathLike, model: PreTrainedModel, names: Names, trained: Iterable[str], weights: Iterable[str]
) -> None:
    """Refuse tensors that have no place of their own in the checkpoint, and a checkpoint that lacks values."""
    by_hand = "load the base model and the adapter, and merge there: adapter.detach(merge=True)."
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in (*trained, *weights):
        other = tied.get(name) or next((key for key, source in tied.items() if source == name), name)
        if other not in (name, *trained):
            raise MismatchError(f"{path}: {name} was trained alone, but this base ties it to {other}.")
    for name in trained:
        if name in names.converted:
            raise MismatchError(f"{path}: the checkpoint holds {name}, trained in full, in another form; {by_hand}")
    for name in weights:
        if name not in names.plain and name not in names.converted:
            raise MismatchError(f"{path}: no tensor of the checkpoint is known to become {name}; {by_hand}")
    there = {*names.plain, *names.converted, *trained, *tied}
    if absent := [name for name, _ in model.named_parameters() if name not in there]:
        raise MismatchError(
            f"{path}: neither the checkpoint nor the file has values for {absent[0]} ({len(absent)} such); the base "
            "model that was trained had random ones."
        )


# ---- writing --------------------------------------------------------------------------------------------------------


def _write(folder: Path, merged: _Merged, limit: int, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> None:
    """Write files of at most ``limit`` bytes, and their index where there are several."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key in merged.keys:
        if shards[-1] and filled + merged.size(key) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += merged.size(key)
    count = len(shards)
    named = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SAFE_WEIGHTS_NAME]
    weight_map: dict[str, str] = {}
    for name, keys in progress(list(zip(named, shards, strict=True))):
        save_file({key: merged.tensor(key).contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    if count > 1:
        index = {"metadata": {"total_size": sum(map(merged.size, merged.keys))}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
