"""The base model of an adapter: how it is built, and how an adapter file remembers that.

A file may come from anybody. It names a base and states settings from a closed list (`unilora_core.header`); nothing
that runs code, or opens what lies elsewhere, follows from a file alone.
"""

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unilora_cli.console import CommandError, one_line, path_of
from unilora_cli.options.files import BaseModel
from unilora_core import UniLoraError, __version__
from unilora_core.header import Header
from unilora_core.schema import shown

__all__ = [
    "AUTO",
    "Base",
    "build",
    "config_of",
    "load_adapter",
    "pad_with",
    "readable_errors",
    "remembered",
    "tokenizer",
]


AUTO = {"lm": "AutoModelForCausalLM", "text": "AutoModelForSequenceClassification"}
"""The class of transformers that loads a kind of base model."""

HUB = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
TIMM = re.compile(rf"(?i:hf[-_]hub:)?{HUB.pattern}(@[\w./-]+)?", re.ASCII)
"""Names of models that a file may give: of the hub, and for timm its own, too."""

TRUST = (
    "it brings Python code of its own, which nobody runs unasked; if you trust it, --model-arg trust_remote_code=true"
)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Base:
    """A base model, as far as it must be known to build it again.

    Attributes:
        kind: ``"vit"``, ``"text"`` or ``"lm"``.
        name: a timm name, a name on the hub, or a local folder.
        labels: the names of the classes, in the order of the head's outputs; empty for a language model.
        arguments: further arguments for timm's `create_model` or transformers' `from_pretrained`.
        pretrained: for timm: pretrained weights; else random ones, which ``seed`` fixes.
        checkpoint: for timm: a file of pretrained weights.
        seed: of whatever the base model leaves to chance, such as a new head.
    """

    kind: str
    name: str
    labels: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    checkpoint: str | None = None
    seed: int = 0

    @property
    def regression(self) -> bool:
        """Whether the model gives one number."""
        return self.arguments.get("problem_type") == "regression"

    @property
    def trust(self) -> dict[str, Any]:
        """For `from_pretrained`: code beside the weights runs only if ``--model-arg trust_remote_code=true`` is given;
        else transformers refuses such a model, and never asks.
        """
        return {"trust_remote_code": self.arguments.get("trust_remote_code", False)}

    def metadata(self) -> dict[str, str]:
        """The strings that an adapter file keeps; `remembered` reads them."""
        how = {name: getattr(self, name) for name in ("arguments", "pretrained", "checkpoint", "seed")}
        return {
            "task": self.kind,
            "base_model": self.name,
            "labels": json.dumps(self.labels),
            "base_arguments": json.dumps(how, default=str),
            "written_by": f"unilora {__version__}",
        }


def remembered(said: Header, options: BaseModel) -> Base:
    """The base model that a file names, with what the command line says put over it.

    Raises:
        CommandError: neither the file nor the command line says what the base model is, or only the command line may.
        CorruptFileError: the file states a setting that it may not; see `Header.settings`.
    """
    kind, name, how = options.kind or said.task, options.model or said.base_model, said.base_arguments
    if not name:
        raise CommandError(
            f"{said.where} does not say what its base model is; add --model NAME and --kind vit, text or lm."
        )
    if kind is None:
        raise CommandError(f"{said.where} does not say what kind of model {name!r} is; add --kind vit, text or lm.")
    if not options.model:
        _check_name(kind, name, said.where)
    if kind == "vit" and how.checkpoint and not options.checkpoint:
        raise CommandError(
            f"{said.where}: the weights of its base came from a file, {shown(how.checkpoint)}, which is not opened on "
            "its word; add --checkpoint PATH."
        )
    given = dict(options.model_arg)
    settings = said.settings(given) | given
    return Base(kind, name, said.labels, settings, how.pretrained, options.checkpoint, how.seed)


def _check_name(kind: str, name: str, where: str) -> None:
    """A file names a model, or a folder of one, and no other file, address or source."""
    folder, names = (name.removeprefix("local-dir:"), TIMM) if kind == "vit" else (name, HUB)
    if not os.path.isdir(folder) and (os.path.lexists(name) or not names.fullmatch(name)):
        raise CommandError(
            f"{where}: it says that its base model is {shown(name)}, which is neither the name of a model nor a folder "
            "here; add --model NAME."
        )


def build(base: Base, **loading: Any) -> tuple[Any, list[str]]:
    """The base model, and the names of its parameters that no checkpoint gave values.

    Args:
        **loading: for transformers: how it is loaded (``dtype``, ``quantization_config``, ``device_map``); without
            them on the CPU.

    Raises:
        CommandError: there is no such model, or it cannot be built so.
    """
    import torch

    with readable_errors(f"cannot build the model {base.name!r}"), _weights_only():
        torch.manual_seed(base.seed)
        return _build_timm(base) if base.kind == "vit" else _build_transformers(base, loading)


def load_adapter(base: Base, model: Any, path: str | Path, any_rank: bool = False) -> Any:
    """The adapter in a file, attached to its base model by the integration for its kind."""
    if base.kind == "vit":
        from unilora_timm import load
    else:
        from unilora_transformers import load
    return load(model, path, any_rank=any_rank)


def tokenizer(base: Base) -> Any:
    """The base model's tokenizer.

    Raises:
        CommandError: there is none.
    """
    with readable_errors(f"cannot load the tokenizer of {base.name!r}"):
        return _transformers().AutoTokenizer.from_pretrained(base.name, **base.trust)


def config_of(base: Base) -> Any:
    """The base model's config, without the model.

    Raises:
        CommandError: there is none.
    """
    with readable_errors(f"cannot build the model {base.name!r}"):
        return _transformers().AutoConfig.from_pretrained(base.name, **base.trust)


def pad_with(model: Any, tokens: Any) -> int:
    """The number that fills up texts, known to model and tokenizer: decoders find the last token by it."""
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokens.pad_token_id
    return tokens.pad_token_id or 0


@contextlib.contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Turn the many errors of third parties into one `CommandError` that says what was tried."""
    try:
        yield
    except (UniLoraError, ModuleNotFoundError):
        raise
    except Exception as error:  # timm, transformers and datasets raise errors of all kinds, down to AssertionError
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        why = TRUST if "trust_remote_code" in str(error) else one_line(error, 400)
        raise CommandError(f"{what}: {why}") from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """A pickle holds weights or is refused; timm 1.0.22 runs what one in a model's folder says."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _transformers() -> Any:
    """The package, which from now on says nothing but errors."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _build_timm(base: Base) -> tuple[Any, list[str]]:
    import timm

    options = dict(base.arguments)
    if base.labels:
        options["num_classes"] = len(base.labels)
    name = f"local-dir:{base.name}" if Path(base.name).is_dir() else base.name
    if base.checkpoint:
        return _build_from_file(base, name, options), []
    return timm.create_model(name, pretrained=base.pretrained, **options), []


def _build_from_file(base: Base, name: str, options: dict[str, Any]) -> Any:
    """A timm model with the weights of a file, whatever head they were trained with; timm adapts them to it.

    Raises:
        CommandError: no such file, or one that lacks weights that the model has, beside its head.
    """
    import timm

    from unilora_timm.targets import classifier

    file = path_of(str(base.checkpoint))
    if not file.is_file():
        raise CommandError(f"{base.checkpoint}: no such checkpoint file.")
    if file.suffix == ".npz":  # Google's own format, which timm takes as a whole or refuses
        overlay = {"file": str(file), "custom_load": True}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    model = timm.create_model(name, pretrained=False, **options)
    weights = timm.models.load_state_dict(str(file), weights_only=True)
    family = sys.modules[type(model).__module__]
    adapt = getattr(family, "checkpoint_filter_fn", None)  # timm's, for old names and other image sizes
    weights = adapt(weights, model) if adapt else weights
    wanted = model.state_dict()
    heads = tuple(f"{head}." for head in classifier(model))
    others = {k for k, v in weights.items() if k.startswith(heads) and (k not in wanted or v.shape != wanted[k].shape)}
    loaded = model.load_state_dict({k: v for k, v in weights.items() if k not in others}, strict=False)
    if missing := [key for key in loaded.missing_keys if not key.startswith(heads)]:
        raise CommandError(
            f"{base.checkpoint}: {len(missing)} of the {len(wanted)} weights of {base.name!r} are not in it, such as "
            f"{missing[0]!r}; is it a checkpoint of this model?"
        )
    return model


def _build_transformers(base: Base, loading: dict[str, Any]) -> tuple[Any, list[str]]:
    from unilora_transformers.saving import refuse_kernels

    transformers = _transformers()
    options = loading | base.trust | base.arguments
    if base.kind == "lm":
        auto = getattr(transformers, AUTO["lm"])
    else:
        auto = getattr(transformers, AUTO["text"])
        if base.labels or base.regression:
            options["ignore_mismatched_sizes"] = True  # the checkpoint's head may be another task's
        if base.labels:
            options |= {
                "num_labels": len(base.labels),
                "id2label": dict(enumerate(base.labels)),
                "label2id": {label: i for i, label in enumerate(base.labels)},
            }
    if not options["trust_remote_code"] and "attn_implementation" not in options:
        refuse_kernels(base.name, transformers.AutoConfig.from_pretrained(base.name, **base.trust))
    model, report = auto.from_pretrained(base.name, output_loading_info=True, **options)
    fresh = [*report["missing_keys"], *(key for key, *_ in report.get("mismatched_keys", ()))]
    return model, sorted(fresh)
