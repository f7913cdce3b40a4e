import json
import re

import pytest

from sae_lens_atm.training.curves_page import (
    CURVES_FILENAME,
    curves_html,
    draw_chart,
    read_history,
    write_curves,
)
from sae_lens_atm.training.history import HISTORY_FILENAME
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.training.runs import stopped_after, synthetic_run

TITLES = ["loss", "explained variance", "L0", "dead latents", "share masked"]


def titles(html):
    return re.findall(r"<h3>(.*?)</h3>", html)


def history(**figures):
    columns = figures.values()
    return [
        {"step": 10 * i + 10, **dict(zip(figures, values, strict=True))}
        for i, values in enumerate(zip(*columns, strict=True))
    ]


def places(chart):
    pairs = chart.path.removeprefix("M").split("L")
    return [tuple(map(float, pair.split(","))) for pair in pairs]


def test_a_run_leaves_its_curves(synthetic_yaml, tmp_path):
    train(load_run(synthetic_yaml, ["run_final_eval=false"]))
    html = (tmp_path / "out" / CURVES_FILENAME).read_text()
    assert titles(html) == TITLES
    last = read_history(tmp_path / "out")[-1]
    assert f"At the end: {last['loss']:.4g}." in html
    assert "step 40" in html


def test_a_stopped_run_leaves_them_too(tmp_path):
    stopped_after(17, synthetic_run("stopped", n_checkpoints=2))
    assert "step 17" in (tmp_path / "stopped" / CURVES_FILENAME).read_text()


def test_a_chart_ends_at_its_values():
    chart = draw_chart("l0", history(l0=[10.0, 20.0, 15.0]))
    assert chart is not None
    (x0, y0), (x1, y1), (x2, y2) = places(chart)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (chart.low, chart.high, chart.end) == ("10", "20", "15")
    assert y1 < y2 < y0  # SVG counts downwards
    assert y2 == pytest.approx((y0 + y1) / 2)
    assert (chart.first, chart.last) == ("10", "30")
    assert not chart.logarithmic


@pytest.mark.parametrize(
    ("value", "ends", "is_low"),
    [(0, ("0", "1"), True), (2.0, ("0", "2"), False), (-3.0, ("-3", "1"), True)],
)
def test_the_axis_of_a_constant_has_two_ends(value, ends, is_low):
    chart = draw_chart("l0", history(l0=[value, value]))
    assert chart is not None
    assert (chart.low, chart.high) == ends
    bottom = places(draw_chart("l0", history(l0=[2.0, 1.0])))[1][1]
    assert all((y == bottom) == is_low for _, y in places(chart))
    assert not chart.logarithmic


def test_a_loss_that_falls_far_has_a_logarithmic_axis():
    chart = draw_chart("loss", history(loss=[100.0, 10.0, 1.0]))
    assert chart is not None
    assert chart.logarithmic
    (_, y0), (_, y1), (_, y2) = places(chart)
    assert y1 - y0 == pytest.approx(y2 - y1)


def test_the_start_of_explained_variance_does_not_hide_its_end():
    chart = draw_chart("explained_variance", history(explained_variance=[-50.0, 0.5, 0.9]))
    assert chart is not None
    assert (chart.low, chart.cut) == ("0", True)


def test_missing_values_are_left_out_and_names_are_escaped():
    rows = history(loss=[1.0, None, 2.0], l0=[None, None, 3.0])
    html = curves_html("<b>odd</b>", {"architecture": "<i>"}, rows)
    assert titles(html) == ["loss"]
    assert "<b>odd" not in html
    assert "<i>" not in html


def test_a_damaged_history_is_read_as_far_as_it_can_be(tmp_path):
    lines = [json.dumps({"step": 1, "loss": 2.0}), json.dumps({"step": 2, "loss": 1.0}), '{"st']
    (tmp_path / HISTORY_FILENAME).write_text("\n".join(lines))
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2]


def test_without_a_history_there_is_no_page(tmp_path):
    write_curves(tmp_path, {})
    assert not (tmp_path / CURVES_FILENAME).exists()


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / HISTORY_FILENAME).write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / CURVES_FILENAME).mkdir()
    with pytest.warns(UserWarning, match=r"cannot write .*training\.html"):
        write_curves(tmp_path, {})
