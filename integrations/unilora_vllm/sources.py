"""Where the file of an adapter is found by its name: a folder, repositories on the hub, an address."""

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from unilora_core import AdapterFileError
from unilora_vllm.settings import Settings

__all__ = ["find", "sources_of", "valid"]

Source = Callable[[str], bytes | None]
"""A function from a valid name to the contents of its file; None where there is none."""

SUFFIX = ".safetensors"
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
"""The names that a file can have: no ``..``, no absolute path, nothing hidden, nothing that an address would escape
from."""

LARGEST = 2**30
"""The largest file that is fetched from an address, in bytes; a trained head may be in it."""

SECONDS = 60
"""The time that an address has to answer."""


def valid(name: str) -> bool:
    """Return whether a name may be looked for."""
    return NAME.fullmatch(name) is not None


def find(name: str, sources: tuple[Source, ...]) -> bytes | None:
    """Return the contents of the file of a valid name in the first source that has it; None where none has.

    Raises:
        OSError: a source does not answer, or not in HTTP.
        AdapterFileError: the file is too large.
    """
    return next((data for source in sources if (data := source(name)) is not None), None)


def sources_of(settings: Settings) -> tuple[Source, ...]:
    """Return the sources that the settings name, the nearest first."""
    return tuple(_sources(settings))


def _sources(settings: Settings) -> Iterator[Source]:
    if (folder := settings.folder) is not None:
        yield lambda name: _from_folder(folder, name)
    if settings.repositories:
        yield lambda name: _from_hub(settings.repositories, name)
    if (url := settings.url) is not None:
        yield lambda name: _from_address(url, name)


def _from_folder(folder: Path, name: str) -> bytes | None:
    """Read a file; a link that leads out of the folder does not count, as in vLLM's own resolver."""
    root, path = folder.resolve(), (folder / f"{name}{SUFFIX}").resolve()
    return path.read_bytes() if path.is_relative_to(root) and path.is_file() else None


def _from_hub(repositories: tuple[str, ...], name: str) -> bytes | None:
    for repository in repositories:
        if name.startswith(f"{repository}/"):
            try:
                return Path(hf_hub_download(repository, f"{name[len(repository) + 1 :]}{SUFFIX}")).read_bytes()
            except EntryNotFoundError:  # of the hub, or of its cache while offline
                return None
    return None


def _from_address(url: str, name: str) -> bytes | None:
    address = f"{url.rstrip('/')}/{urllib.parse.quote(name)}{SUFFIX}"
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as answer:
            data = answer.read(LARGEST + 1)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            return None
        raise OSError(f"{name}: its server answered {error.code}.") from error
    except OSError as error:
        raise OSError(f"{name}: its server does not answer ({error}).") from error
    except http.client.HTTPException as error:  # no HTTP, or cut off; or an address with no number for its port
        raise OSError(f"{name}: its address, or what is answered there, cannot be read ({error!r}).") from error
    if len(data) > LARGEST:
        raise AdapterFileError(f"{name}: a file of more than {LARGEST:,} bytes; adapters are kilobytes.")
    return data
