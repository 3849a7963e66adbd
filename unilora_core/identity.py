"""What tells one base model from another: the values that files keep of theirs are compared.

Rounding to bfloat16 or float16 moves a value by less than `TOLERANCE`, so one base in two dtypes, or quantised, is one.
"""

import base64

import numpy as np

from unilora_core.header import BaseIdentity
from unilora_core.schema import shown

__all__ = ["TOLERANCE", "difference", "name_of"]

TOLERANCE = 2**-7
"""The error of two roundings to bfloat16, relative to the value."""


def difference(theirs: BaseIdentity, ours: BaseIdentity) -> str:
    """Return in words how two bases differ; nothing where they are one."""
    if theirs.embeddings != ours.embeddings:
        there, here = (shown([list(shape) for shape in base.embeddings]) for base in (theirs, ours))
        return f"its embeddings have the shapes {there} there, {here} here (a vocabulary that was resized, or not)"
    a, b = _unpack(theirs.values), _unpack(ours.values)
    if a.shape != b.shape:
        return f"it has {a.size} values to compare there, {b.size} here (other norms or biases)"
    if wrong := _others(a, b):
        return f"{wrong} of {a.size} values of its norms, biases and embeddings are others"
    if theirs.ends and ours.ends and _others(_unpack(theirs.ends), _unpack(ours.ends)):
        return "the last rows of its embeddings are others (those of added tokens are made anew by each run)"
    made_anew = [name for name, values in theirs.fresh.items() if _unlike(values, ours.fresh.get(name))]
    if made_anew:
        return (
            f"{', '.join(made_anew[:4])}, which no checkpoint gave values and which is not in the file, is another "
            "(each run makes it anew; to train and save it, name it in modules_to_save as the adapter is attached)"
        )
    return ""


def name_of(base: BaseIdentity) -> str:
    """Return the name of a base for messages."""
    return f"{base.name!r} ({base.kind})" if base.name else f"a {base.kind}"


def _unlike(theirs: str, ours: str | None) -> bool:
    return ours is None or _others(_unpack(theirs), _unpack(ours)) > 0


def _others(a: np.ndarray, b: np.ndarray) -> int:
    """Count the values of one that differ from the other's, where both are known; all, where their numbers differ."""
    if a.shape != b.shape:
        return a.size + b.size
    known = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore"):  # infinity - infinity is not known
        distance = np.abs(a - b)
    far = distance > TOLERANCE * np.maximum(np.abs(a), np.abs(b)) + 1e-6
    return int(np.count_nonzero(far & known))


def _unpack(text: str) -> np.ndarray:
    """Return float32 values of bfloat16 in base64: their upper halves."""
    bits = np.frombuffer(base64.b64decode(text), "<u2").astype(np.uint32)
    return (bits << 16).view(np.float32)
