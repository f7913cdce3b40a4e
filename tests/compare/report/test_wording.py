# ruff: noqa: RUF001  (dashes and minus signs, as a page shows them)

import math

import pytest

from sae_lens_atm.compare.report import results, wording
from tests.compare.sample import entries_of, row, sample


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.12345, 3, "0.123"),
        (-0.5, 2, "−0.50"),
        (12345.6, 0, "12,346"),
        (0.0, 3, "0.000"),
        (0.00012, 3, "1e−04"),
        (0.0006, 3, "0.001"),
        (None, 3, "–"),
        (math.nan, 3, "–"),
        (math.inf, 3, "–"),
    ],
)
def test_numbers_are_shown_with_the_figures_digits(value, digits, text):
    assert wording.show(value, digits) == text


def test_a_difference_has_its_sign():
    shown = [wording.show(value, 2, "+") for value in (0.25, -0.25, 0.0)]
    assert shown == ["+0.25", "−0.25", "0.00"]


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [(0.5, 0.01, "0.50 ± 0.01"), (0.5, None, "0.50"), (None, None, "–"), (math.nan, 0.1, "–")],
)
def test_a_spread_without_a_deviation_is_a_number(mean, sd, text):
    assert wording.show_spread(results.Spread(mean=mean, sd=sd, n=2), 2) == text


@pytest.mark.parametrize(
    ("p", "text"), [(0.0004, "<0.001"), (0.0312, "0.031"), (1.0, "1.000"), (None, "–")]
)
def test_p(p, text):
    assert wording.show_p(p) == text


def test_headings_say_which_way_is_better():
    names = ("mcc", "absorption_full", "l0", "odd_extra")
    assert [wording.heading(name) for name in names] == [
        "MCC\N{NO-BREAK SPACE}↑",
        "absorption, full\N{NO-BREAK SPACE}↓",
        "L0",
        "odd extra",
    ]


def test_numbers_have_five_digits_or_are_none():
    values = [wording.clean(value) for value in (0.123456, 123456.0, None, math.nan, math.inf)]
    assert values == [0.12346, 123460.0, None, None, None]


def test_a_mean_leaves_out_what_is_not_a_number():
    assert wording.mean([1.0, None, math.nan, 2.0]) == 1.5
    assert wording.mean([None, math.inf]) is None


def test_marks_of_rows():
    off, fine = row("a", 0.5, matched=False), row("a", 0.5)
    moving = fine.model_copy(update={"moving": True})
    assert [len(wording.marks(r)) for r in (fine, off, moving)] == [0, 1, 1]
    assert wording.marks(off) != wording.marks(moving)


def test_windows_of_dead_latents():
    comparison = sample()
    assert wording.training_window(comparison) == "last 200 steps"
    assert wording.evaluation_window(comparison) == "50,000 evaluated samples"
    comparison.entries["topk"].settings["trainer"]["dead_feature_window"] = 1000
    comparison.runs[0].figures["evaluated_samples"] = 20_000
    comparison.config["runner"] = "language_model"
    assert wording.training_window(comparison) == "last 200 to 1,000 steps"
    assert wording.evaluation_window(comparison) == "20,000 to 50,000 evaluated tokens"
    comparison.runs[0].figures["dead_window"] = 70_000
    assert wording.evaluation_window(comparison) == "50,000 to 70,000 evaluated tokens"


def test_windows_of_results_without_lengths():
    comparison = sample()
    for entry in comparison.entries.values():
        entry.settings = {}
    for run in comparison.runs:
        run.figures.pop("evaluated_samples", None)
    assert wording.training_window(comparison) == "last dead_feature_window steps"
    assert wording.evaluation_window(comparison) == "evaluated samples"


def test_candidates_come_first_and_controls_last():
    entries = entries_of(c="control", b="baseline", a="candidate", d="baseline")
    assert wording.in_order(entries) == ["a", "b", "d", "c"]
