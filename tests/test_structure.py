"""No circle of imports inside a package, no class beyond a screen or two, short functions: from the syntax tree."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    path.parent.name: path.parent
    for folder in (ROOT, ROOT / "backends", ROOT / "integrations")
    for path in sorted(folder.glob("unilora_*/__init__.py"))
}
LONGEST_CLASS, MEDIAN_BODY, P90_BODY = 200, 6, 25
"""Lines; a body is counted without its docstring."""

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(package):
    """The dotted name of each module of a package → its source."""
    folder = PACKAGES[package]
    files = {path.relative_to(folder.parent).with_suffix(""): path for path in folder.rglob("*.py")}
    return {".".join(p.parts).removesuffix(".__init__"): path.read_text("utf-8") for p, path in files.items()}


def imported(module, source, modules, folder=False):
    """Those of ``modules`` that a module imports anywhere in its file; ``folder``: it is an ``__init__``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: (1 if folder else 0) - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= named & modules
            if not named <= modules:  # a name of the package itself: its __init__ gives it
                found.add(base)
    return found & modules


def circles(files):
    """The shortest circle through each module that is in one, once each: ("a", "b", "a")."""
    folders = {name for name in files if any(other.startswith(f"{name}.") for other in files)}
    graph = {name: imported(name, source, files.keys(), name in folders) for name, source in files.items()}
    found = {}
    for start in graph:
        todo, seen = [(start,)], set()
        for path in todo:  # grows: breadth first
            for name in sorted(graph[path[-1]] - seen):
                seen.add(name)
                todo.append((*path, name))
        circle = next((path for path in todo[1:] if path[-1] == start), None)
        if circle:
            found.setdefault(frozenset(circle), circle)
    return sorted(found.values())


def bodies(files):
    """The lines of each function's body, without its docstring: {"module:name:line": lines}."""
    found = {}
    for module, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, DEFINITIONS):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                found[f"{module}:{node.name}:{node.lineno}"] = lines
    return found


def classes(files):
    """The lines of each class: {"module:name": lines}."""
    trees = {module: ast.parse(source) for module, source in files.items()}
    found = ((module, n) for module, tree in trees.items() for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    return {f"{module}:{node.name}": node.end_lineno - node.lineno + 1 for module, node in found}


def too_long(files):
    """What is beyond the bounds, in words."""
    lines = sorted(bodies(files).values())
    median, p90 = statistics.median(lines), lines[int(0.9 * len(lines))]
    found = [f"{name}: {n} lines" for name, n in classes(files).items() if n > LONGEST_CLASS]
    found += [f"median body: {median} lines"] if median > MEDIAN_BODY else []
    return found + ([f"p90 of bodies: {p90} lines"] if p90 > P90_BODY else [])


def test_all_packages_are_looked_at():
    assert set(PACKAGES) == {
        "unilora_core",
        "unilora_torch",
        "unilora_jax",
        "unilora_transformers",
        "unilora_timm",
        "unilora_vllm",
        "unilora_cli",
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_has_a_circle_of_imports(package):
    """Late imports and those for types count: a circle that Python does not see is one for the reader."""
    assert circles(sources(package)) == []


def test_classes_and_functions_fit_on_a_screen():
    assert too_long({name: text for package in PACKAGES for name, text in sources(package).items()}) == []


def missing(source, modules):
    """The modules of our packages that a script imports and that do not exist."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            named.add(node.module)
    return sorted(name for name in named - modules if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_scripts_import_modules_that_exist(folder):
    """A benchmark that needs a GPU or a package that is not here runs in no session: a module that went breaks it."""
    modules = {module for package in PACKAGES for module in sources(package)}
    scripts = sorted((ROOT / folder).rglob("*.py"))
    assert scripts
    found = {str(path.relative_to(ROOT)): missing(path.read_text("utf-8"), modules) for path in scripts}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_planted_missing_module_is_caught():
    source = "import os, p\nimport unilora_core.gone\ndef f():\n    from unilora_jax.factors import factors_of"
    assert missing(source, {"unilora_core", "unilora_jax"}) == ["unilora_core.gone", "unilora_jax.factors"]


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"p.a": "import p.b", "p.b": "import p.a"}, ("p.a", "p.b", "p.a")),
        ({"p.a": "from p.b import f", "p.b": "from p.a import g"}, ("p.a", "p.b", "p.a")),
        ({"p.a": "from p import b", "p.b": "from p import a"}, ("p.a", "p.b", "p.a")),
        ({"p.a": "import p.b as b", "p.b": "from p import a as _a"}, ("p.a", "p.b", "p.a")),
        ({"p.a": "from p.b import f", "p.b": "def g():\n    from p.a import f"}, ("p.a", "p.b", "p.a")),
        (
            {"p.a": "from p.b import f", "p.b": "if TYPE_CHECKING:\n    from p.a import A"},
            ("p.a", "p.b", "p.a"),
        ),
        ({"p.a": "import p.b", "p.b": "async def g():\n    lambda: 0\n    import p.a"}, ("p.a", "p.b", "p.a")),
        (
            {"p.a": "import p.b", "p.b": "from p import c", "p.c": "class C:\n    def f(self):\n        import p.a"},
            ("p.a", "p.b", "p.c", "p.a"),
        ),
        ({"p.a": "from p.s.b import f", "p.s": "", "p.s.b": "from p.a import g"}, ("p.a", "p.s.b", "p.a")),
        ({"p.s": "from p.s import b", "p.s.b": "from p.s import NAMES"}, ("p.s", "p.s.b", "p.s")),
        ({"p": "from p.a import f", "p.a": "from p import __version__"}, ("p", "p.a", "p")),
        ({"p.a": "from . import b", "p.b": "from .a import f"}, ("p.a", "p.b", "p.a")),
        ({"p.s": "from .b import f", "p.s.b": "from . import NAMES"}, ("p.s", "p.s.b", "p.s")),
        ({"p.s": "", "p.s.b": "from ..c import f", "p.c": "from .s.b import f"}, ("p.s.b", "p.c", "p.s.b")),
        ({"p.a": "from p.a import f"}, ("p.a", "p.a")),
    ],
)
def test_a_planted_circle_is_caught(files, circle):
    assert circles({"p": "", **files}) == [circle]


def test_two_planted_circles_are_both_caught():
    files = {"p.a": "import p.b", "p.b": "import p.a, p.c", "p.c": "import p.d", "p.d": "import p.c"}
    assert circles(files) == [("p.a", "p.b", "p.a"), ("p.c", "p.d", "p.c")]


@pytest.mark.parametrize(
    "files",
    [
        {"p.a": "import p.b, p.c", "p.b": "import p.c", "p.c": ""},
        {"p": "from p.a import f", "p.a": "from p.b import g", "p.b": "import os, q.a"},
        {"p": "from p import a", "p.a": ""},
        {"p.a": "import p.b", "p.b": '"""from p.a import f"""'},
    ],
)
def test_what_is_no_circle_is_not_caught(files):
    assert circles(files) == []


def function(lines, name="f"):
    return f'def {name}():\n    """Doc.\n\n    More.\n    """\n' + "    x = 1\n" * lines


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class A:\n" + "    x = 1\n" * 200 + function(1), ["p.a:A: 201 lines"]),
        ("def g():\n    class A:\n" + "        x = 1\n" * 200 + function(1) * 10, ["p.a:A: 201 lines"]),
        (function(7), ["median body: 7 lines"]),
        (function(1) * 8 + function(26) * 2, ["p90 of bodies: 26 lines"]),
        (function(1) * 8 + "async " + function(26) + "class A:\n    def f(self):\n" + "        x = 1\n" * 26,
         ["p90 of bodies: 26 lines"]),
    ],
)  # fmt: skip
def test_a_planted_length_is_caught(source, found):
    assert too_long({"p.a": source}) == found


def test_the_bounds_themselves_are_not_caught():
    source = "class A:\n" + "    x = 1\n" * 199 + function(6) * 8 + function(25) * 2
    assert too_long({"p.a": source}) == []
