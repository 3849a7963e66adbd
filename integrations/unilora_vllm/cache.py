"""The LoRA folders that are made of adapter files: each made once, and their A and B bounded in bytes.

A folder has the adapter's own file, ``adapter_config.json`` and ``adapter_model.safetensors``. vLLM reads it again
whenever it has dropped the adapter from its memory, and asks no resolver then. So only A and B, which are large, ever
leave the cache, the least recently used first; what is left says how they are made again.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unilora_core import AdapterFileError, SpecError
from unilora_core.engines import Lora, refuse
from unilora_core.files import alone, new_files
from unilora_core.schema import read_json
from unilora_transformers import ServedBase
from unilora_vllm.settings import Settings

__all__ = ["Cache"]

FILE, CONFIG, WEIGHTS = "adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model_name_or_path"


class Cache:
    """LoRA folders made of adapter files, on disk; processes share it.

    Attributes:
        settings: its folder, its bound, and what is made.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self._base = functools.cache(lambda name: ServedBase.of(name, settings.base))
        settings.cache.mkdir(parents=True, exist_ok=True)

    def add(self, data: bytes, base: str) -> Path:
        """Return the LoRA folder of an adapter file; it is made unless it is there.

        Args:
            data: the contents of the file; equal contents have one folder.
            base: the name or path of the base model that vLLM serves.

        Raises:
            FileNotFoundError: the base's checkpoint is not found.
            AdapterFileError: the file is damaged, or vLLM would not serve the LoRA: the rank, a trained head.
            MismatchError: it belongs to another base.
            SpecError, TargetError, ValuesError: as in `Adapter.export_lora`; or A and B alone are above the bound.
            OSError: the cache cannot be written. In each case nothing has changed.
        """
        says = json.dumps([base, self.settings.dtype]).encode()
        folder = self.settings.cache / hashlib.sha256(says + data).hexdigest()[:32]
        with alone(self.settings.cache):
            if not (folder / CONFIG).is_file():
                self._make(folder, data, base)
        self.restore(folder)
        return folder

    def restore(self, folder: Path) -> None:
        """Make A and B of a folder of the cache again, if they had to leave; it counts as used now.

        Raises:
            FileNotFoundError, AdapterFileError, MismatchError, OSError: the base, or the folder, has changed since.
        """
        with alone(self.settings.cache):
            if (folder / WEIGHTS).is_file():
                os.utime(folder / WEIGHTS)
                return
            _, tensors = self._tensors(folder / FILE, read_json(folder / CONFIG)[BASE])
            with new_files(folder / WEIGHTS) as (weights,):
                self._save(tensors, weights)

    def _make(self, folder: Path, data: bytes, base: str) -> None:
        """Write a folder; the config comes last, as it makes the folder whole."""
        with new_files(folder / FILE, folder / WEIGHTS, folder / CONFIG) as (file, weights, says):
            file.write_bytes(data)
            config, tensors = self._tensors(file, base)
            self._save(tensors, weights)
            says.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _tensors(self, file: Path, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the LoRA in the rank that it needs, as vLLM fills it up itself."""
        config, tensors = self._base(base).lora_tensors(file)
        refuse(Lora(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}), "vllm")
        if (most := self.settings.max_rank) is not None and config["r"] > most:
            raise AdapterFileError(
                f"{file}: its rank is {config['r']}, and vLLM was started with --max-lora-rank {most} "
                "(UNILORA_VLLM_MAX_RANK); start it with a larger one."
            )
        dtype = getattr(torch, self.settings.dtype)
        return config, {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def _save(self, tensors: dict[str, Tensor], weights: Path) -> None:
        """Write A and B to a temporary place, and remove those that were used longest ago, until these fit."""
        save_file(tensors, weights, metadata={"format": "pt"})
        needed, limit = weights.stat().st_size, self.settings.limit
        if needed > limit:
            raise SpecError(
                f"its A and B take {needed:,} bytes, the cache has {limit:,} for all adapters; raise "
                "UNILORA_VLLM_CACHE_BYTES."
            )
        found = [(path.stat(), path) for path in self.settings.cache.glob(f"*/{WEIGHTS}")]
        used = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
            if used + needed <= limit:
                return
            path.unlink()
            used -= stat.st_size
