"""The house is as the design says: imports run one way, no concrete layer is known outside its home."""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from fffexp import layers
from fffexp.layers import FeedforwardLayer

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fffexp").rglob("*.py"))
}

# what stands directly in fffexp/ and is used by all above it
GROUND = {name.split(".")[1] for name in FILES if name.count(".") == 1 and FILES[name].stem != "__init__"}
GROUND -= {"__main__", "cli", "tracking"}
TASKS = GROUND | {"routing", "layers", "models", "data", "tracking"}
MAY_IMPORT = {
    **dict.fromkeys(sorted(GROUND), GROUND),
    "environment": GROUND | {"kernels"},  # names the compiler
    "routing": set(),
    "kernels": {"routing"},
    "layers": {"routing", "kernels"},
    "models": {"layers"},
    "data": GROUND,
    "tracking": GROUND,
    "training": TASKS,
    "adapt": {"errors", "layers", "training"},
    "report": GROUND | {"study"},  # its results
    "study": GROUND | {"tracking", "training", "report"},
    "bench": GROUND | {"layers", "models", "data", "training", "report"},
    "paper": TASKS | {"training", "adapt", "study", "report", "bench", "cli"},  # the last: results.py, see below
}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imported(name: str) -> set[str]:
    """Modules of the package that a module names, wherever in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {home(each) for each in found if each.split(".")[0] == "fffexp"} - {name}


def home(name: str) -> str:
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def unit(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_import_goes_in_a_circle() -> None:
    list(graphlib.TopologicalSorter({name: imported(name) for name in FILES}).static_order())


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way(name: str) -> None:
    reached = {(each, other) for each in FILES if unit(each) == name for other in imported(each) - {"fffexp"}}
    assert {(each, other) for each, other in reached if unit(other) not in {name} | MAY_IMPORT[name]} == set()


def test_nothing_imports_the_command_line_or_the_public_names() -> None:
    above = {(name, other) for name in FILES for other in imported(name) if other in ("fffexp", "fffexp.cli")}
    # a config finds classes by their public names, which are looked up late; `make results` runs what the docs name
    entries = {("fffexp.__main__", "fffexp.cli"), ("fffexp.paper.results", "fffexp.cli")}
    assert above <= entries | {("fffexp.training.config", "fffexp")}


def top_imports(name: str) -> set[str]:
    """Names of the packages that loading a module loads."""
    found = set()
    for node in tree(name).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {each.split(".")[0] for each in found}


LAYERS = [name for name in FILES if unit(name) in ("layers", "routing", "kernels")]


def test_layers_import_torch_alone() -> None:
    others = {(name, each) for name in LAYERS for each in top_imports(name) - sys.stdlib_module_names}
    more = {(name, each) for name, each in others if each not in ("torch", "fffexp")}
    assert more <= {("fffexp.kernels.triton_kernels", "triton")}


def test_modules_load_on_systems_without_posix() -> None:
    for name in FILES:
        assert not top_imports(name) & {"fcntl", "resource", "pwd", "grp", "termios"}, name


def strings_and_names(module: ast.Module) -> Iterator[str]:
    """Every name and every string that is no docstring."""
    described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, described) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


KINDS = [kind.__name__ for kind in vars(layers).values() if isinstance(kind, type) and kind is not FeedforwardLayer]
CONCRETE = re.compile(rf"\b({'|'.join(KINDS)})\b")


@pytest.mark.parametrize("name", [name for name in FILES if unit(name) not in ("", "layers")])
def test_no_concrete_layer_is_known(name: str) -> None:
    found = [match for text in strings_and_names(tree(name)) for match in CONCRETE.findall(text)]
    assert found == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name in extras for each in extras[name])]
    declared = {re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") for each in wanted}
    homes = packages_distributions()
    for name in FILES:
        for node in ast.walk(tree(name)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"fffexp"}:
                known = {each.lower().replace("_", "-") for each in homes.get(top, [top])}
                assert known & declared, f"{name} imports {top}, which pyproject.toml does not declare"
