"""A package `sae_probes` of the same layout, with tasks that tests can compute by hand."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from sae_lens_atm.data import probing_tasks

ROWS = 600
NAMES = ["1_even", "2_text_bool", "3_sort of words"]


def texts(words: tuple[str, str], rows: int = ROWS) -> list[str]:
    """Return texts of three words: the class decides which word comes last."""
    return [f"w{i % 40} w{i % 7} {words[i % 2]}" for i in range(rows)]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the package on the path, and return the names of its tasks."""
    data = folder / "sae_probes" / "data"
    (data / "cleaned_data").mkdir(parents=True)
    (folder / "sae_probes" / "__init__.py").write_text("raise ImportError('xgboost')")
    kinds = ["Binary Classification"] * len(NAMES)
    master = pd.DataFrame(
        {
            "Dataset save name": [
                "cleaned_data/0_other.csv",
                *(f"cleaned_data/{n}.csv" for n in NAMES),
            ],
            "Data type": ["Continuous Data", *kinds],
        }
    )
    master.to_csv(data / "probing_datasets_MASTER.csv.zst", compression="zstd", index=False)
    labels = ([i % 2 for i in range(ROWS)], [i % 2 == 1 for i in range(ROWS)], ["no", "yes"])
    words = (("w50", "w51"), ("w52", "w53"), ("w54", "w55"))
    for name, target, pair in zip(NAMES, labels, words, strict=True):
        target = [target[i % 2] for i in range(ROWS)]
        table = pd.DataFrame({"prompt": texts(pair), "target": target})
        table.to_csv(data / f"cleaned_data/{name}.csv.zst", compression="zstd", index=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "sae_probes", raising=False)
    probing_tasks.task_names.cache_clear()
    return NAMES
