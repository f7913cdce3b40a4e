"""The section of a sweep."""

import pytest

from sae_lens_atm.compare.report import sweep
from tests.compare.sample import ODD, sample_sweep


@pytest.fixture(scope="module")
def results():
    return sample_sweep()


def test_points_are_listed_by_l0_best_first(results):
    lines = sweep.point_lines(results, results.sweep)
    assert len(lines) == len(results.rows)
    assert [line.l0 for line in lines] == sorted(line.l0 for line in lines)
    first = [line for line in lines if line.l0 == 4]
    ranks = [line.rank for line in first]
    assert ranks == [1, 2, 3, 4, 5, 6, None]  # jumprelu misses L0 4
    assert first[-1].marks == ["L0 off target"]
    objective = [float(line.cells[1].value) for line in first[:-1]]
    assert objective == sorted(objective, reverse=True)


def test_a_value_of_0_has_a_rank(results):
    changed = results.model_copy(deep=True)
    for row in changed.rows:
        row.figures["mcc"].mean = 0.0
    ranks = {line.rank for line in sweep.point_lines(changed, changed.sweep) if not line.marks}
    assert None not in ranks


def test_a_field_that_a_point_does_not_have_is_empty(results):
    assert sweep.swept_fields(results.sweep) == ["lr", "k", "kind"]
    line = next(
        line for line in sweep.point_lines(results, results.sweep) if line.values[1] is None
    )
    assert line.values == [0.1, None, None]


def test_each_field_has_a_chart_for_each_l0(results):
    panels = sweep.sweep_panels(results, results.sweep)
    assert [panel.title for panel in panels] == [
        f"MCC\N{NO-BREAK SPACE}↑ against {key}" for key in ("lr", "k", "kind")
    ]
    assert {tuple(panel.charts) for panel in panels} == {("4", "8", "12")}
    kinds = [panel.charts["4"].layout.xaxis.type for panel in panels]
    assert kinds == ["log", None, "category"]
    points = list(panels[0].charts["4"].data)
    assert sum(len(trace.x) for trace in points) == 7
    assert "&lt;b&gt;&amp;x" in {trace.name for trace in points}
    assert all(ODD not in text for trace in points for text in trace.customdata)
