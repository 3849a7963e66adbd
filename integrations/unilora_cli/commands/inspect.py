"""`unilora inspect`: what an adapter file holds. Imports the core only."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from unilora_cli.console import say, table
from unilora_cli.options.files import Inspect
from unilora_core import AdapterFile, read_adapter
from unilora_core.header import FROZEN, Header, read_header
from unilora_core.maps import FIRST_D, MAPS
from unilora_core.methods import method_of
from unilora_core.serialisation import FORMAT_VERSION

__all__ = ["describe", "run"]


def run(options: Inspect) -> None:
    """Print a description of a file."""
    file = read_adapter(options.file)
    header = read_header(options.file, file)
    facts = describe(options.file, file, header)
    say(json.dumps(facts, indent=2) if options.json else _text(facts, header))


def describe(path: str, file: AdapterFile, header: Header) -> dict[str, Any]:
    """Everything that `unilora inspect --json` prints."""
    spec, pieces = file.spec.to_json(), _pieces(file)
    tensors = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in sorted(file.tensors.items())}
    size, head_bytes = Path(path).stat().st_size, sum(tensor.nbytes for tensor in file.tensors.values())
    return {
        "file": str(path),
        "bytes": size,
        "bytes_as_lora": 4 * file.spec.D + head_bytes if file.spec.frame == "pair" else None,
        "format_version": FORMAT_VERSION,
        "method": method_of(file.spec),
        "algorithm": {"grouping": spec["grouping"], "version": spec["grouping_version"]},
        "frame": file.spec.frame,
        "options": file.spec.chosen,
        "seed": spec["seed"],
        "D": file.spec.D,
        "d": file.spec.d,
        "D/d": file.spec.D / file.spec.d,
        "start": spec["start"],
        "bound": spec["bound"],
        "fingerprint": file.spec.layout.fingerprint,
        "targets": {row.name: pieces.pop(row.name, {}) for row in header.targets},
        "shared": pieces,
        "head": {name: says for name, says in tensors.items() if not name.startswith(FROZEN)},
        "frozen": {name: says for name, says in tensors.items() if name.startswith(FROZEN)},
        "theta_d": _statistics(file.theta_d),
        "metadata": {key: value for key, value in sorted(file.metadata.items()) if key != "targets"},
    }


def _pieces(file: AdapterFile) -> dict[str, dict[str, list[int]]]:
    """Target, or what several share → {"A": shape, "B": shape}."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, shape in file.spec.layout.factors:
        target, _, factor = name.rpartition(".")
        found.setdefault(target, {})[factor] = list(shape)
    return found


def _statistics(theta_d: np.ndarray) -> dict[str, float]:
    wide = theta_d.astype(np.float64)
    return {
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "min": float(wide.min()),
        "max": float(wide.max()),
        "norm": float(math.sqrt((wide**2).sum())),
        "zeros": int((wide == 0).sum()),
    }


def _text(facts: dict[str, Any], header: Header) -> str:
    lora = facts["bytes_as_lora"]
    size = f"{facts['bytes']:,} bytes" + ("" if lora is None else f"; as LoRA this would be {lora:,} bytes")
    rows = [("file", f"{facts['file']} ({size})")]
    if header.base_model is not None:
        rows.append(("base model", f"{header.base_model} ({header.task or 'unknown task'})"))
    if labels := header.labels:
        rows.append(("labels", f"{len(labels)}: " + ", ".join(labels[:10]) + (" …" if len(labels) > 10 else "")))
    algorithm, theta, writer = facts["algorithm"], facts["theta_d"], facts["metadata"].get("written_by")
    rows += [
        ("format", f"version {facts['format_version']}, written by {writer or 'an unnamed program'}"),
        ("method", _method(facts)),
        ("projection", f"{algorithm['grouping']} version {algorithm['version']}, seed {facts['seed']}"),
        ("numbers", f"d = {facts['d']:,} trained for D = {facts['D']:,}{_kind(facts)}: D/d = {facts['D/d']:.4g}"),
        ("start", _start(facts)),
        ("fingerprint", facts["fingerprint"]),
        ("theta_d", ", ".join(f"{name} {theta[name]:.4g}" for name in theta)),
    ]
    blocks = [table(rows, indent=""), f"targets: {len(facts['targets'])}", table(_summarised(facts["targets"]))]
    if facts["shared"]:
        blocks += ["shared by all targets of a size", table(_summarised(facts["shared"]))]
    if facts["head"]:
        head = [(name, " × ".join(map(str, shape)), kind) for name, (shape, kind) in facts["head"].items()]
        blocks += [f"saved in full: {len(head)} tensors", table(head)]
    if facts["frozen"]:
        size = sum(4 * math.prod(shape) for shape, _ in facts["frozen"].values())
        blocks.append(f"frozen, made of the base's weights: {len(facts['frozen'])} tensors, {size:,} bytes")
    return "\n".join(blocks)


def _method(facts: dict[str, Any]) -> str:
    options = "".join(f", {name} {value:g}" for name, value in facts["options"].items())
    return f"{facts['method'] or 'no published one'}: frame {facts['frame']}{options}"


def _kind(facts: dict[str, Any]) -> str:
    return " LoRA parameters" if facts["frame"] == "pair" else ""


def _start(facts: dict[str, Any]) -> str:
    """The start, and what θ_d is drawn from there, unless it is 0 or the map has a start of its own."""
    drawn = facts["start"] != "zero" and MAPS[facts["algorithm"]["grouping"]].start is None
    first_d = facts["options"].get(FIRST_D)
    at = "" if first_d is None else f" of {first_d:,} numbers"
    return facts["start"] + (f", U(-{facts['bound']:.4g}, {facts['bound']:.4g}){at}" if drawn else "")


def _summarised(targets: dict[str, dict[str, list[int]]]) -> list[tuple[str, ...]]:
    """One row per kind of target, numbers in names replaced by *: 12 × blocks.*.attn.qkv.q."""
    kinds = Counter(
        (
            ".".join("*" if part.isdigit() else part for part in name.split(".")),
            ", ".join(f"{factor} {' × '.join(map(str, shape))}" for factor, shape in factors.items()),
        )
        for name, factors in targets.items()
    )
    return [(f"{count} ×", name, shapes) for (name, shapes), count in kinds.items()]
