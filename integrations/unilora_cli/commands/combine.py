"""`unilora combine`: several adapters of one spec as one. Imports the core only."""

import math
import os
from pathlib import Path

from unilora_cli.console import CommandError, path_of, say
from unilora_cli.options.files import Combine
from unilora_core import combine_files, read_adapter, save_adapter
from unilora_core.files import try_files

__all__ = ["run"]


def run(options: Combine) -> None:
    """Write the combination.

    Raises:
        CommandError: a file is named twice, or one is where the result goes.
        MismatchError, ValuesError, SpecError: the files or the weights do not go together; see `combine_files`.
        OSError: the result cannot be written, which is tried first.
    """
    out = path_of(options.out)
    _check_places(options, out)
    try_files(out)
    made = combine_files({name: read_adapter(path_of(name)) for name in options.files}, options.weights)
    save_adapter(out, made.spec, made.theta_d, tensors=made.tensors, metadata=dict(made.metadata.items()))
    weights = options.weights or [1 / len(options.files)] * len(options.files)
    parts = " + ".join(f"{weight:g} · {name}" for weight, name in zip(weights, options.files, strict=True))
    rest = 1 - math.fsum(weights)
    start = f" + {rest:g} · θ_d⁰" if abs(rest) > 1e-6 else ""
    say(f"{out}: θ_d = {parts}{start}; d = {made.spec.d:,}, {out.stat().st_size:,} bytes")


def _check_places(options: Combine, out: Path) -> None:
    """Refuse one file under two names, and the loss of a file; links and spellings are followed."""
    places: dict[str, str] = {}
    for name in options.files:
        place = os.path.realpath(path_of(name))
        if (first := places.get(place)) is not None:
            again = "" if first == name else f", before as {first}"
            raise CommandError(f"{name} is named twice{again}; give it the sum of its weights.")
        places[place] = name
    if os.path.realpath(out) in places:
        raise CommandError(f"{options.out}: this is one of the files to combine; choose another --out.")
    if out.is_file() and not options.overwrite:
        raise CommandError(f"{options.out}: there is a file already; add --overwrite, or choose another --out.")
