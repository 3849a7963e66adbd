"""The resolver that vLLM asks for a LoRA that it does not know, and the hook by which folders come back."""

import asyncio
import functools
import logging
from pathlib import Path
from types import ModuleType

from vllm.exceptions import VLLMValidationError
from vllm.lora import worker_manager
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from unilora_core import UniLoraError
from unilora_vllm.cache import Cache
from unilora_vllm.settings import Settings
from unilora_vllm.sources import find, sources_of, valid

__all__ = ["UniLoraResolver", "install", "restore_before_loading"]

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, so that its handlers print it


class UniLoraResolver(LoRAResolver):
    """A resolver that finds the adapter file of a name, and makes its LoRA folder for the base that is served.

    Attributes:
        cache: where the folders are.
    """

    def __init__(self, settings: Settings):
        self.cache = Cache(settings)
        self._sources = sources_of(settings)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for the adapter of a name, in a thread, so that the server goes on meanwhile.

        Returns:
            None where no source has the name, so that vLLM asks its next resolver, or answers 404.

        Raises:
            VLLMValidationError: there is a file, and it cannot be served here; vLLM answers 400 with the text.
        """
        return await asyncio.to_thread(self._resolve, base_model_name, lora_name)

    def _resolve(self, base: str, name: str) -> LoRARequest | None:
        if not valid(name):
            logger.warning("unilora: %.200r is no name of an adapter: expected words with / between.", name)
            return None
        try:
            if (data := find(name, self._sources)) is None:
                return None
            folder = self.cache.add(data, base)
        except (UniLoraError, OSError) as error:
            logger.warning("unilora: adapter %s: %s", name, error)
            raise VLLMValidationError(f"adapter {name}: {error}", parameter="model") from error
        number = int(folder.name[:15], 16) + 1  # vLLM's server puts a number of its own in its place
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))


def install(settings: Settings) -> None:
    """Register the resolver, and have vLLM's workers restore what has left the cache.

    Raises:
        ImportError: vLLM has changed where its workers look for the folder of a LoRA.
    """
    resolver = UniLoraResolver(settings)
    restore_before_loading(worker_manager, resolver.cache)
    LoRAResolverRegistry.register_resolver("Uni-LoRA Resolver", resolver)


def restore_before_loading(workers: ModuleType, cache: Cache) -> None:
    """Wrap the function by which vLLM's workers turn the path of a LoRA into a folder, which they read next.

    Raises:
        ImportError: there is no such function.
    """
    find_folder = getattr(workers, "get_adapter_absolute_path", None)
    if find_folder is None:
        raise ImportError(
            f"{workers.__name__} has no get_adapter_absolute_path, through which adapters come back that have left the "
            "cache; expected vLLM 0.32 or 0.33."
        )
    find_folder = getattr(find_folder, "__wrapped__", find_folder)  # plugins may be loaded twice

    @functools.wraps(find_folder)
    def restored(lora_path: str) -> str:
        folder = find_folder(lora_path)
        if Path(folder).parent == cache.settings.cache:
            cache.restore(Path(folder))
        return folder

    workers.get_adapter_absolute_path = restored  # type: ignore[attr-defined]
