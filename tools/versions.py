"""Runs the tests on each Python that is here, with the oldest and the newest of what we build on.

    python tools/versions.py floor newest     # `make versions`, in CI
    python tools/versions.py newest-of-all    # `make weekly`

floor          the lowest sae-lens that pyproject.toml allows, the rest as in constraints.txt
               (so not the lowest of everything)
newest         the newest sae-lens that pyproject.toml allows, the rest as in constraints.txt
newest-of-all  the newest of everything that pip finds; prints what of it constraints.txt lacks

pip is asked what each comes to; what comes to the same is run once, in an environment of its own.
A Python that is not here is skipped, and so is one for which pip finds torch only with CUDA,
several GB that nothing here needs: give pip an index with CPU builds, and it is run. The exit code
is 1 if anything failed, or if nothing was run here or before (--tested).
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SETS = ("floor", "newest", "newest-of-all")
SHOWN = ("torch", "sae-lens", "transformer-lens", "numpy")
PARTS = "registry saving settings config masking sae importance train checkpoints stream"
CORE = [f"tests/test_{part}.py" for part in PARTS.split()]

Versions = dict[str, str]


class Failed(Exception):
    """What a command said that failed."""


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sae_lens_range(pyproject: str) -> tuple[str, str]:
    """The requirement on sae-lens, and the lowest version that satisfies it."""
    found = re.search(r'"(sae-lens>=([\d.]+),<\d+)"', pyproject)
    if not found:
        raise ValueError("pyproject.toml: no requirement like sae-lens>=X,<Y")
    return found[1], found[2]


def pins(constraints: str) -> Versions:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", constraints, re.MULTILINE)
    return {normal(name): version for name, version in found}


def newer(versions: Versions, than: Versions) -> list[str]:
    def key(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]

    return [
        f"{name} {than[name]} -> {version}"
        for name, version in sorted(versions.items())
        if name in than and key(version) > key(than[name])
    ]


def told(what: str, changes: list[str]) -> str:
    return f"  {what}: {', '.join(changes) or 'nothing'}"


def with_cuda(versions: Iterable[str]) -> bool:
    return any(name.startswith(("nvidia-", "cuda-")) for name in versions)


def merged(resolved: Mapping[str, Versions]) -> dict[str, Versions]:
    """Sets of the same versions as one, under both names."""
    together: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, versions in resolved.items():
        together.setdefault(tuple(sorted(versions.items())), []).append(name)
    return {" = ".join(names): dict(versions) for versions, names in together.items()}


def candidates(version: str) -> Iterator[str]:
    yield sys.executable
    for folder in os.get_exec_path():
        yield str(Path(folder, f"python{version}"))
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")))


def find_python(version: str) -> str | None:
    """The first that runs: a shim of pyenv's is on PATH even where it leads nowhere."""
    code = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for path in candidates(version):
        try:
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == version:
            return path
    return None


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise Failed(" ".join(said) or (done.stderr or done.stdout).strip()[-500:])
    return done.stdout


@cache
def resolve(python: str, *arguments: str) -> Versions:
    """The versions that pip would install into an empty environment."""
    dry = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-")
    found = json.loads(run(python, "-m", "pip", *dry, *arguments))["install"]
    return {normal(item["metadata"]["name"]): item["metadata"]["version"] for item in found}


def newest(python: str, requirement: str) -> str:
    (version,) = resolve(python, "--no-deps", requirement).values()
    return version


def cpu_torch(python: str, wanted: Iterable[str]) -> str:
    """The first that pip has without CUDA, of what is wanted."""
    said: list[str] = []
    for torch in wanted:
        try:
            versions = resolve(python, torch)
        except Failed as error:
            said.append(str(error))
        else:
            if not with_cuda(versions):
                return versions["torch"]
            said.append(f"torch {versions['torch']} only with CUDA")
    raise Failed("; ".join(said))


def resolve_set(python: str, name: str, torch: str, folder: Path) -> Versions:
    arguments = [".[dev,notebooks]", f"torch=={torch}"]
    if name != "newest-of-all":
        # pip would rather take an older sae-lens than say that the newest conflicts with the rest.
        allowed, floor = sae_lens_range(text("pyproject.toml"))
        exact = floor if name == "floor" else newest(python, allowed)
        rest = folder / "constraints.txt"
        rest.write_text(re.sub(r"^sae-lens==.*\n", "", text("constraints.txt"), flags=re.MULTILINE))
        arguments += [f"sae-lens=={exact}", "--constraint", str(rest)]
    versions = resolve(python, *arguments)
    return {k: version for k, version in versions.items() if k != "sae-lens-atm"}


def install(python: str, versions: Versions, folder: Path) -> Versions:
    """Exactly these versions into a new environment; those that are then there."""
    run(python, "-m", "venv", "--clear", "--without-pip", str(folder / "env"))
    pip = (python, "-m", "pip", "--python", str(folder / "env/bin/python"))
    exact = folder / "versions.txt"
    exact.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    run(*pip, "install", "--no-deps", "--no-compile", "--requirement", str(exact))
    run(*pip, "install", "--no-deps", "--editable", ".")
    installed = json.loads(run(*pip, "list", "--format", "json"))
    return {normal(item["name"]): item["version"] for item in installed}


def test(env: Path, full: bool) -> tuple[bool, str]:
    """Whether the tests pass, and how pytest ends: with its last line, or with what broke."""
    done = subprocess.run(
        [str(env / "bin/python"), "-m", "pytest", "-n", "2", "-p", "no:warnings", "--tb=short"]
        + ([] if full else CORE),
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(env / "bin"), *os.get_exec_path()]),
            "PYTHONPATH": "",
            "COLUMNS": "200",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or ["pytest said nothing"]
    end = lines[-1].strip("= ")
    if done.returncode == 0:
        return True, end
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return False, "\n  ".join([f"FAILED: {end}", *(broken or lines[-30:])])


def has(versions: Versions) -> bool:
    """Whether the environment of this very process has them all."""
    here = {normal(found.name): found.version for found in distributions()}
    return all(here.get(name) == wanted for name, wanted in versions.items())


def run_python(
    version: str, sets: list[str], full: bool, tested: bool = False
) -> Iterator[tuple[bool | None, str]]:
    """What came of each set: passed, failed, or None for skipped."""
    path = find_python(version)
    if path is None:
        yield None, f"Python {version}: skipped, not on this machine"
        return
    pinned = pins(text("constraints.txt"))
    resolved: dict[str, Versions] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        run(path, "-m", "venv", "--upgrade-deps", str(folder / "pip"))
        python = str(folder / "pip/bin/python")
        for each in sets:
            wanted = [f"torch=={pinned['torch']}"]
            try:
                torch = cpu_torch(python, ["torch", *wanted] if each == "newest-of-all" else wanted)
            except Failed as error:
                yield None, f"Python {version}, {each}: skipped, {error}"
                continue
            try:
                resolved[each] = resolve_set(python, each, torch, folder)
            except Failed as error:
                yield False, f"Python {version}, {each}: FAILED: {error}"
        for names, versions in merged(resolved).items():
            if tested and version == "{}.{}".format(*sys.version_info) and has(versions):
                yield True, f"Python {version}, {names}: those of this environment, tested already"
                continue
            have = install(python, versions, folder)
            passed, said = test(folder / "env", full)
            shown = ", ".join(f"{name} {have[name]}" for name in SHOWN)
            yield passed, f"Python {version}, {names}: {shown}: {said}"
            if "newest-of-all" in names:
                yield None, told("newer than constraints.txt", newer(versions, pinned))
                latest = {name: newest(python, name) for name in ("torch", "sae-lens")}
                yield None, told("newer, but with CUDA or not allowed", newer(latest, versions))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--all", action="store_true", help="all tests, not the core of them")
    parser.add_argument(
        "--tested", action="store_true", help="leave out what has just been tested where this runs"
    )
    arguments = parser.parse_args()
    results: list[bool] = []
    for version in arguments.python:
        try:
            ended = run_python(version, arguments.sets, arguments.all, arguments.tested)
            for passed, said in ended:
                print(said, flush=True)
                results += [] if passed is None else [passed]
        except Failed as error:
            print(f"Python {version}: FAILED: {error}", flush=True)
            results.append(False)
    if not results:
        print("nothing was run")
    return 0 if all(results) and (results or arguments.tested) else 1


if __name__ == "__main__":
    sys.exit(main())
