import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

from sae_lens_atm.compare.pictures import draw_pictures


@pytest.fixture
def _a_backend_of_ones_own():
    before = mpl.get_backend()
    mpl.use("svg")
    yield
    plt.close("all")
    mpl.use(before)


@pytest.mark.usefixtures("_a_backend_of_ones_own")
def test_whoever_draws_keeps_backend_and_figures(comparison, tmp_path):
    mine = plt.figure()
    drawn = draw_pictures(comparison, tmp_path)
    assert [path.name for path in drawn] == ["pareto.png", "importance.png"]
    assert mpl.get_backend() == "svg"
    assert plt.get_fignums() == [mine.number]
