"""`unilora combine`: several adapters of one spec as one. Imports the core only."""

import math

from unilora_cli.console import CommandError, path_of, say
from unilora_cli.options.files import Combine
from unilora_core import combine_files, read_adapter, save_adapter
from unilora_core.files import try_files

__all__ = ["run"]


def run(options: Combine) -> None:
    """Write the combination.

    Raises:
        CommandError: a file is named twice.
        MismatchError, ValuesError, SpecError: the files or the weights do not go together; see `combine_files`.
        OSError: the result cannot be written, which is tried first.
    """
    if twice := [name for name in options.files if options.files.count(name) > 1]:
        raise CommandError(f"{twice[0]} is named twice; give it the sum of its weights.")
    out = path_of(options.out)
    try_files(out)
    made = combine_files({name: read_adapter(path_of(name)) for name in options.files}, options.weights)
    save_adapter(out, made.spec, made.theta_d, tensors=made.tensors, metadata=dict(made.metadata.items()))
    weights = options.weights or [1 / len(options.files)] * len(options.files)
    parts = " + ".join(f"{weight:g} · {name}" for weight, name in zip(weights, options.files, strict=True))
    rest = 1 - math.fsum(weights)
    start = f" + {rest:g} · θ_d⁰" if abs(rest) > 1e-6 else ""
    say(f"{out}: θ_d = {parts}{start}; d = {made.spec.d:,}, {out.stat().st_size:,} bytes")
