import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

from sae_lens_atm.compare.report.pictures import draw_pictures
from sae_lens_atm.compare.report.results import Point, Sweep


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


@pytest.mark.parametrize(
    "values", [[1e-4, 10], [-3, 0, 7], [1, None], ["a", 2], [True, False], [3]]
)
def test_a_sweep_over_any_values(comparison, tmp_path, values):
    names = list(comparison.entries)
    points = {
        name: Point(entry="ab"[i % 2], values={"x": values[i % len(values)]} if i else {})
        for i, name in enumerate(names)
    }
    sweep = Sweep(objective="explained_variance", points=points)
    paths = draw_pictures(comparison.model_copy(update={"sweep": sweep}), tmp_path)
    assert paths[-1].name == "sweep.png"
    assert paths[-1].stat().st_size > 5000


def test_a_picture_without_curves_says_so(comparison, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    written = []
    monkeypatch.setattr(Axes, "text", lambda *args, **_: written.append(args[3]))
    runs = [run.model_copy(update={"curve": None}) for run in comparison.runs]
    paths = draw_pictures(comparison.model_copy(update={"runs": runs}), tmp_path)
    assert "importance.png" in {path.name for path in paths}
    assert "no curves stored" in written


def test_a_name_is_no_formula(comparison, tmp_path):
    """Matplotlib reads text between dollar signs as TeX, and fails if it is not."""
    odd = r"$\nothing{$ [/b]"
    rename = {"atm": odd}
    changed = comparison.model_copy(deep=True)
    changed.entries = {rename.get(name, name): e for name, e in changed.entries.items()}
    for holder in [*changed.runs, *changed.rows]:
        holder.entry = rename.get(holder.entry, holder.entry)
    points = {name: Point(entry=odd, values={"x": odd}) for name in changed.entries}
    changed.sweep = Sweep(objective="mcc", points=points)
    assert len(draw_pictures(changed, tmp_path)) == 3
