import math

import pytest

from sae_lens_atm.compare.report import charts, results
from sae_lens_atm.metrics.figures import FIGURES
from tests.compare.sample import ODD, measured_on_words, sample


def test_missed_l0s_are_hollow(comparison):
    chart = charts.pareto_panel(comparison, "mcc").charts[""]
    symbols = {trace.meta: trace.marker.symbol for trace in chart.data}
    hollow = {entry: [s.endswith("-open") for s in given] for entry, given in symbols.items()}
    assert hollow.pop("jumprelu") == [True, False, False]
    assert hollow.pop("topk") == [False, False, True]
    assert not any(any(points) for points in hollow.values())


def test_bars_of_several_seeds_are_deviations_and_of_one_its_interval():
    panel = charts.pareto_panel(measured_on_words(), "absorption_fraction")
    atm, topk = panel.charts[""].data
    assert atm.error_y.array == pytest.approx([0.1 / 2**0.5], rel=1e-4)
    assert atm.error_y.arrayminus is None
    assert topk.error_y.array == pytest.approx([0.04])
    assert topk.error_y.arrayminus == pytest.approx([0.02])
    assert "0.300 [0.280, 0.340] (n = 1)" in topk.customdata[0]
    low, high = panel.charts[""].layout.yaxis.range
    assert low < 0.08
    assert high > 0.34


def test_controls_out_of_view_are_named(comparison):
    assert charts.pareto_panel(comparison, "mcc").outside == ["untrained"]


def test_panels_are_of_figures_that_exist(comparison):
    language_model = sample(language_model=True)
    for given, there in ((comparison, "mcc"), (language_model, "ce_loss_score")):
        drawn = [name for name in charts.PARETO if charts.pareto_panel(given, name)]
        assert there in drawn
        assert "explained_variance" in drawn
    assert charts.pareto_panel(language_model, "mcc") is None
    assert charts.curve_panel(language_model, "absorption_fraction") is None
    assert charts.parents_panel(language_model) is None


def test_curves_are_means_of_what_is_known(comparison):
    template = comparison.runs[0]
    runs = [
        template.model_copy(
            update={
                "curve": results.Curve(
                    steps=steps, explained_variance=values, l0=[], dead_latents=[]
                )
            }
        )
        for steps, values in [([0, 10], [None, 0.4]), ([0, 10, 20], [math.nan, 0.6, 0.7])]
    ]
    none = template.model_copy(update={"curve": None})
    curve = charts.mean_curve([*runs, none], "explained_variance")
    assert curve == {0: None, 10: 0.5, 20: 0.7}


def test_there_is_a_curve_for_each_l0(comparison):
    panel = charts.curve_panel(comparison, "explained_variance")
    assert list(panel.charts) == ["4", "8", "12"]
    assert [trace.meta for trace in panel.charts["4"].data][-1] == "masking off"  # none untrained


def test_importance_is_of_the_first_seed_at_the_middle_l0(comparison):
    chosen = [(run.entry, run.l0_target, run.seed) for run, _ in charts.importance_runs(comparison)]
    assert chosen == [("atm", 8.0, 0), ("masking off", 8.0, 0)]


def test_a_log_axis_gets_no_zero():
    importance = results.Importance(
        steps=[0, 1, 2],
        threshold=[None, 1.0, 1.0],
        groups={"g": [[0.0, 0.0, 2.0], [0.0, 1.0, 2.0], [None, None, None]]},
        latents={"g": 3},
    )
    chart = charts.importance_chart(importance, 0.01)
    band, median, threshold = chart.data
    assert list(band.y) == [0.01, 0.01, 2.0, 2.0]
    assert list(median.y) == [None, 1.0]
    assert list(threshold.y) == [None, 1.0, 1.0]


def test_parents_go_by_depth_then_probability(comparison):
    panel = charts.parents_panel(comparison)
    assert list(panel.charts) == ["4", "8", "12"]
    heatmap = panel.charts["8"].data[0]
    by_feature = {parent.feature: parent for parent in comparison.parents}
    shown = [by_feature[int(text.split("feature ")[1].split(",")[0])] for text in heatmap.text[0]]
    keys = [(parent.depth, -(parent.probability or 0)) for parent in shown]
    assert keys == sorted(keys)
    assert heatmap.zmax < 1  # the untrained control reaches 1
    unmeasured = next(i for i, parent in enumerate(shown) if parent is comparison.parents[11])
    assert all(row[unmeasured] is None for row in heatmap.z)
    runs = [run for run in comparison.runs if (run.entry, run.l0_target) == ("atm", 8.0)]
    at = comparison.parents.index(shown[0])
    expected = sum(run.absorption_by_parent[at] for run in runs) / len(runs)
    assert heatmap.z[0][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("atm", "atm"),
        ("matching_pursuit (fixed steps)", "matching_pursuit<br>(fixed steps)"),
        ("matryoshka_batchtopk", "matryoshka_<br>batchtopk"),
        (ODD, "&lt;b&gt;&amp;x"),
    ],
)
def test_long_names_are_broken_beside_a_heatmap(name, label):
    assert charts.tick_label(name) == label


def test_a_single_target_has_an_axis_around_it(comparison):
    """Measured values of 3.997 to 4.000 once filled the axis."""
    one = [row.model_copy(deep=True) for row in comparison.rows if row.l0_target == 4]
    for i, row in enumerate(one):
        row.figures["l0"].mean = 4 - 0.003 * (i % 2)
    chart = charts.pareto_panel(comparison.model_copy(update={"rows": one}), "mcc").charts[""]
    low, high = chart.layout.xaxis.range
    assert 3.4 < low <= 3.6
    assert 4.4 <= high < 4.6


def test_a_panel_has_the_definition_of_its_figure(comparison):
    mcc = charts.pareto_panel(comparison, "mcc")
    assert mcc.meaning == FIGURES["mcc"].meaning
    dead = charts.curve_panel(comparison, "dead_latents")
    assert dead.meaning == FIGURES["dead_latents"].meaning
    assert dead.title == "dead latents\N{NO-BREAK SPACE}↓, last 200 steps"
    variance = charts.curve_panel(comparison, "explained_variance")
    assert variance.meaning == FIGURES["explained_variance"].meaning
