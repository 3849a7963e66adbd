"""An adapter as one safetensors file: θ_d, a header that says what it belongs to, and extra tensors (a trained head).

The format is specified in ``docs/format.md``.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from unilora_core._namespace import Array
from unilora_core.errors import (
    AdapterFileError,
    CorruptFileError,
    MismatchError,
    SpecError,
    UnknownVersionError,
    ValuesError,
)
from unilora_core.files import write_file
from unilora_core.schema import parse_json, shown
from unilora_core.spec import ProjectionSpec

__all__ = ["FORMAT_VERSION", "AdapterFile", "load_adapter", "read_adapter", "save_adapter"]

FORMAT_VERSION = "1"
THETA = "theta_d"

SUMMED = 1e19
"""The largest number whose sums are safe, about √(float32's maximum): a sum of 2^31 such numbers is not infinite."""


@dataclass(frozen=True, repr=False)
class AdapterFile:
    """The contents of an adapter file.

    Attributes:
        spec: the spec, which fixes P.
        theta_d: (d,) float32, NumPy.
        tensors: extra tensors by name, NumPy; usually the parameters of a trained head.
        metadata: extra strings by name, for whoever wrote the file (targets, base model, versions).
    """

    spec: ProjectionSpec
    theta_d: np.ndarray
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        strings = sorted(name for name, _ in self.metadata.items())
        return f"AdapterFile(spec={self.spec!r}, tensors={shown(sorted(self.tensors))}, metadata={shown(strings)})"


def save_adapter(
    path: str | os.PathLike,
    spec: ProjectionSpec,
    theta_d: Array,
    *,
    tensors: Mapping[str, Array] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter file atomically: until the new file is whole, an old one at ``path`` stays as it is.

    Args:
        theta_d: (d,) real numbers, anything `numpy.asarray` takes; stored as float32.
        tensors: extra tensors by name, stored in their own dtype.
        metadata: extra strings by name.

    Raises:
        ValuesError: θ_d has another shape or is not real; θ_d or an extra tensor holds NaN or infinity; an extra name
            is taken, or names something that is no array of numbers or no string.
        OSError: the file cannot be written; the error names the path.
    """
    if (kind := np.asarray(theta_d).dtype).kind in "bcOSU":
        raise ValuesError(f"save_adapter: {path}: expected theta_d of real numbers, got {kind}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and named below
        theta = np.asarray(theta_d, dtype=np.float32, order="C")
    _check_values(theta, spec, f"save_adapter: {path}")
    arrays = {name: _native(array) for name, array in (tensors or {}).items()}
    header = {
        "format": "unilora",
        "format_version": FORMAT_VERSION,
        "spec": json.dumps(spec.to_json(), separators=(",", ":")),
        "fingerprint": spec.layout.fingerprint,
    }
    extra = dict(metadata or {})
    if arrays.keys() & {THETA, "__metadata__"} or extra.keys() & {*header, "checksum"}:
        raise ValuesError(f"save_adapter: the names {THETA!r}, '__metadata__', 'checksum', {sorted(header)} are taken.")
    _check_finite(arrays, f"save_adapter: {path}")
    arrays = {THETA: theta, **arrays}
    header |= extra
    try:
        header["checksum"] = _checksum(arrays, header)
        data = _in_order(save(arrays, metadata=header))
    except (SafetensorError, TypeError, UnicodeEncodeError) as error:
        raise ValuesError(f"save_adapter: {path}: an extra tensor or string cannot be stored: {error}") from error
    write_file(path, data)


def load_adapter(path: str | os.PathLike) -> tuple[ProjectionSpec, np.ndarray]:
    """Return the spec and θ_d ((d,) float32, NumPy) of an adapter file; `read_adapter` returns everything in it."""
    file = read_adapter(path)
    return file.spec, file.theta_d


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read and check an adapter file.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFileError: the file is truncated, damaged, or not written by unilora.
        AdapterFileError: an extra tensor is bfloat16, and ml_dtypes is not imported.
        UnknownVersionError: this version does not know the format or an algorithm.
        MismatchError: the layout in the file is not the one its fingerprint was made of.
        ValuesError: θ_d has another shape than the spec says, or holds NaN or infinity, or an extra tensor does.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file.")
    header, arrays = _read(path)
    if header.get("format") != "unilora":
        raise CorruptFileError(f"{path}: a safetensors file, but not a unilora adapter (no format = unilora in it).")
    if header.get("format_version") != FORMAT_VERSION:
        raise UnknownVersionError(
            f"{path}: expected format version {FORMAT_VERSION}, got {shown(header.get('format_version'))}; "
            "a newer unilora may read it."
        )
    checksum = header.pop("checksum", None)
    if checksum != _checksum(arrays, header):
        raise CorruptFileError(f"{path}: the contents do not match the checksum; the file is damaged, fetch it again.")
    for name in ("format", "format_version"):
        del header[name]
    spec = _spec(path, header.pop("spec", ""))
    fingerprint = header.pop("fingerprint", None)
    if fingerprint != spec.layout.fingerprint:
        raise MismatchError(
            f"{path}: the layout's fingerprint is {spec.layout.fingerprint[:12]}…, the file says {fingerprint!r:.15}…; "
            "its factors were renamed, reshaped or permuted after training."
        )
    if THETA not in arrays:
        raise CorruptFileError(f"{path}: there is no tensor {THETA!r} in it.")
    theta_d = arrays.pop(THETA)
    _check_values(theta_d, spec, str(path))
    _check_finite(arrays, str(path))
    return AdapterFile(spec, theta_d, arrays, header)


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except TypeError as error:
        if "bfloat16" not in str(error):
            raise CorruptFileError(f"{path}: not a whole safetensors file ({error}); fetch it again.") from error
        raise AdapterFileError(
            f"{path}: it holds tensors in bfloat16, which NumPy lacks; pip install ml_dtypes, and import it first."
        ) from error
    except (SafetensorError, UnicodeDecodeError, OverflowError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error}); fetch it again.") from error


def _spec(path: Path, text: str) -> ProjectionSpec:
    try:
        return ProjectionSpec.from_json(parse_json(text, "spec"))
    except UnknownVersionError as error:
        raise UnknownVersionError(f"{path}: {error}") from error
    except (SpecError, CorruptFileError) as error:
        raise CorruptFileError(f"{path}: the header's spec cannot be read: {error}") from error


def _check_values(theta_d: np.ndarray, spec: ProjectionSpec, where: str) -> None:
    if theta_d.shape != (spec.d,) or theta_d.dtype != np.float32:
        raise ValuesError(f"{where}: expected theta_d ({spec.d},) float32, got {theta_d.shape} {theta_d.dtype}.")
    if bad := int(np.count_nonzero(~np.isfinite(theta_d))):
        raise ValuesError(
            f"{where}: {bad} of the {spec.d} values of theta_d are NaN or infinite; training diverged "
            "(a lower learning rate, or gradient clipping), so nothing was written or loaded."
        )
    largest = float(np.abs(theta_d).max())
    if spec.start == "identity" and largest + spec.bound > float(np.finfo(np.float32).max):
        raise ValuesError(f"{where}: theta_d - theta_d⁰ is infinite in float32; training diverged.")
    if not spec.map.exact and largest > SUMMED:
        raise ValuesError(
            f"{where}: theta_d holds {largest:.3g}, whose sums under the grouping {spec.grouping!r} float32 may not "
            "hold; training diverged."
        )


def _check_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    for name, array in arrays.items():
        if array.dtype.kind in "fcV" and (bad := int(np.count_nonzero(~np.isfinite(array)))):  # V: bfloat16
            raise ValuesError(
                f"{where}: {bad} of the {array.size} values of {shown(name)[1:-1]} are NaN or infinite; training "
                "diverged, so nothing was written or loaded."
            )


def _native(array: Array) -> np.ndarray:
    """Return the array in C order and in this machine's byte order, in which the reader takes its checksum."""
    array = np.asarray(array, order="C")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _checksum(arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """Return the SHA-256 (hex) of the header and of each tensor's name, dtype, shape and bytes, in order of name."""
    digest = hashlib.sha256(json.dumps(sorted(header.items()), separators=(",", ":")).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape], separators=(",", ":")).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _in_order(data: bytes) -> bytes:
    """Return the same file with its header fields in order of name, so that equal adapters are equal files.

    safetensors writes its metadata in the order of a hash table, another one in each process.
    """
    size = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + size])
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
