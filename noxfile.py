"""Run the core tests with other versions of Python and SAELens.

    nox                                  # each Python on this machine, oldest and newest SAELens
    nox -s "tests-3.12(oldest)"          # one session
    nox -s "tests-3.11(everything)"      # the newest version of every dependency

`oldest` and `newest` are the ends of the range for sae-lens in pyproject.toml. All other packages
are as in constraints.txt. A session whose Python is not installed is skipped.
"""

import re
from pathlib import Path

import nox

CORE = ("method", "sae", "metrics", "training/test_run.py", "training/test_checkpoints.py")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
VERSIONS = ("oldest", "newest", "everything")
nox.options.sessions = [f"tests-{python}({v})" for python in PYTHONS for v in VERSIONS[:2]]


def requirement(versions: str) -> str:
    """Return pyproject.toml's requirement on sae-lens, or its lower end."""
    dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    (allowed,) = (each for each in dependencies if each.startswith("sae-lens>="))
    return re.sub(r">=([\d.]+),.*", r"==\1", allowed) if versions == "oldest" else allowed


@nox.session(python=PYTHONS)
@nox.parametrize("versions", VERSIONS, ids=VERSIONS)
def tests(session: nox.Session, versions: str) -> None:
    """Install one set of versions and run the core tests, or the tests given after `--`."""
    constraints = Path(session.create_tmp(), "constraints.txt")
    pins = Path("constraints.txt").read_text(encoding="utf-8")
    pins = re.sub(r"^sae-lens==.*\n", "", pins, flags=re.MULTILINE)
    constraints.write_text("" if versions == "everything" else pins, encoding="utf-8")
    package = ("--editable", ".[dev,notebooks]")
    session.install(requirement(versions), "--constraint", str(constraints), *package)
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *(session.posargs or [f"tests/{part}" for part in CORE]))
