"""The layout of the package: who may import whom, who imports deepspeed, and who reads the environment."""

import ast
import re
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megapromoe"
FILES = sorted(PACKAGE.rglob("*.py"))

# One total order, lowest first: each may import itself and those before it.
ORDER = (
    *(
        "errors",
        "imports",
        "io",
        "versions",
        "plot_text",
        "plot_styles",
        "plot_lines",
        "number_text",
        "run_lines",
        "routing_trace",
        "recorded_routes",
        "work_progress",
    ),
    *("config", "planning", "distributed", "diffusion", "data", "nn"),
    *("preflight", "engine", "benchmark", "checkpoint", "conversion", "training", "sampling", "routing_analysis"),
    *("diffusers", "evaluation", "studies", "commands", "cli", "__main__"),
)


def modules(tree: ast.AST) -> set[str]:
    """Dotted names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            # `from a import b`: b may be a module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def packages_imported(tree: ast.AST) -> set[str]:
    ours = {name.split(".")[1] for name in modules(tree) if name.startswith("megapromoe.")}
    return {name for name in ours if not name.startswith("__version")}


def module_name(file: Path) -> str:
    return ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts))


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one repeated at the end; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def reads_environment(tree: ast.AST) -> bool:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool({"environ", "getenv", "environb"} & names or {"os.environ", "os.getenv"} & modules(tree))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_in_one_direction(file):
    assert package_of(file) in ORDER, f"{name_of(file)} has no place in ORDER"
    above = ORDER[: ORDER.index(package_of(file)) + 1]
    assert packages_imported(tree_of(file)) <= set(above)


def test_no_files_import_each_other_in_a_circle():
    """At any length, and wherever in a file the import stands."""
    names = {module_name(file): file for file in FILES if file.name != "__init__.py"}
    imports = {name: modules(tree_of(file)) & names.keys() for name, file in names.items()}
    assert not circle(imports), " <- ".join(circle(imports))


def test_only_the_backend_of_the_engine_imports_deepspeed():
    """One folder of the engine, and the benchmark, which compares our layer with DeepSpeed's own."""
    importers = {f for f in FILES if any(m.split(".")[0] == "deepspeed" for m in modules(tree_of(f)))}
    outside = {file for file in importers if file.parent != PACKAGE / "engine" / "deepspeed_backend"}
    assert outside == {PACKAGE / "benchmark" / "deepspeed_moe.py"} and len(importers) > 1


def test_only_the_runtime_reads_the_environment():
    """The files of `distributed` that start a rank."""
    readers = [f for f in FILES if reads_environment(tree_of(f))]
    assert readers == [PACKAGE / "distributed" / name for name in ("launch_environment.py", "runtime.py")]


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=name_of)
def test_packages_hold_no_code(file):
    """The libraries `nn` and `diffusers` re-export their public names, all of them and no others."""
    docstring, *rest = tree_of(file).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    if file in (PACKAGE / "nn" / "__init__.py", PACKAGE / "diffusers" / "__init__.py"):
        *imports, public = rest
        assert all(isinstance(node, ast.ImportFrom) for node in imports)
        names = sorted(alias.name for node in imports for alias in node.names)
        assert isinstance(public, ast.Assign) and public.targets[0].id == "__all__"
        assert sorted(ast.literal_eval(public.value)) == names
        return
    versions = [n for n in rest if isinstance(n, ast.Assign) and n.targets[0].id == "__version__"]
    assert rest == versions and (not rest or file == PACKAGE / "__init__.py")


def test_no_file_is_a_drawer():
    assert not [f for f in FILES if f.stem in ("utils", "util", "helpers", "common", "misc")]


def test_the_rules_detect_what_they_forbid():
    code = "def f():\n    from megapromoe import cli\n    import megapromoe.training.loop\n    os.getenv('X')"
    assert packages_imported(ast.parse(code)) == {"cli", "training"}
    assert reads_environment(ast.parse(code)) and reads_environment(ast.parse("from os import environ"))
    assert not reads_environment(ast.parse("run.environment"))
    assert module_name(PACKAGE / "training" / "loop.py") in modules(ast.parse(code))
    assert len(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == 4
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_the_readme_shows_this_order_and_every_file():
    rows = re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.M)
    shown = [name.rstrip("/").removesuffix(".py") for name, _ in rows]
    assert [name for name in shown if "/" not in name] == [name for name in reversed(ORDER) if name != "__main__"]
    text = dict(zip(shown, (content for _, content in rows), strict=True))
    missing = []
    for file in FILES:
        package = "/".join(file.relative_to(PACKAGE).parts[:-1])
        if not package or file.name == "__init__.py" or package == "commands":
            continue
        patterns = re.findall(r"`([\w*]+\.py)`", text[package])
        if not any(fnmatch(file.name, pattern) for pattern in patterns):
            missing.append(name_of(file))
    assert not missing
