"""Reinforcement learning with an engine that generates: the engine gets the current model in one of two ways.

*The base's weights with B·A in them*, under its own names: `merged_parameters`, and `sync_rollouts` for a trainer of
TRL that sends weights to vLLM. TRL merges PEFT's adapters itself; of other models it sends the parameters as they
are, which here are the base's and θ_d. So a model with an adapter refuses to be read for that (`Guard`).

*A plain LoRA*: `LoraSync` writes a folder for each version of the adapter and has a server load it; `lora_tensors`
gives config and tensors without a disk.
"""

import functools
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unilora_core import SpecError, TargetError
from unilora_torch import Adapter
from unilora_torch.adapter import adapters
from unilora_torch.export import lora_tensors

__all__ = ["Guard", "LoraSync", "lora_tensors", "merged_parameters", "sync_rollouts"]

ROUTES = {
    "vllm": ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    "sglang": ("/load_lora_adapter", "/unload_lora_adapter"),
}
"""The addresses at which a server is told to load a folder, and to forget a name."""

SECONDS = 600
"""The time that a server has to load a folder."""

REMEDY = (
    "call unilora_transformers.sync_rollouts(trainer) before trainer.train(), which sends the weights with the update "
    "in them, or give the engine a LoRA: unilora_transformers.LoraSync."
)


# ---- merged weights -------------------------------------------------------------------------------------------------


def merged_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters under the names that they have without an adapter, with B·A in the weights meanwhile.

    The adapter is merged at the first parameter and taken out after the last, bit for bit; copy what is to be kept.

    Raises:
        TargetError: the model has no adapter, or several that act; it cannot be merged (`Adapter.merge`); or the values
            are spread over processes.
        ValuesError: as in `Adapter.merge`.
    """
    acting = [adapter for adapter in _adapters(model).values() if adapter.active]
    if len(acting) > 1:
        raise TargetError("merged_parameters: several adapters act on the model; switch to one (unilora_torch.switch).")
    inside = tuple(f"{name}." for name in _adapters(model))
    named = {name: value for name, value in nn.Module.named_parameters(model) if not name.startswith(inside)}
    if spread := [name for name, value in named.items() if hasattr(value, "full_tensor") or hasattr(value, "ds_shape")]:
        raise TargetError(
            f"merged_parameters: {spread[0]}: its values are spread over processes (FSDP, ZeRO-3), where nothing can "
            "be merged; train under DDP."
        )
    return _merged(acting, named)


def _merged(acting: list[Adapter], named: dict[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    try:
        for adapter in acting:
            adapter.merge()
        yield from named.items()
    finally:
        for adapter in acting:
            adapter.unmerge()


class _Merged:
    """The object from which TRL reads the weights, in the place of the model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return merged_parameters(self.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


class _Transfer:
    """TRL's protocol for sending weights, which sends the merged ones instead."""

    def __init__(self, inner: Any, model: PreTrainedModel):
        self.inner, self.model = inner, model

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        del iterator  # it goes over the trainable parameters, which is θ_d
        device = self.model.device
        self.inner.send_weights((name, value.detach().to(device)) for name, value in merged_parameters(self.model))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def sync_rollouts(trainer: Trainer) -> None:
    """Make a trainer of TRL send vLLM the weights with the update in them, at each of its syncs.

    It works for trainers that generate through TRL's `VLLMGeneration` (GRPO, RLOO, distillation, …), in both modes, and
    for `AsyncGRPOTrainer`, which makes its model itself: attach to ``trainer.model`` first.

    Raises:
        TargetError: the trainer's model has no adapter, or is spread over processes; or the trainer sends no weights,
            or sends them in an unknown way.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    _adapters(model)
    if getattr(trainer, "is_fsdp_enabled", False):
        raise TargetError("sync_rollouts: FSDP spreads the weights, so that nothing can be merged; train under DDP.")
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.model = _Merged(model)
    elif hasattr(trainer, "weight_transfer"):
        vars(model).pop("named_parameters", None)  # the other processes read the names and send nothing
        if trainer.weight_transfer is not None:
            trainer.weight_transfer = _Transfer(trainer.weight_transfer, model)
    else:
        raise TargetError(
            f"sync_rollouts: {type(trainer).__name__} sends an engine no weights (use_vllm is off), or reads them in a "
            "way of its own, as online DPO does; generate with use_vllm=False, or use GRPO or RLOO."
        )


class _Bound(functools.partial):
    """A partial that takes the place of a method: torch.compile asks a module's method for its function."""

    __func__ = None


class Guard:
    """A guard in the place of a model's `named_parameters`, which refuses TRL's syncs; `remove` restores the class's.

    A trainer that reads the parameters for an engine would send the base's, and θ_d under a name that no engine knows.
    The guard recognises such a reader: a function of TRL, with vLLM in its own name or in its module's.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        vars(model)["named_parameters"] = _Bound(_named_parameters, model)

    def remove(self) -> None:
        """Restore the class's method; this is also called as the last adapter is detached."""
        if len(adapters(self.model)) == 1:
            vars(self.model).pop("named_parameters", None)


def _named_parameters(model: PreTrainedModel, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters; see `torch.nn.Module.named_parameters`.

    Raises:
        TargetError: TRL asks for the parameters to send them to vLLM.
    """
    frame = sys._getframe(1)
    reader = f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}"
    if reader.startswith("trl.") and "vllm" in reader and adapters(model):
        raise TargetError(f"{reader}: it would send vLLM the base's weights, without the adapter; {REMEDY}")
    return type(model).named_parameters(model, *args, **options)


def _adapters(model: PreTrainedModel) -> dict[str, Adapter]:
    found = adapters(model)
    if not found:
        raise TargetError("the model has no adapter, so its weights are its own; attach one first.")
    return found


# ---- plain LoRA -----------------------------------------------------------------------------------------------------


class LoraSync(TrainerCallback):
    """A callback that writes the adapter as a plain LoRA before the first step and after every ``every`` steps, and has
    it loaded.

    Each version is a folder of its own, ``NAME-v1``, ``NAME-v2``, …, and so a model of its own to the engine, which
    keeps what it has seen by name: ask for ``model=sync.served``. The numbers go on from what is in the folder. A
    folder appears whole, before the server is told; two versions stay.

    Args:
        adapter: the adapter of the model that is trained.
        folder: the folder of the versions; the server must see it under the same path.
        server: the address of a vLLM server (started with ``--enable-lora`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1) or
            an SGLang server; None means only writing.
        engine: ``"vllm"`` or ``"sglang"``, for which the export is checked.

    Raises:
        SpecError: the engine is another.
    """

    def __init__(
        self,
        adapter: Adapter,
        folder: str | Path,
        server: str | None = None,
        *,
        name: str = "policy",
        every: int = 1,
        engine: str = "vllm",
    ):
        if engine not in ROUTES:
            raise SpecError(f"LoraSync: expected engine {' or '.join(map(repr, ROUTES))}, got {engine!r}.")
        self.adapter, self.folder, self.server = adapter, Path(folder).absolute(), server
        self.name, self.every, self.engine = name, every, engine
        self.version = max(map(_number, self._versions()), default=0)

    @property
    def served(self) -> str:
        """The name of the newest version."""
        return f"{self.name}-v{self.version}"

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Publish the first version."""
        self._publish(state)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Publish the next version, every ``every`` steps."""
        if state.global_step % self.every == 0:
            self._publish(state)

    def _publish(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.publish()

    def publish(self) -> Path:
        """Write the folder of a new version, have the server load it, and return it.

        Raises:
            AdapterFileError, SpecError, TargetError, ValuesError: as in `Adapter.export_lora` for the engine.
            OSError: the folder cannot be written, or the server did not load it; the error has its answer.
        """
        if hasattr(self.adapter.theta_d, "full_tensor") or hasattr(self.adapter.theta_d, "ds_shape"):
            raise TargetError("LoraSync: θ_d is spread over processes (FSDP, ZeRO-3); train under DDP.")
        new = self.folder / f"{self.name}-v{self.version + 1}"
        self.adapter.export_lora(new, engine=self.engine)
        load, unload = ROUTES[self.engine]
        self._tell(load, new, lora_path=str(new))
        self.version += 1
        for old in sorted(self._versions(), key=_number)[:-2]:
            self._tell(unload, old, missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
        return new

    def _tell(self, route: str, version: Path, missing_ok: bool = False, **more: str) -> None:
        if self.server is not None:
            _post(f"{self.server.rstrip('/')}{route}", {"lora_name": version.name, **more}, missing_ok)

    def _versions(self) -> list[Path]:
        return [path for path in self.folder.glob(f"{self.name}-v*") if path.name.rpartition("-v")[2].isdecimal()]


def _number(version: Path) -> int:
    return int(version.name.rpartition("-v")[2])


def _post(address: str, said: dict[str, Any], missing_ok: bool = False) -> None:
    """Send JSON to a server.

    Raises:
        OSError: there is no answer, or it is an error; a missing name is no error with ``missing_ok``.
    """
    request = urllib.request.Request(address, json.dumps(said).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass
    except urllib.error.HTTPError as error:
        if not missing_ok or error.code not in (400, 404):
            text = error.read().decode(errors="replace")
            raise OSError(
                f"{address}: the server answered {error.code} to {said}: {text:.800}. vLLM loads LoRAs while it runs "
                "only with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment."
            ) from error
    except urllib.error.URLError as error:
        raise OSError(f"{address}: no answer ({error.reason}); is the server running?") from error
