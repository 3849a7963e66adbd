"""What the environment says of the resolver; vLLM gives its plugins nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unilora_core import SpecError

__all__ = ["Settings"]

DTYPES = ("float32", "bfloat16", "float16")
PLUGIN = "unilora_resolver"


@dataclass(frozen=True)
class Settings:
    """Where adapter files are, and what is made of them.

    Attributes:
        folder: UNILORA_VLLM_FOLDER: the folder in which ``NAME.safetensors`` is the adapter NAME.
        repositories: UNILORA_VLLM_HF_REPO_LIST: repositories on the hub, with commas between; ``org/repo/NAME`` is
            ``NAME.safetensors`` of ``org/repo``.
        url: UNILORA_VLLM_URL: the address under which ``NAME.safetensors`` is the adapter NAME.
        cache: UNILORA_VLLM_CACHE_DIR: the folder of what is made; ``~/.cache/unilora/vllm`` by default.
        limit: UNILORA_VLLM_CACHE_BYTES: the bytes that the A and B in it may take; 16 GiB by default.
        base: UNILORA_VLLM_BASE: the folder of the served base's checkpoint, where vLLM was given another name for it.
        max_rank: UNILORA_VLLM_MAX_RANK: vLLM's ``--max-lora-rank``, to refuse a larger rank before anything is made.
        dtype: UNILORA_VLLM_DTYPE: the dtype in which A and B are kept: float32 (the default), bfloat16 or float16.
    """

    folder: Path | None
    repositories: tuple[str, ...]
    url: str | None
    cache: Path
    limit: int = 2**34
    base: Path | None = None
    max_rank: int | None = None
    dtype: str = "float32"

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings | None":
        """Return what the variables say; None where none of them says where adapters are.

        Raises:
            SpecError: a variable has a value that it cannot have, or files would be fetched over the network and
                VLLM_PLUGINS does not name this plugin.
        """
        said = {
            name.removeprefix("UNILORA_VLLM_"): value
            for name, value in environment.items()
            if name.startswith("UNILORA_VLLM_") and value
        }
        names = tuple(filter(None, (name.strip() for name in said.get("HF_REPO_LIST", "").split(","))))
        folder, url = _folder(said, "FOLDER"), said.get("URL")
        if folder is None and not names and url is None:
            return None
        if url is not None and not url.startswith(("http://", "https://")):
            raise SpecError(f"UNILORA_VLLM_URL: expected an address of http or https, got {url!r}.")
        if (names or url) and PLUGIN not in environment.get("VLLM_PLUGINS", "").split(","):
            raise SpecError(
                "UNILORA_VLLM_HF_REPO_LIST and UNILORA_VLLM_URL let a request fetch files over the network; if that is "
                f"meant, name the plugin: VLLM_PLUGINS={PLUGIN}."
            )
        if (dtype := said.get("DTYPE", "float32")) not in DTYPES:
            raise SpecError(f"UNILORA_VLLM_DTYPE: expected {', '.join(DTYPES)}, got {dtype!r}.")
        return cls(
            folder=folder,
            repositories=names,
            url=url,
            cache=Path(said.get("CACHE_DIR", "~/.cache/unilora/vllm")).expanduser().absolute(),
            limit=_number(said, "CACHE_BYTES") or cls.limit,
            base=_folder(said, "BASE"),
            max_rank=_number(said, "MAX_RANK"),
            dtype=dtype,
        )


def _folder(said: Mapping[str, str], name: str) -> Path | None:
    if name not in said:
        return None
    if not (path := Path(said[name])).is_dir():
        raise SpecError(f"UNILORA_VLLM_{name}: expected a folder, there is none at {said[name]!r}.")
    return path.absolute()


def _number(said: Mapping[str, str], name: str) -> int | None:
    if name not in said:
        return None
    if not said[name].isdecimal() or int(said[name]) < 1:
        raise SpecError(f"UNILORA_VLLM_{name}: expected a whole number above 0, got {said[name]!r}.")
    return int(said[name])
