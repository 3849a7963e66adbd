"""A plain LoRA of an adapter file for a server, made beside a base whose weights are not loaded.

A and B follow from the file alone. The base's checkpoint gives what they are checked against: the layers' names and
widths from its config, and the few values that tell it from others from its files.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from unilora_core import read_adapter
from unilora_core.header import Header, read_header
from unilora_torch import Adapter
from unilora_torch.base import check_base, identity
from unilora_torch.export import lora_tensors
from unilora_torch.heads import whole_names
from unilora_torch.opened import open_file
from unilora_transformers.checkpoints import Checkpoint, Names, load_small, local, on_meta

__all__ = ["ServedBase"]


@dataclass(frozen=True, eq=False)
class ServedBase:
    """A base model that an engine serves, known by its checkpoint: no weight of it is in memory.

    Attributes:
        folder: the folder of its checkpoint, safetensors files; they may be quantised.
        name: its name or path, for the LoRAs' ``base_model_name_or_path``.
    """

    folder: Path
    name: str
    _checkpoint: Checkpoint = field(repr=False)
    _models: dict[tuple[Any, ...], PreTrainedModel] = field(repr=False, default_factory=dict)

    @classmethod
    def of(cls, base: str | os.PathLike, folder: str | os.PathLike | None = None) -> "ServedBase":
        """Make it of a folder, or of a name on the hub whose files are in the hub's cache; nothing is fetched.

        Args:
            folder: where the checkpoint lies, if ``base`` does not say that.

        Raises:
            FileNotFoundError: there is no safetensors checkpoint in it, or the hub's cache does not have it.
            CorruptFileError: a file of it is not whole.
        """
        try:
            found = local(base if folder is None else folder, fetch=False)
        except (HFValidationError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"{base}: no folder, and not in the hub's cache, where its files are read; say in which folder the "
                "checkpoint is that the engine serves."
            ) from error
        return cls(found, os.fspath(base), Checkpoint.of(found))

    def lora_tensors(
        self, file: str | os.PathLike, *, rank: int | None = None, engine: str | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what `Adapter.export_lora` would write beside the loaded base: the config, and the tensors by name,
        float32 on the CPU.

        SGLang takes both: ``engine.load_lora_adapter_from_tensors(name, tensors=tensors, config_dict=config)``.

        Args:
            file: the path of an adapter file.
            rank, engine: as in `Adapter.export_lora`.

        Raises:
            FileNotFoundError: the file does not exist.
            AdapterFileError: the file is damaged, names no class of transformers, or ``engine`` would not serve the
                LoRA.
            MismatchError: it belongs to another base; the error names what differs.
            SpecError, TargetError, ValuesError: as in `Adapter.export_lora`.
        """
        contents = read_adapter(file)
        header = read_header(file, contents)
        model = self._model(header)
        found = open_file(file, model, file=contents, loaded=False)
        check_base(str(file), header.base, identity(model, header.modules_to_save))
        adapter = Adapter(model, found.spec, found.targets, header.modules_to_save, found.frozen)
        with torch.no_grad():
            adapter.theta_d.copy_(found.theta_d)
        adapter.kept_heads = whole_names(found.heads)  # the model's own have no values
        return lora_tensors(adapter, self.name, rank, engine)

    def _model(self, header: Header) -> PreTrainedModel:
        """Return the model without weights of the class that a file adapts; files of one class share it."""
        key = (header.base_class, header.base and header.base.kind, header.labels, str(header.base_arguments.arguments))
        if key not in self._models:
            model = on_meta(header, self.folder, {})
            load_small(model, self._checkpoint, Names.of(model, self._checkpoint))
            self._models[key] = model
        return self._models[key]
