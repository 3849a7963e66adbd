"""save_pretrained, push_to_hub and from_pretrained: adapters in a folder or on the hub, without their base model.

`attach` gives a model these two methods in place of its own, so that a trainer's checkpoint holds what is trained and
nothing else. They are attributes of that one model; no class is changed.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from unilora_core import (
    AdapterFileError,
    MismatchError,
    ProjectionSpec,
    SpecError,
    ValuesError,
    __version__,
    read_adapter,
)
from unilora_core.files import new_files
from unilora_core.header import FROZEN, Header, read_header
from unilora_core.methods import METHODS, method_of
from unilora_core.resizing import resized
from unilora_core.schema import shown
from unilora_torch.adapter import NAME, Adapter, adapters
from unilora_torch.chains import Frozen
from unilora_torch.frozen import frozen_in_file, tensors_of
from unilora_torch.growing import resize
from unilora_transformers.class_names import Classes, read_classes, write_classes

__all__ = [
    "MODEL_TYPE",
    "Checkpoints",
    "PretrainedMethods",
    "base_metadata",
    "build_base",
    "find_files",
    "model_class",
    "refuse_kernels",
    "save_pretrained",
]

PLACE = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"}
"""The options of `from_pretrained` that say where a base lies, or whether its code may run."""

NAMING = {"config", "id2label", "label2id", "num_labels"}
"""The options of `from_pretrained` by which the caller decides what the classes are."""

HUB = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
"""A name on the hub; no path and no text that the YAML of a model card would read as more matches."""

MODEL_TYPE = "unilora"
"""The type of model in a ``config.json`` that stands for a base and its adapter."""

BESIDE = "unilora"
"""The key of the specs beside a state_dict, in PyTorch's ``_metadata``."""

SPEC = "spec"
"""The key beside θ_d in a trainer's checkpoint: the fields of its spec, as the bytes of a JSON object."""


OWN: Mapping[str, Tensor] = MappingProxyType({})
"""Stands for a model's own state where the caller says nothing of it."""


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = OWN,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write a model's adapters and a model card; it is a model's `save_pretrained` once an adapter is attached.

    ``adapter.safetensors`` is what `load` and `from_pretrained` read (``adapter-NAME.safetensors`` for an adapter of
    another name). A ``README.md`` that is there is kept.

    Args:
        is_main_process: trainers say here which process writes.
        state_dict: the state to read the tensors from, for a model whose own parameters are sharded over processes;
            None is the model's own. Trainers give this or the above, and resume from ``model.safetensors``, so that
            file is then written, too, with the trained tensors and all else that θ_d needs.
        push_to_hub: whether to upload, too, to ``repo_id`` or else the folder's name; ``options`` go to `push_to_hub`.
        **options: further options. With ``safe_serialization`` sentence-transformers asks for a folder that is a model:
            the folder gets a ``config.json``, by which `unilora_transformers.auto` loads the base and the adapter.

    Raises:
        FileExistsError: the folder is the base's own, whose config would be lost.
        ValuesError: θ_d holds NaN or infinity, or is spread over processes by ZeRO-3; an old file is kept.
    """
    by_trainer = is_main_process is not None or state_dict is not OWN
    state_dict = None if state_dict is OWN else state_dict
    if state_dict is not None and not state_dict:  # the Trainer gives none where DeepSpeed writes the values itself
        warnings.warn(f"unilora: no adapter is written to {save_directory}: the state_dict is empty.", stacklevel=2)
        return
    state = {name: _whole(name, tensor) for name, tensor in _values(model, state_dict).items()}
    if is_main_process is False:
        return
    folder = Path(save_directory)
    there = adapters(model)
    names = [] if (folder / "README.md").exists() else ["README.md"]
    names += [_file_of(name) for name in there]
    if options.pop("safe_serialization", None) is not None:
        _check_base(model, folder)
        names.append(CONFIG_NAME)
    names += [SAFE_WEIGHTS_NAME] if by_trainer else []  # last, as trainers resume from it
    with new_files(*(folder / name for name in names)) as new:
        paths = dict(zip(names, new, strict=True))
        for name, adapter in there.items():
            adapter.save(paths[_file_of(name)], base_metadata(model), state)
        if "README.md" in paths:
            paths["README.md"].write_text(model_card(model), encoding="utf-8")
        if CONFIG_NAME in paths:
            acting = {name: adapter.strength for name, adapter in there.items() if adapter.live.on}
            said = {"model_type": MODEL_TYPE, "architectures": [_class_of(model)], "acting": acting}
            paths[CONFIG_NAME].write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        if by_trainer:
            texts = {f"{name}.{SPEC}": json.dumps(_identity(adapter.spec)) for name, adapter in there.items()}
            specs = {key: torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in texts.items()}
            save_file(state | specs | _frozen(there), paths[SAFE_WEIGHTS_NAME], metadata={"format": "pt"})
    if push_to_hub:
        model.push_to_hub(options.pop("repo_id", folder.name), **options)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
    **_: Any,
) -> str:
    """Upload what `save_pretrained` writes to a repository on the hub, made if need be, and return the commit's
    address.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def find_files(
    name: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Path]:
    """Return the adapter files of a local folder (also a trainer's checkpoint) or of a repository on the hub, by
    adapter name.

    Raises:
        FileNotFoundError: there is none.
        NotADirectoryError: this is a file.
    """
    folder = Path(name)
    if folder.is_file():
        raise NotADirectoryError(
            f"{name}: expected the folder that save_pretrained wrote, or a repository on the hub, got a file; give "
            f"{folder.parent}, or load this one alone into a model of its base: load(model, path)."
        )
    if not folder.is_dir():
        patterns = [_file_of(NAME), _file_of("*")]
        folder = Path(snapshot_download(os.fspath(name), revision=revision, token=token, allow_patterns=patterns))
    found = {path.stem.removeprefix("adapter-"): path for path in sorted(folder.glob(_file_of("*")))}
    if (first := folder / _file_of(NAME)).is_file():
        found = {NAME: first} | found
    if not found:
        raise FileNotFoundError(f"{name}: no {_file_of(NAME)} in it; give the folder that save_pretrained wrote.")
    return found


def build_base(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load the base model that an adapter file names; no code of the base's repository runs unless ``options`` allow
    it.

    Args:
        options: the options of transformers' `from_pretrained`: dtype, device_map, quantization_config, …

    Raises:
        AdapterFileError: the file does not say what its base model is, names no class of transformers, or states a
            setting that only the caller may give (a file may state those in `unilora_core.header.SETTINGS`).
    """
    file = read_adapter(path)
    header = read_header(path, file)
    name = header.base_model
    kind = header.base_class or (header.base.kind if header.base else "")
    if not name or not kind:
        raise AdapterFileError(
            f"{path}: it does not say which transformers model it was made for (base_model = {name!r}, "
            f"base_class = {kind!r}); build the base model and give it: from_pretrained(…, model=model)."
        )
    cls = model_class(path, kind)
    classes = read_classes(header)
    said = _settings(header, classes, options)
    given = {"trust_remote_code": False} | dict(options)
    try:
        if not given["trust_remote_code"] and not given.keys() & {"config", "attn_implementation"}:
            config = AutoConfig.from_pretrained(name, **{key: given[key] for key in given.keys() & PLACE})
            refuse_kernels(path, config)
        model = cls.from_pretrained(name, **said | given)
        _add_tokens(model, file.tensors)
    except (AdapterFileError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a base that does not fit its class or settings may raise anything
        raise AdapterFileError(
            f"{path}: the base model that it names, {name!r}, cannot be built as {kind} ({error!r:.800}); build the "
            "base model and give it: from_pretrained(…, model=model)."
        ) from error
    if not options.keys() & NAMING:
        classes.put_in(model.config)
    return model


def _add_tokens(model: PreTrainedModel, tensors: Mapping[str, np.ndarray]) -> None:
    """Give the model the vocabulary whose table was saved, where that has got rows for added tokens."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    grown = [name for name, table in tables.items() if len(tensors.get(f"{name}.weight", ())) > table.num_embeddings]
    if any(tables[name] is model.get_input_embeddings() for name in grown):
        model.resize_token_embeddings(len(tensors[f"{grown[0]}.weight"]), mean_resizing=False)


def _settings(header: Header, classes: Classes, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file says of its base, where the caller does not; a given config says all but this one thing."""
    said = header.settings(options)
    if said.get("problem_type") == "regression" or classes.count is not None:
        said = {"ignore_mismatched_sizes": True} | said
    if classes.count is not None and not options.keys() & NAMING:
        said["num_labels"] = classes.count
    return said if "config" not in options else {k: v for k, v in said.items() if k == "ignore_mismatched_sizes"}


def model_class(path: str | os.PathLike, name: str) -> type[PreTrainedModel]:
    """Return a class of transformers that makes models, an auto class or a model's own, by the name in a file.

    Raises:
        AdapterFileError: no such class has this name; nothing else is ever called for a file.
    """
    cls = getattr(transformers, name, None) if name in dir(transformers) else None
    kinds = (PreTrainedModel, _BaseAutoModelClass)
    if not (isinstance(cls, type) and issubclass(cls, kinds) and cls.__module__.startswith("transformers.models.")):
        raise AdapterFileError(
            f"{path}: it adapts a {name}, which is no model of transformers {transformers.__version__}; build the base "
            "model and load the adapter beside it: load(model, …), or from_pretrained(…, model=model); to merge, "
            "adapter.detach(merge=True) there."
        )
    return cls


def refuse_kernels(where: str | os.PathLike, config: PreTrainedConfig) -> None:
    """Refuse a base whose config names attention of a repository on the hub, which is code of that repository.

    Raises:
        AdapterFileError: it does; the error has the remedy.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        kernel = getattr(part, "_attn_implementation", None)
        if "/" in str(kernel):
            raise AdapterFileError(
                f"{where}: the config of its base model asks for the attention {shown(kernel)} of the hub, which is "
                "code; if it is meant, say so: attn_implementation=…, or build the base model yourself."
            )


def base_metadata(model: PreTrainedModel) -> dict[str, str]:
    """Return what an adapter file says of its base model: its name, its class, and the names of its classes."""
    kind = _class_of(model)
    metadata = {"base_class": kind, "written_by": f"unilora {__version__}"}
    if base := _name(model):
        metadata["base_model"] = base
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        metadata["task"] = "lm"
    if kind.endswith("ForSequenceClassification"):
        metadata["task"] = "text"
    return metadata | write_classes(model)


def _class_of(model: PreTrainedModel) -> str:
    return type(model).__name__.removeprefix("FSDP")  # fully_shard puts FSDP before the class's name


def _check_base(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a folder for base and adapter that is the base's own, or names a base which cannot be found."""
    base = _name(model)
    if base and folder.exists() and os.path.exists(base) and os.path.samefile(base, folder):
        raise FileExistsError(f"{folder}: the base model lies there and would lose its config; save to another folder.")
    if not base or (os.path.isdir(base) and not os.path.isfile(os.path.join(base, CONFIG_NAME))):
        warnings.warn(
            f"unilora: {folder} cannot be loaded by itself, as the base model {f'in {base} ' if base else ''}has no "
            f"{CONFIG_NAME} in a folder of its own; save it to one, and set model.name_or_path to that.",
            stacklevel=3,
        )


def _name(model: PreTrainedModel) -> str:
    """Return the name of the base, or its path; empty where it has none, or one that is no text in UTF-8."""
    name = str(model.name_or_path or "")
    try:
        name.encode()
    except UnicodeEncodeError:
        warnings.warn(f"unilora: the name of the base model, {name!r}, is left out of what is saved.", stacklevel=2)
        return ""
    return name


def card_header(base: str) -> list[str]:
    """Return the lines at the head of a model card; they name a base model of the hub, no folder of this machine."""
    lines = ["---", "library_name: unilora", "tags:", "- unilora", "- lora", "- adapter"]
    if HUB.fullmatch(base) and not os.path.exists(base):
        lines += [f"base_model: {base}", "base_model_relation: adapter"]
    return [*lines, "---"]


def model_card(model: PreTrainedModel) -> str:
    """Write a README for the hub: what the adapter is, what it needs, how it is used."""
    base, there = _name(model), adapters(model)
    methods = {name: method_of(adapter.spec) or adapter.spec.frame for name, adapter in there.items()}
    rows = [
        f"| {name} | {methods[name]} | {a.spec.d:,} | {a.spec.D:,} | {len(a.targets)} | {a.spec.seed} "
        f"| {a.spec.grouping} |"
        for name, a in there.items()
    ]
    return "\n".join(
        [
            *card_header(base),
            "",
            f"# Adapter of {base or type(model).__name__}",
            "",
            "The updates of all layers are made of θ_D = P(θ_d), one trained vector θ_d for the whole model",
            "([arXiv 2506.00799](https://arxiv.org/abs/2506.00799)); the files hold θ_d, the seed of what is random,",
            "and the modules trained in full.",
            "",
            "| adapter | method | d | D | targets | seed | grouping |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            *(f"{name}: {METHODS[name].source}." for name in sorted(set(methods.values()) & METHODS.keys())),
            "",
            "```python",
            "import unilora_transformers",
            "",
            'model = unilora_transformers.from_pretrained("this repository, or a local copy of it")',
            "```",
            "",
        ]
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors under their names in the model's `state_dict`."""
    found: dict[str, Tensor] = {}
    for name, adapter in adapters(model).items():
        found |= {f"{name}.theta_d": adapter.theta_d} | (adapter.heads() if adapter.kept_heads is None else {})
    return found


class PretrainedMethods:
    """A handle of a model's `save_pretrained` and `push_to_hub`; `remove` restores those of its class."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        for method in (save_pretrained, push_to_hub):
            vars(model)[method.__name__] = functools.partial(method, model)

    def remove(self) -> None:
        """Restore the class's methods; this is also called as the last adapter is detached."""
        if len(adapters(self.model)) == 1:
            for method in (save_pretrained, push_to_hub):
                vars(self.model).pop(method.__name__, None)


class Checkpoints:
    """The hooks of a model's `load_state_dict` for a trainer's checkpoint, which holds the trained tensors only.

    Its θ_d means nothing under another P, so the spec in it must be the adapter's. It also means nothing between other
    singular vectors, so the adapter takes the checkpoint's: another SVD may give other signs. The frozen weights do not
    count as missing.
    """

    def __init__(self, model: PreTrainedModel):
        self.partial, self.prefix = False, ""
        self.handles = [
            model.register_state_dict_post_hook(_describe),
            model.register_load_state_dict_pre_hook(self.before),
            model.register_load_state_dict_post_hook(self.after),
        ]

    def before(
        self, model: nn.Module, state_dict: dict[str, Any], prefix: str, beside: Mapping[str, Any], *_: Any
    ) -> None:
        """Compare the specs, and take the frozen arrays of the checkpoint. θ_d gets the checkpoint's d, where it grew
        or shrank after the adapter was attached as it is here.

        Args:
            beside: what `_describe` put beside the state_dict of another model, such as sentence-transformers loads
                from a checkpoint to copy its values.

        Raises:
            MismatchError: the checkpoint belongs to another adapter, or is incomplete; nothing has been loaded.
        """
        found_frozen: dict[str, Frozen | None] = {}
        saved = _take_specs(model, state_dict, prefix)
        self.partial, self.prefix = bool(saved), prefix
        specs = {name: json.loads(bytes(value.tolist())) for name, value in saved.items()}
        if not saved:
            specs = beside.get(BESIDE, {})
            state_dict |= {f"{prefix}{key}": tensor for key, tensor in beside.get(FROZEN, {}).items()}
            if specs and getattr(model, "is_quantized", False):  # the other model's base is whole, and the same
                self.partial = True
                _leave_base(model, state_dict, prefix)
        there = adapters(model)
        for name, found in specs.items():
            if name not in there:
                raise MismatchError(
                    f"the checkpoint holds an adapter {name!r}, the model has {list(there)}; attach it under that name."
                )
            mine = _identity(_at_d(there[name].spec, found))
            if other := [field for field in mine if found.get(field) != mine[field]]:
                theirs, ours = ({field: fields.get(field) for field in other} for fields in (found, mine))
                raise MismatchError(
                    f"the checkpoint's adapter {name!r} was trained with {theirs}, the model's has {ours}; "
                    "attach as for the first part of the training (targets, rank, d, seed, …) to go on from it."
                )
            found_frozen[name] = _take_frozen(there[name], f"{prefix}{name}.", state_dict)
        for name, found in specs.items():
            resize(there[name], found["d"])
        for name, frozen in found_frozen.items():
            if frozen is not None:
                there[name].chains.copy_(frozen)

    def after(self, model: nn.Module, keys: Any) -> None:
        """Report only those trained tensors that are missing."""
        if self.partial:
            here, expected = self.prefix, {f"{self.prefix}{name}" for name in trained(model)}
            keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(here) or key in expected]

    def remove(self) -> None:
        """Take the hooks off, as the handle of a hook does."""
        for handle in self.handles:
            handle.remove()


def _values(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the trained tensors from a state_dict, which a wrapper (torch.compile, DDP) may have put under longer
    names.
    """
    live = trained(model)
    first = f"{next(iter(adapters(model)))}.theta_d"
    found = (key.removesuffix(first) for key in state_dict or () if f".{key}".endswith(f".{first}"))
    prefix = next(found, "")
    return {name: (state_dict or {}).get(prefix + name, tensor) for name, tensor in live.items()}


def _take_specs(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Take the bytes of each adapter's spec out of a checkpoint; a base may have tensors of that name, which stay."""
    own = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
    names = [key.removeprefix(prefix).removesuffix(".theta_d") for key in state_dict if key.endswith(".theta_d")]
    return {
        name: state_dict.pop(f"{prefix}{name}.{SPEC}")
        for name in names
        if f"{name}.{SPEC}" not in own and f"{prefix}{name}.{SPEC}" in state_dict
    }


def _file_of(name: str) -> str:
    return "adapter.safetensors" if name == NAME else f"adapter-{name}.safetensors"


def _leave_base(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Remove what is not trained from a state_dict."""
    wanted = tuple(f"{prefix}{name}" for name in (*trained(model), *(f"{each}.{FROZEN}" for each in adapters(model))))
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(wanted)]:
        del state_dict[key]


def _describe(model: nn.Module, _state_dict: dict[str, Any], _prefix: str, beside: dict[str, Any]) -> None:
    """Put what the values need beside them, where PyTorch keeps versions; this is a hook of `state_dict`."""
    there = adapters(model)
    beside[BESIDE] = {name: _identity(adapter.spec) for name, adapter in there.items()}
    beside[FROZEN] = _frozen(there)


def _identity(spec: ProjectionSpec) -> dict[str, Any]:
    """Return all that fixes P, in short."""
    return spec.to_json() | {"layout": spec.layout.fingerprint[:16]}


def _at_d(spec: ProjectionSpec, found: Mapping[str, Any]) -> ProjectionSpec:
    """Return the spec at the d of a checkpoint, where they differ in nothing else; else the spec itself."""
    d, after = found.get("d"), spec
    if type(d) is int and 1 <= d <= spec.D:
        with contextlib.suppress(SpecError):
            after = resized(spec, d)
    return after if _identity(after) == found else spec


def _frozen(there: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Return the frozen arrays that a checkpoint keeps of adapters, by names that begin with theirs."""
    return {
        f"{name}.{key}": _whole(key, tensor)
        for name, adapter in there.items()
        for key, tensor in tensors_of(adapter.spec, adapter.chains.frozen).items()
    }


def _take_frozen(adapter: Adapter, prefix: str, state_dict: dict[str, Any]) -> Frozen | None:
    """Take the frozen arrays of one adapter out of a checkpoint; None where its method keeps none."""
    keys = [key for key in state_dict if key.startswith(f"{prefix}{FROZEN}")]
    arrays = {key.removeprefix(prefix): state_dict.pop(key).cpu().numpy() for key in keys}
    return frozen_in_file("the checkpoint", adapter.spec, adapter.targets, arrays)


def _whole(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in memory of its own, gathered where it is a DTensor."""
    if hasattr(tensor, "ds_shape") and tensor.shape != tensor.ds_shape:
        raise ValuesError(
            f"save_pretrained: {name}: its values are spread over processes by DeepSpeed's ZeRO-3; gather them: "
            "save_pretrained(…, state_dict=accelerator.get_state_dict(engine))."
        )
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.to("cpu", copy=True).contiguous()
