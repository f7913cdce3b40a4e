"""The import rules: a folder imports only itself and folders below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sae_lens_atm

PACKAGE = Path(sae_lens_atm.__file__).parent
# Each folder may import itself and the folders of the lines above its own.
LAYERS = [
    "errors",
    "files yaml_files torchrun page",
    "method metrics",
    "sae data baselines",
    "evaluation",
    "training",
    "hub",
    "compare saebench explore",
    "cli",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
MATHEMATICS = LEVEL["metrics"]  # up to here nothing knows SAELens


def modules() -> list[str]:
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    # `__init__` and `__main__` are above all; `inside` runs in SAEBench's own environment.
    return sorted(str(path) for path in files if len(path.parts) > 1 or path.stem in LEVEL)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the absolute names of all imported modules, also of imports inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module == "sae_lens_atm":  # `from sae_lens_atm import saebench`
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def problems(here: str, source: str) -> list[str]:
    """Return the imports of a module in folder `here` that break the rules."""
    found: list[str] = []
    for module in imported_modules(ast.parse(source)):
        package, _, rest = module.partition(".")
        if package == "sae_lens" and LEVEL[here] <= MATHEMATICS:
            found.append(module)
        if package == "sae_lens_atm":
            there = rest.split(".")[0]
            if there != here and LEVEL.get(there, len(LAYERS)) >= LEVEL[here]:
                found.append(module)
    return found


@pytest.mark.parametrize("name", modules())
def test_imports_point_down(name):
    path = PACKAGE / name
    if "inside" in path.parts:
        return
    here = Path(name).parts[0].removesuffix(".py")
    assert problems(here, path.read_text("utf-8")) == []


def test_the_whole_package_is_looked_at():
    folders = {Path(name).parts[0].removesuffix(".py") for name in modules()}
    assert folders == set(LEVEL)


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("method", "import sae_lens"),
        ("metrics", "def f():\n    from sae_lens.util import x"),
        ("sae", "from sae_lens_atm.training.run import train"),
        ("training", "def f():\n    import sae_lens_atm.compare.plan"),
        ("compare", "from sae_lens_atm import saebench"),
        ("hub", "import sae_lens_atm.cli as c"),
        ("metrics", "from sae_lens_atm.method import masking"),
    ],
)
def test_an_import_that_points_up_is_found(here, source):
    assert len(problems(here, source)) == 1


def test_an_import_that_points_down_is_allowed():
    source = "from sae_lens_atm.training import run\nfrom sae_lens_atm.errors import HubError"
    assert problems("compare", source) == []
