"""How many planted faults the tests find: cosmic-ray changes an operator, a number, a name, and some test has to fail.

    python benchmarks/mutation.py unilora_core                            # 100 mutants of the package, drawn by seed 0
    python benchmarks/mutation.py unilora_torch --only merging --sample 30  # some of one module; nothing is written

A whole run takes days, so a sample is drawn. Each mutant meets the tests of its module (`TESTS`), in a copy of the
checkout. Needs cosmic-ray, pytest, hypothesis and what the package needs, with unilora itself not installed.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import SMOKE, parser, write
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).parents[1]
COPIED = ("unilora_core", "backends", "integrations", "tests", "docs", "README.md", "pyproject.toml")
SECONDS = 300
"""What the tests of one mutant may take; a mutant that takes longer is found."""

SOURCES = {"unilora_core": "unilora_core", "unilora_torch": "backends/unilora_torch"}
TESTS = {
    "unilora_core": {
        "_namespace": "spec",
        "codebook": "maps",
        "counting": "analysis",
        "dense": "maps",
        "files": "files_written serialisation",
        "gather": "maps grouping",
        "grouping": "grouping vectors",
        "header": "header serialisation",
        "identity": "arithmetic",
        "lora": "methods",
        "mapping": "maps",
        "rates": "methods",
        "schema": "schema header",
        "spec": "spec methods",
    },
    "unilora_torch": {
        "adapter": "attach errors training",
        "batches": "bank tenants",
        "bypassed": "bypassed verify",
        "calls": "interrupts threads",
        "checks": "attach computed_weights odds convolutions",
        "export": "lora method_files",
        "export_parameters": "lora method_files",
        "frozen": "method_files methods",
        "gather": "projection",
        "hooked": "bank tenants",
        "hooking": "attach replaced_modules",
        "live": "verify threads plural",
        "merging": "merge hooks computed_weights",
        "opened": "opened files",
        "paths": "paths convolutions",
        "replaced": "convolutions attention computed_weights bank",
        "rows": "bank",
        "saving": "files",
        "stored": "bank bank_lasts",
        "streamed": "generic method_lives methods",
        "structure": "replaced_modules",
        "swapping": "plural files",
        "switching": "plural",
        "targets": "attach attention convolutions files",
        "untouched": "verify",
        "vector": "attach merge",
        "verifying": "verify",
        "watch": "verify",
    },
}
"""Module → its tests, where they are not those of its name."""


@dataclass(frozen=True)
class Module:
    """One module, and the mutants that cosmic-ray made of it.

    Attributes:
        path: from the root of the copy.
        tests: the files that each mutant meets.
        jobs: the names of its mutants.
    """

    path: Path
    tests: tuple[str, ...]
    jobs: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for files."""
        return "_".join(self.path.with_suffix("").parts)


def tests_of(package: str, module: Path) -> tuple[str, ...]:
    """The files of tests of a module; none where it has none of its own."""
    folder = Path("tests") / package.removeprefix("unilora_")
    names = TESTS[package].get(module.stem, module.stem).split()
    return tuple(str(folder / f"test_{name}.py") for name in names if (ROOT / folder / f"test_{name}.py").exists())


def cosmic_ray(folder: Path, *arguments: str) -> None:
    """Run a subcommand in the copy."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    paths = {"PYTHONPATH": os.pathsep.join(str(folder / each) for each in (".", "backends", "integrations"))}
    program = "from cosmic_ray.cli import main; main()"
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, env=os.environ | quiet | paths, check=True)


def mutants(folder: Path, package: str, path: Path) -> Module:
    """Make the mutants of one module; none is run."""
    module = Module(path, tests_of(package, path), ())
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {' '.join(module.tests)}"
    settings = {"module-path": str(path), "timeout": float(SECONDS), "test-command": command, "excluded-modules": []}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / f"{module.name}.toml").write_text(
        "\n".join(["[cosmic-ray]", *lines, "[cosmic-ray.distributor]", 'name = "local"', ""]), encoding="utf-8"
    )
    cosmic_ray(folder, "init", f"{module.name}.toml", f"{module.name}.sqlite")
    with use_db(str(folder / f"{module.name}.sqlite"), WorkDB.Mode.open) as found:
        return Module(path, module.tests, tuple(sorted(item.job_id for item in found.pending_work_items)))


def run(folder: Path, module: Module, chosen: set[str]) -> dict[str, tuple[TestOutcome, str]]:
    """Mutant → what its tests made of it, and the lines it changed, of the chosen ones of a module."""
    session = str(folder / f"{module.name}.sqlite")
    with use_db(session, WorkDB.Mode.open) as found:
        for job in set(module.jobs) - chosen:
            found.set_result(job, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    cosmic_ray(folder, "exec", f"{module.name}.toml", session)
    with use_db(session, WorkDB.Mode.open) as found:
        done = {job: result for job, result in found.results if job in chosen}
    return {job: (result.test_outcome, result.diff or "") for job, result in done.items()}


def changed(diff: str) -> str:
    """The lines that a mutant takes out and puts in."""
    lines = (line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))
    return "\n".join(lines)


def main() -> None:
    """Draw the sample, run it, print what was missed and the score, write both."""
    command = parser(__doc__)
    command.add_argument("package", choices=SOURCES, nargs="?" if SMOKE else None)
    command.add_argument("--sample", type=int, default=100)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--only", help="a module; nothing is written")
    if SMOKE:
        command.set_defaults(package="unilora_core", only="layout", sample=1)
    options = command.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in COPIED:
            copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
            copy(ROOT / each, folder / each)
        paths = sorted((ROOT / SOURCES[options.package]).rglob("*.py"))
        paths = [path.relative_to(ROOT) for path in paths if "testing" not in path.parts]
        tested = [path for path in paths if tests_of(options.package, path) and options.only in (None, path.stem)]
        modules = [mutants(folder, options.package, path) for path in tested]
        there = [job for module in modules for job in module.jobs]
        chosen = set(random.Random(options.seed).sample(there, min(options.sample, len(there))))
        ends: Counter[str] = Counter()
        missed: dict[str, list[str]] = {}
        for module in modules:
            for outcome, diff in run(folder, module, chosen & set(module.jobs)).values():
                ends[outcome.value if outcome else "none"] += 1
                if outcome is TestOutcome.SURVIVED:
                    missed.setdefault(str(module.path), []).append(changed(diff))
            print(f"{module.path}: {dict(ends)} so far", flush=True)
    for path, lines in missed.items():
        print(path, *lines, sep="\n")
    total = sum(ends.values())
    score = 1 - ends[TestOutcome.SURVIVED.value] / max(1, total)
    print(f"{options.package}: {score:.1%} of {total} mutants found, of {len(there)}; {dict(ends)}")
    if options.only is None or SMOKE:
        results = {"mutants": len(there), "sample": total, "seed": options.seed, "score": score, **ends}
        print(write(f"mutation_{options.package}", results | {"missed": missed}))


if __name__ == "__main__":
    main()
