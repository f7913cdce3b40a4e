import pytest

from sae_lens_atm.compare.report.notes import about_letters, measurement_notes, short_of_l0
from sae_lens_atm.compare.report.results import LetterFacts
from tests.compare.sample import measured_on_words


def facts(**given):
    settings = {"min_f1": 0.6, "match_l0": False} | given.pop("settings", {})
    fields = {
        "metric": "SAEBench 0.6.0",
        "words": 4000,
        "test_words": 800,
        "words_hash": "a1",
        "words_by_letter": [],
        "probe_f1_by_letter": [],
        "letters_above": 24,
        "settings": settings,
    }
    return LetterFacts(**(fields | given))


def test_words_and_probes_are_told():
    assert about_letters(facts()) == (
        "First letters: 4,000 words, 800 of them test words; 24 of 26 letters have a probe with an "
        "F1 above 0.6."
    )
    assert about_letters(facts(model_seed=3)).startswith("First letters, model 3: ")


def test_too_few_letters_are_told():
    text = about_letters(facts(letters_above=19))
    assert text.endswith("above 0.6, fewer than 20, so absorption is not measured.")


@pytest.mark.parametrize(("match", "shown"), [(True, "the target L0"), (16.0, "L0 16")])
def test_a_matched_l0_is_told(match, shown):
    text = about_letters(facts(settings={"match_l0": match}))
    assert text.endswith(f"; on the words, only the largest activations are kept, at most {shown}.")


def test_the_definition_stands_below_tables_with_absorption():
    results = measured_on_words()
    definition, intervals = measurement_notes(results)
    assert definition == "Absorption is defined as in SAEBench 0.6.0."
    assert intervals.startswith("[low, high]: 95% interval")
    results.absorption_metric = ""
    for row in results.rows:
        row.intervals = {}
    assert measurement_notes(results) == []


@pytest.mark.parametrize(
    ("metric", "over", "same"),
    [("", "tasks", "tasks"), ("SAEBench 0.6.0", "test words or tasks", "words or tasks")],
)
def test_tasks_are_told_and_what_is_resampled(metric, over, same):
    results = measured_on_words()
    results.absorption_metric, results.tasks = metric, ["a", "b"]
    *_, probes, intervals = measurement_notes(results)
    assert probes.startswith("Probes: 2 tasks of sae-probes.")
    assert f"95% interval over resampled {over}, a bootstrap" in intervals
    assert f"on the same {same}," in intervals


@pytest.mark.parametrize(
    ("match", "listed"), [(False, []), (True, ["topk at L0 4 (3.7)"]), (3.0, [])]
)
def test_saes_with_fewer_active_latents_than_asked_for_are_listed(match, listed):
    results = measured_on_words()  # L0s on words of 4 and 3.7 at target 4
    results.first_letters = [facts(settings={"match_l0": match})]
    assert short_of_l0(results) == listed
    note = "Fewer latents fire on the words than asked for: topk at L0 4 (3.7)."
    assert (note in measurement_notes(results)) == bool(listed)
