from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    # Threads of several kernels that wait for one another in turns make seconds into minutes.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = [o.text for c in notebook.cells for o in c.get("outputs", []) if "text" in o]
    if path.stem == "gemma_2_2b":  # the Hub is out of reach of the tests
        assert any("RUNNING A STAND-IN" in text for text in printed)
        assert not any("THE REAL" in text for text in printed)
    assert not any("%|" in text for text in printed), "a progress bar"


@every_notebook
def test_nothing_of_a_run_is_committed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@every_notebook
def test_the_readme_links_to_it(path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"](notebooks/{path.name})" in readme
