"""The notebooks run from top to bottom, with fewer training steps.

Cells with the tag "full-length" need the whole training, and are left out. With NOTEBOOKS=full
everything runs as it is written.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FULL = os.environ.get("NOTEBOOKS") == "full"
STEPS = 100
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def shortened(notebook):
    """The notebook with `STEPS` reduced and without the cells that need the whole training."""
    notebook.cells = [
        cell for cell in notebook.cells if "full-length" not in cell.metadata.get("tags", ())
    ]
    replaced = 0
    for cell in notebook.cells:
        cell.source, count = re.subn(
            r"^STEPS = \d+$", f"STEPS = {STEPS}", cell.source, flags=re.MULTILINE
        )
        replaced += count
    assert replaced == 1
    return notebook


@every_notebook
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    # With several threads, kernels that run at the same time slow each other down.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    if not FULL:
        notebook = shortened(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = [o.text for c in notebook.cells for o in c.get("outputs", []) if "text" in o]
    if path.stem == "gemma_2_2b":  # the tests have no Hub
        assert any("RUNNING A STAND-IN" in text for text in printed)
        assert not any("THE REAL" in text for text in printed)
    assert not any("%|" in text for text in printed), "a progress bar"


@every_notebook
def test_no_outputs_are_committed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@every_notebook
def test_the_readme_links_to_it(path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"](notebooks/{path.name})" in readme
