import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers import load_script

ROOT = Path(__file__).parent.parent
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def versions():
    return load_script("tools/versions.py")


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Makes tiny wheels, beside which pip finds nothing."""
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()

    def wheel(name, version, *requires):
        stem = f"{name}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {each}\n" for each in requires)
        kind = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        path = tmp_path / "wheels" / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{stem}.dist-info/METADATA", metadata)
            file.writestr(f"{stem}.dist-info/WHEEL", kind)
            file.writestr(f"{stem}.dist-info/RECORD", "")

    return wheel


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_floor_is_the_lower_end_of_the_range(versions):
    text = 'dependencies = [\n    "sae-lens>=6.9.10,<7",\n    "torch>=2.4",\n]'
    assert versions.sae_lens_range(text) == ("sae-lens>=6.9.10,<7", "6.9.10")
    with pytest.raises(ValueError, match="sae-lens"):
        versions.sae_lens_range('dependencies = ["sae-lens", "torch>=2.4"]')


def test_pyproject_has_a_floor_and_admits_the_pythons(versions):
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert versions.sae_lens_range(pyproject)
    assert f'requires-python = ">={versions.PYTHONS[0]}"' in pyproject


def test_pins_are_read_with_and_without_markers(versions):
    text = '# exact\nnumpy==2.4.6 ; python_version >= "3.11"\nhuggingface_hub==2.4.0\nrich>=1\n'
    assert versions.pins(text) == {"numpy": "2.4.6", "huggingface-hub": "2.4.0"}


def test_newer_compares_numbers_and_leaves_out_what_is_older_or_not_pinned(versions):
    pins = {"a": "2.9", "b": "2.10", "torch": "2.13.0", "c": "1.0"}
    found = {"a": "2.10", "b": "2.9", "torch": "2.13.0+cpu", "d": "3"}
    assert versions.newer(found, pins) == ["a 2.9 -> 2.10"]


def test_the_same_versions_are_run_once(versions):
    old, new = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}
    same = {"b": "2", "a": "1"}
    assert versions.merged({"floor": old, "newest": same, "newest-of-all": new}) == {
        "floor = newest": old,
        "newest-of-all": new,
    }


def test_of_several_pythons_the_one_that_runs_is_taken(versions, monkeypatch, tmp_path):
    program(tmp_path / "shims/python3.99", "exit 127")
    program(tmp_path / "bin/python3.99", "echo 3.98")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/python3.99").write_text("not a program")
    installed = program(tmp_path / "pyenv/versions/3.99.1/bin/python3.99", "echo 3.99")
    folders = [str(tmp_path / name) for name in ("shims", "bin", "other", "missing")]
    monkeypatch.setenv("PATH", ":".join(folders))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert versions.find_python("3.99") == str(installed)
    assert versions.find_python("3.97") is None
    assert list(versions.run_python("3.97", ["floor"], full=False)) == [
        (None, "Python 3.97: skipped, not on this machine")
    ]
    assert versions.find_python(THIS) == sys.executable


def test_pip_tells_the_newest_within_a_range(versions, index):
    for version in ("6.2", "6.10", "7.0"):
        index("sae_lens", version)
    assert versions.newest(sys.executable, "sae-lens>=6.2,<7") == "6.10"
    assert versions.newest(sys.executable, "sae-lens") == "7.0"
    with pytest.raises(versions.Failed, match="sae-lens"):
        versions.newest(sys.executable, "sae-lens>=8")


def test_a_torch_with_cuda_is_passed_over(versions, index):
    index("torch", "2.15", "nvidia_cublas")
    index("torch", "2.13+cpu", "sympy")
    index("nvidia_cublas", "13")
    index("sympy", "1")
    assert versions.cpu_torch(sys.executable, ["torch", "torch==2.13"]) == "2.13+cpu"
    with pytest.raises(versions.Failed, match=r"torch 2\.15 only with CUDA; .*torch==2\.14"):
        versions.cpu_torch(sys.executable, ["torch", "torch==2.14"])


def test_all_skipped_is_no_success(versions, monkeypatch, capsys):
    monkeypatch.setattr(versions, "find_python", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["versions.py", "floor"])
    assert versions.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was run"


def test_broken_tests_are_named_and_fail_the_run(versions, monkeypatch, tmp_path):
    folder = tmp_path / "project"
    program(folder / "env/bin/python", f'exec {sys.executable} "$@"')
    (folder / "test_two.py").write_text("def test_a(): pass\n\ndef test_b(): assert 1 == 2\n")
    monkeypatch.setattr(versions, "ROOT", folder)
    passed, said = versions.test(folder / "env", full=True)
    assert not passed
    first, *rest = said.splitlines()
    assert first.startswith("FAILED: 1 failed, 1 passed")
    assert [line.strip() for line in rest] == ["FAILED test_two.py::test_b - assert 1 == 2"]
    (folder / "test_two.py").write_text("def test_a(): pass\n")
    passed, said = versions.test(folder / "env", full=True)
    assert passed
    assert said.startswith("1 passed")


def test_what_this_environment_has(versions):
    pytest_version = pytest.__version__
    assert versions.has(
        {"pytest": pytest_version, "sae-lens-atm": metadata.version("sae-lens-atm")}
    )
    assert not versions.has({"pytest": pytest_version, "nowhere-to-be-found": "1"})
    assert not versions.has({"pytest": "0.1"})
