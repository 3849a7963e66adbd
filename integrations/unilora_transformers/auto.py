"""A base and its adapter through transformers' auto classes: ``AutoModel.from_pretrained(folder)`` and its callers.

sentence-transformers loads each of its transformers so, in `SentenceTransformer(folder)` as in its trainer's resume and
best model. In such a folder (`save_pretrained` with ``safe_serialization``) the type of the model in ``config.json`` is
``unilora``; importing unilora_transformers registers it, as transformers offers for models that are not its own.
"""

import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from unilora_core.schema import typed
from unilora_torch import switch
from unilora_transformers.attach import from_pretrained
from unilora_transformers.saving import MODEL_TYPE

__all__ = ["AdaptedConfig", "AdaptedModel", "register"]

PLACE = {"code_revision", "name_or_path", "revision", "subfolder", "token", "trust_remote_code"}
"""The options that come with the fields of a config, but are none."""

NO_OPTIONS = {"_from_auto", "adapter_kwargs", "weights_only"}
"""The options that the auto classes pass on to themselves, and to PEFT."""


class AdaptedConfig(PreTrainedConfig):
    """The config that stands for the config of a base until the base is loaded.

    Attributes:
        acting: the adapters that were switched on, and the weights of their updates.
        use_cache: a field that sentence-transformers switches off in every config; it is then off in the base's, too.
    """

    model_type = MODEL_TYPE
    acting: dict[str, float] | None = None
    use_cache: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Make the config as transformers does, and keep fields that only the base's config has for it."""
        if options.get("return_unused_kwargs"):  # the options go to `AdaptedModel.from_pretrained`
            return super().from_dict(config_dict, **options)
        place = {key: value for key, value in options.items() if key in PLACE or key.startswith("_")}
        return super().from_dict(config_dict | {k: v for k, v in options.items() if k not in place}, **place)


class AdaptedModel:
    """The model that the auto classes load for an `AdaptedConfig`: one of the base's own class, with its adapters."""

    config_class = AdaptedConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *_: Any,
        config: AdaptedConfig,
        subfolder: str = "",
        revision: str | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Load the base that the adapter file names, and its adapters.

        Args:
            name: a folder, or a repository on the hub.
            config: the config as it was loaded from there; what was changed in it since is changed in the base's.
            subfolder, revision: the subfolder and the revision of ``name``.
            **options: the options of the base's own `from_pretrained`.

        Raises:
            FileNotFoundError, AdapterFileError, MismatchError, TargetError: as in
                `unilora_transformers.from_pretrained`.
        """
        folder = Path(name)
        if not folder.is_dir():
            place = {key: options[key] for key in ("cache_dir", "local_files_only", "token") if key in options}
            patterns = [os.path.join(subfolder, end) for end in ("adapter*.safetensors", CONFIG_NAME)]
            folder = Path(snapshot_download(os.fspath(name), revision=revision, allow_patterns=patterns, **place))
        changed = _changed(config, folder / subfolder)
        use_cache = changed.pop("use_cache", True)
        given = {key: value for key, value in options.items() if key not in NO_OPTIONS and value is not None}
        model = from_pretrained(folder / subfolder, **changed | given)
        if config.acting is not None:
            switch(model, typed(dict[str, float], config.acting, f"{folder / subfolder / CONFIG_NAME}: acting"))
        if not use_cache and hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model


def _changed(config: AdaptedConfig, folder: Path) -> dict[str, Any]:
    """Return the fields of a config that are no longer what the folder says."""
    before = AdaptedConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.to_dict().items() if key not in before or before[key] != value}


def register() -> None:
    """Make the type known to `AutoConfig` and to every auto class for models."""
    AutoConfig.register(MODEL_TYPE, AdaptedConfig, exist_ok=True)
    for name in dir(transformers):
        auto: Any = getattr(transformers, name) if name.startswith("AutoModel") else None
        if getattr(auto, "_model_mapping", None) is not None:
            auto.register(AdaptedConfig, AdaptedModel, exist_ok=True)
