"""Every figure of the README and of docs/ names what makes it, and that is there: a command, its words, its results."""

import ast
import csv
import functools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
SCRIPTS = {
    str(path.parent if path.name == "__main__.py" else path)
    for folder in ("benchmarks", "demo")
    for path in (path.relative_to(ROOT) for path in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*/*.py")])
    if path.name == "__main__.py" or (path.parent.name == folder and path.name != "common.py")
}
"""What can be run: files, and folders with a `__main__.py`."""

COPIED = {"demo": "nox -s demo"}
"""Folders of results that are copied from what a session writes; a page names the session."""


@functools.cache
def sources(script):
    """The text of a script, or of each file of a folder that is run, by path."""
    paths = [ROOT / script] if script.endswith(".py") else sorted((ROOT / script).rglob("*.py"))
    return {path: path.read_text("utf-8") for path in paths}


# ---- paths, sessions and commands that pages quote -------------------------------------------------------------------


def quoted(text):
    """The paths of scripts and results that a page names."""
    start = r"(?:(?<=\.\./)|(?<![\w/.*-]))"
    return re.findall(rf"{start}((?:benchmarks|demo|examples|tests)/(?:[\w.*/-]*[\w*/])?)", text)


def commands(text):
    """(script, words) of each `python benchmarks/…` of a page."""
    found = re.findall(r"python ((?:benchmarks|demo)/[\w./]*\w)([^`\n|#;&)]*)", text)
    return [(script, words.split()) for script, words in found]


def strings(texts):
    """The strings in the code of a script as tuples of what is fixed in them, None where a value stands."""
    for node in (node for text in texts.values() for node in ast.walk(ast.parse(text))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        found = tuple(part.value if isinstance(part, ast.Constant) else None for part in parts)
        if all(isinstance(part, str | None) for part in found) and any(found):
            yield found


def vocabulary(texts):
    """The words that a script knows: its strings, its options among them, and the names of its files."""
    return {parts[0] for parts in strings(texts) if len(parts) == 1} | {path.stem for path in texts}


def unknown(words, known):
    """The words of a command that its script does not know; numbers, a FOLDER, `mine` and x=y are a user's own."""
    return [word for word in words if word not in known and not re.fullmatch(r"[\d.e-]+|[A-Z_]+|mine|\w+=.*", word)]


def sessions():
    """The names of nox's sessions."""
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(mark) for mark in node.decorator_list)
    }


@pytest.mark.parametrize("page", PAGES)
def test_quoted_paths_exist(page):
    found = [path for path in quoted(PAGES[page]) if "NAME" not in path]
    assert [path for path in found if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES)
def test_quoted_sessions_exist(page):
    assert set(re.findall(r"nox -s ([\w-]+)", PAGES[page])) <= sessions()


@pytest.mark.parametrize("page", PAGES)
def test_quoted_commands_are_known_to_their_scripts(page):
    common = vocabulary({ROOT / "benchmarks" / "common.py": (ROOT / "benchmarks" / "common.py").read_text("utf-8")})
    found = {
        f"{script} {' '.join(words)}": unknown(words, vocabulary(sources(script)) | common)
        for script, words in commands(PAGES[page])
    }
    assert {command: words for command, words in found.items() if words} == {}


def test_planted_commands_are_caught():
    text = "`python benchmarks/a.py sweep --base FOLDER -n 3`, then\n\n    python benchmarks/b table  # or plot\n"
    assert commands(text) == [
        ("benchmarks/a.py", ["sweep", "--base", "FOLDER", "-n", "3"]),
        ("benchmarks/b", ["table"]),
    ]
    known = vocabulary({Path("b.py"): 'parser.add_argument("part", choices=["run"])\nPARTS = {"sweep": 1}'})
    assert unknown(["sweep", "--base", "FOLDER", "3", "run"], known) == ["--base"]
    assert quoted("(../benchmarks/results/x.png) and `benchmarks/a.py`, https://x.y/tests/z") == [
        "benchmarks/results/x.png",
        "benchmarks/a.py",
    ]


# ---- scripts and results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(script for script in SCRIPTS if script.startswith("benchmarks")))
def test_scripts_know_smoke(script):
    """`nox -s benchmarks` runs each with `--smoke`; one that reads no arguments would run in full."""
    text = "\n".join(sources(script).values())
    assert '"--smoke"' in text or re.search(r"\bparser\(__doc__\)", text)


def test_a_smoke_run_writes_into_a_copy_that_goes():
    code = "import common; print(common.write('planted', {})); print((common.DOCS / 'method.md').exists())"
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-c", code, "--smoke"]
    path, copied = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
    assert Path(path).name == "planted.json"
    assert copied == "True"
    assert not Path(path).exists()
    assert not (RESULTS / "planted.json").exists()


@functools.cache
def names_of_files(script):
    """What a script may call its files and folders, as one pattern: its strings, with anything where a value stands."""
    texts = sources(script)
    patterns = {"".join(r"[\w-]+" if part is None else re.escape(part) for part in parts) for parts in strings(texts)}
    long = {pattern for pattern in patterns if len(pattern) < 80 and re.search("[a-z]{3}", pattern.split(r"\.")[0])}
    return re.compile("|".join(long | {path.stem for path in texts}))


def makes(script, result):
    """Whether a script writes a file of the results, by its name, with its ending or without, and its folder's."""
    pattern, path = names_of_files(script), Path(result)
    return any(map(pattern.fullmatch, (path.name, path.stem))) and all(map(pattern.fullmatch, path.parent.parts))


def results():
    """The files of the results, by their path below them."""
    return sorted(str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*") if path.is_file())


@pytest.mark.parametrize("result", results())
def test_results_are_made_by_a_script_that_a_page_names(result):
    by_hand = COPIED.get(Path(result).parts[0])
    if by_hand:
        assert any(by_hand in text for text in PAGES.values())
        return
    makers = {script for script in SCRIPTS if makes(script, result)}
    assert makers, "no script writes it: delete it with the figures that come from it"
    named = {path.rstrip("/") for text in PAGES.values() for path in quoted(text)}
    paths = [f"benchmarks/results/{result}", *(f"benchmarks/results/{up}" for up in Path(result).parents[:-1])]
    assert makers & named or any(Path(path).match(name) for path in paths for name in named), "no page quotes it"


def test_exceptions_are_still_there():
    assert set(COPIED) <= {Path(result).parts[0] for result in results()}


def test_planted_results_are_caught(monkeypatch):
    planted = {Path("benchmarks/new.py"): 'f"peft_{part}"; write("bases", 1); folder / "plots" / f"{name}"'}
    monkeypatch.setitem(globals(), "sources", {"new": planted}.get)
    found = [
        name for name in ("peft_step.json", "bases.md", "new.csv", "gone.json", "old/bases.md") if makes("new", name)
    ]
    assert found == ["peft_step.json", "bases.md", "new.csv"]
    names_of_files.cache_clear()


# ---- figures without a source ----------------------------------------------------------------------------------------

SOURCE = re.compile(r"(?:benchmarks|demo|examples|tests)/\w|nox -s \w|the paper|[Pp]ublished")
FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?: (?:s|ms|µs|seconds|minutes|points|KB|MB|GB)\b)|(?<![\w.])\d+\.\d+ ?%")
DECIMAL = re.compile(r"^[*\s]*\d+\.\d{1,3}(?!\d)")


def sections(text):
    """(heading, text, text without code) of each part of a page, down to the next heading of any level."""
    parts = re.split(
        r"^(?=#{1,6} )",
        re.sub(r"^```.*?^```$", lambda code: code[0].replace("\n#", "\n "), text, flags=re.S | re.M),
        flags=re.M,
    )
    for part in parts:
        bare = re.sub(r"^```.*?^```$|`[^`\n]*`", "", part, flags=re.S | re.M)
        yield part.partition("\n")[0], part, bare


def figures(bare):
    """Numbers with a unit of what is measured, and cells of tables that begin with a decimal, three or more of them."""
    cells = [
        cell for line in bare.splitlines() if line.startswith("|") for cell in line.split("|") if DECIMAL.search(cell)
    ]
    return FIGURE.findall(bare) + (cells if len(cells) > 2 else [])


def without_source(text):
    """The sections with figures that name neither a command, nor results, nor the paper they are from."""
    found = [(heading, figures(bare)) for heading, part, bare in sections(text) if not SOURCE.search(part)]
    return {heading: each for heading, each in found if each}


@pytest.mark.parametrize("page", PAGES)
def test_figures_have_a_source(page):
    assert without_source(PAGES[page]) == {}


def test_planted_figures_are_caught():
    text = "# A\n3 s `4 s`\n## B\n| 1.25 | 2.5 ± 1 | **0.3** |\n## C\nby `nox -s x`: 3 s\n## D\n```\n# 5 s\n```\n9 %\n"
    assert without_source(text) == {"# A": ["3 s"], "## B": [" 1.25 ", " 2.5 ± 1 ", " **0.3** "]}


# ---- figures that follow from the results ----------------------------------------------------------------------------


def loaded(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def vs_peft(part, ratio):
    return lambda: [loaded(f"vs_peft_{part}")[ratio]]


def frozen_bytes():
    found = loaded("vs_peft_memory")
    return [found["unilora_bytes_per_parameter"], found["peft_bytes_per_parameter"]]


def timm_counts():
    families = loaded("timm_families")["families"]
    dead = [row for row in families if row["peft"].get("lora", {}).get("dead")]
    return [len(families), sum("refused" not in row["default"] for row in families), len(dead)]


def gpart_megabytes():
    found = loaded("gpart_memory")
    return [found["most"] / 1e6, max(row["delta_w"] for row in found["rows"].values()) / 1e6]


def gpart_microseconds():
    rows = loaded("gpart_memory")["rows"].values()
    return [1e6 * statistics.median(4 * row["seconds"] / row["delta_w"] for row in rows)]


def seconds_of_groupings():
    return [row["seconds_median"] for row in loaded("grouping_statistics")["details"]["time"]]


def jax_ratios():
    found = loaded("jax_step")
    keys = ("time", "temporary", "temporary and arguments", "flops")
    return [found[case][f"{key}/qwix"] for case in ("computed", "cached", "merged") for key in keys]


def jax_groups():
    found = loaded("jax_groups")
    return [found[f"{name}, with gradient"]["median_s"] for name in ("computed", "cached")]


def jax_vmap():
    found = loaded("jax_vmap")
    ratios = [found[f"64 adapters / {name}"] for name in ("(64 x one adapter)", "one adapter, 64 rows")]
    return [*ratios, found["bytes of 64 adapters"] / 1e6, found["bytes of 64 LoRAs"] / 1e6]


def attaching():
    cases = loaded("attach_8b")["cases"].values()
    rows = [case[library] for case in cases for library in ("unilora", "peft")]
    keys = {"cpu_seconds": 1, "seconds": 1, "bytes_per_lora_parameter": 1, "peak_growth_bytes": 1e6}
    return [row[key] / unit for row in rows for key, unit in keys.items()]


def exponents():
    found = {(row["method"], row["way"]): row for row in loaded("projection_cost")["exponents"]}
    values = []
    for method, small in (("uni-lora", "d"), ("fastfood", "log2 d"), ("gaussian", "d")):
        ways = [found[method, "P"], found[method, "transpose"]]
        values += [way[f"s over {size}"] for size in ("D", small) for way in ways]
        values += [ways[0][f"operations over {size}"] for size in ("D", small)]
    return values


def methods():
    rows = loaded("methods")["rows"].values()
    return [value for row in rows for value in (row["d"], row["D"], row["bytes"], row["losses"][0], row["losses"][-1])]


def losses_of_bases():
    rows = [row for of_model in loaded("bases")["unilora"].values() for row in of_model.values()]
    return [row["losses"][at] for row in rows if "losses" in row for at in (0, -1)]


def outcomes():
    found = [row["outcome"] for row in loaded("transformers_classes")["classes"]]
    kinds = ("alive", "alive in part", "refused", "unchecked", "not built", "dead", "wrong")
    return [found.count(kind) for kind in kinds]


def bank():
    found, rows = loaded("many_adapters"), []
    for case in (found["q and v"], found["all-linear"]):
        forward, generate = case["forward_32x64"], case["generate_16_tokens"]
        names = ("bank_one_adapter/one_attached", "bank_32_adapters/one_attached")
        ratios = [timed[name] for timed in (forward, generate) for name in names]
        rows += [
            case["bank_bytes"] / 1e6,
            case["peft_lora_bytes_float32"] / 1e6,
            *ratios,
            1000 * case["add_s_per_adapter"],
        ]
    return rows


def tenants():
    rows = []
    for case in loaded("tenants")["cases"]:
        runs = case["in turn"], case["together"]
        rows += [case["tenants"], case["rows_of_each"], *(run["seconds_per_step"] for run in runs)]
        rows += [case["together/in turn"], *(run["peak_growth_bytes"] / 1e6 for run in runs)]
    return rows


def soaked():
    rows = []
    for base in ("llama", "smollm2", "vit"):
        found = loaded(f"soak_{base}")
        added, soak = found["added"], found["soak"]
        memory = soak["resident_bytes"]
        rows += [added["bytes_of_files"] / 1e6, added["adds_per_second"], found["bank_bytes_after"] / 1e6]
        rows += [soak["requests"], soak["rows_compared"], soak["changes"], len(soak["errors"])]
        rows += [memory[0] / 1e6, memory[-1] / 1e6]
    return rows


def resolved():
    keys = ("file_bytes", "lora_bytes", "first_ms", "another_seed_ms", "there_ms")
    return [loaded("vllm_resolving")[case][key] for case in ("q and v", "all-linear") for key in keys]


def vit_b16(*keys):
    found = loaded("vit_b16_cpu")
    cases = ("unilora", "peft-lora", "lora", "peft-unilora", "full")
    return lambda: [found[case][key] / (1e9 if "bytes" in key else 1) for case in cases for key in keys]


def demonstrated():
    values = []
    for part in ("vision", "text", "language"):
        with (RESULTS / "demo" / f"{part}.csv").open(encoding="utf-8") as file:
            rows = [{key: float(row[key]) for key in row if key != "method"} for row in csv.DictReader(file)]
        _, lora, unilora = rows
        values += [100 * row.get("accuracy", row.get("exact")) for row in rows]
        values += [row[key] for key in ("trained", "bytes") for row in (unilora, lora)]
    return values


N = r"([\d.,]+\d|\d)"
DERIVED = {
    "demo": (
        "README.md",
        rf"\| {N} % \| {N} % \| \*\*{N} %\*\* \| {N} instead of {N} \| {N} instead of {N} \|",
        demonstrated,
    ),
    "frozen": ("docs/peft.md", rf"bytes per LoRA parameter \| {N} / {N} \|", frozen_bytes),
    "projection": ("docs/peft.md", rf"D = 10 M, time \| {N} \|", vs_peft("projection", "unilora_factors/peft")),
    "groups": ("docs/peft.md", rf"groups of D = 12.5 M, time \| {N} \|", vs_peft("groups", "unilora/peft")),
    "step, LoRA": ("docs/peft.md", rf"to PEFT's plain LoRA \| {N} \|", vs_peft("step", "unilora/peft_lora")),
    "step, UniLora": ("docs/peft.md", rf"to PEFT's UniLora \| {N} \|", vs_peft("step", "unilora/peft_unilora")),
    "ViT-B/16": (
        "docs/peft.md",
        rf"to PEFT's LoRA \| {N} \|",
        lambda: [loaded("vit_b16_cpu")["unilora"]["to_peft_lora"]],
    ),
    "JAX": ("docs/peft.md", rf"to qwix's LoRA \| {N} \|", lambda: jax_ratios()[:1]),
    "timm": ("docs/peft.md", rf"by default, of {N} \| {N} \| .*? dead under PEFT's LoRA .*? \| {N} \|", timm_counts),
    "JAX, table": ("docs/jax.md", rf"(?:`wrap`, groups|`merge` in).*?\| {N} \| {N} \| {N} \| {N} \|", jax_ratios),
    "JAX, groups": ("docs/jax.md", rf"its gradient take {N} s with computed groups and {N} s", jax_groups),
    "JAX, vmap": (
        "docs/jax.md",
        rf"{N} of the time of 64 single calls, and {N} times .*? take {N} MB, 64 LoRAs would take {N}",
        jax_vmap,
    ),
    "GPart": (
        "docs/framework.md",
        rf"of one layer is {N} MB, where the largest layer's ΔW has {N} MB",
        gpart_megabytes,
    ),
    "GPart, time": ("docs/framework.md", rf"about {N} µs for each number of ΔW", gpart_microseconds),
    "grouping": ("docs/grouping.md", rf"`balanced` {N} s, `iid` {N} s, `numpy-shuffle` {N} s", seconds_of_groupings),
    "attach": ("docs/bases.md", rf"\| (?:unilora|PEFT) \| {N} \| {N} \| {N} \| {N} MB \|", attaching),
    "bank": (
        "docs/many-adapters.md",
        rf"\| (?:q and v|all-linear), D = [\d,]+ \| {N} MB \| {N} MB" + rf" \| {N}" * 5 + " ms",
        bank,
    ),
    "soak": (
        "docs/many-adapters.md",
        rf"\| (?:a random Llama|SmolLM2-135M|ViT-S/16)[^|]*\| {N} MB \| {N} \| {N} MB"
        + rf" \| {N}" * 4
        + rf" \| {N} → {N} MB",
        soaked,
    ),
    "resolver": (
        "docs/serving.md",
        rf"\| (?:q and v|all-linear) \| {N} bytes \| {N} bytes \| {N} ms \| {N} ms \| {N} ms \|",
        resolved,
    ),
    "tenants": (
        "docs/tenants.md",
        rf"\| {N} \| {N} \| {N} s \| {N} s \| {N} \| {N} MB \| {N} MB \|",
        tenants,
    ),
    "cost": (
        "docs/properties.md",
        rf"D\^{N}, D\^{N}; (?:d|\(log d\))\^{N}, (?:d|\(log d\))\^{N} \| D\^{N}; (?:d|\(log d\))\^{N} \|",
        exponents,
    ),
    "methods": (
        "docs/framework.md",
        rf"\| `[\w-]+` \| (?:llama|vit|plain) \| {N} \| {N} \| {N} \| {N} → {N} \|",
        methods,
    ),
    "bases": ("docs/bases.md", rf"{N} → {N}, \de[+-]\d\d", losses_of_bases),
    "classes": (
        "docs/bases.md",
        rf"\| (?:alive|alive in part|refused|unchecked|not built|dead|wrong) \| {N} \| \S",
        outcomes,
    ),
    "ViT-B/16, table": (
        "docs/fine-tune-your-vit.md",
        rf"\| {N} \| {N} s \| {N} s \| {N} \| {N} \| {N} GB \|",
        vit_b16("trained", "median_s", "min_s", "to_peft_lora", "to_peft_lora_by_round", "peak_bytes"),
    ),
}
"""Name → page, the figures in its words, and what the results say they are."""


@pytest.mark.parametrize("name", DERIVED)
def test_figures_follow_from_the_results(name):
    page, words, values = DERIVED[name]
    found = re.findall(words, " ".join(PAGES[page].split()))
    said = [number for match in found for number in (match if isinstance(match, tuple) else (match,))]
    digits = [len(number.partition(".")[2]) for number in said]
    assert said == [f"{value:,.{places}f}" for value, places in zip(values(), digits, strict=True)]
