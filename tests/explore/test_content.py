import re

import numpy as np
import pytest

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.explore.found_parents import FoundParents
from sae_lens_atm.explore.packing import unpack
from tests.explore.sample import CHILD, GRANDCHILD, ODD, PARENT, write_sample


def data_of(path):
    html = path.read_text(encoding="utf-8")
    (packed,) = re.findall(r'id="data">([^<]*)<', html)
    return html, unpack(packed)


def test_the_page_is_one_file_without_addresses(tmp_path):
    html, _ = data_of(write_sample(tmp_path / "page.html"))
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)
    assert "http://www.w3.org/2000/svg" in html  # the name of a format
    assert html.count("http") == html.count("http-equiv") + html.count("http://www.w3.org/2000/svg")


def test_names_are_escaped(tmp_path):
    html, data = data_of(write_sample(tmp_path / "page.html", name=f"sae {ODD}"))
    assert ODD not in html
    assert ODD in data["strings"]


def test_the_absorbed_parent_is_in_the_data(tmp_path):
    _, data = data_of(write_sample(tmp_path / "page.html"))
    (sae,) = data["saes"]
    pairs = sae["pairs"]
    found = dict(
        zip(
            zip(pairs["child"].tolist(), pairs["parent"].tolist(), strict=True),
            pairs["absorbed"].tolist(),
            strict=True,
        )
    )
    assert found[CHILD, PARENT] == pytest.approx(0.8)
    assert (GRANDCHILD, CHILD) in found
    assert "by the rule of ATM" in sae["parents_from"]


def test_parents_of_training_are_shown_as_they_are(tmp_path):
    parents = np.full((12, 8), -1)
    parents[7, 0] = 6
    found = FoundParents(parents, "final_2560")
    _, data = data_of(write_sample(tmp_path / "page.html", found=found))
    (sae,) = data["saes"]
    assert (sae["pairs"]["child"].tolist(), sae["pairs"]["parent"].tolist()) == ([7], [6])
    assert "read from its checkpoint final_2560" in sae["parents_from"]


def test_a_limit_of_the_size_takes_contexts_away(tmp_path):
    path = tmp_path / "page.html"
    full = write_sample(path).stat().st_size
    contexts = len(data_of(path)[1]["saes"][0]["examples"]["groups"])
    assert write_sample(path, megabytes=(full - 1) / 1e6).stat().st_size < full
    assert 0 < len(data_of(path)[1]["saes"][0]["examples"]["groups"]) < contexts
    with pytest.raises(SettingsError, match=r"set --max-size to more, got 0\.001"):
        write_sample(path, megabytes=0.001)
