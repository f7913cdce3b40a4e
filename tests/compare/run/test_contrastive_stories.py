import pytest
from datasets import Dataset

from sae_lens_atm.compare import load_comparison, summarise, write_all
from sae_lens_atm.compare.evaluate_saved import data_of, evaluate_saved
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.report.tables import markdown
from sae_lens_atm.compare.run.comparison import check
from sae_lens_atm.compare.run.language_model import train_group
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.hooks import StopFlag


@pytest.fixture
def dataset(tmp_path):
    rows = [{"story1": f"w1 w{i} w2", "story2": f"w{i} w40 w41"} for i in range(5, 12)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "stories"))
    return f"contrastive_stories={{dataset: {tmp_path / 'stories'}, pairs: 4}}"


@pytest.fixture
def yaml(language_model_comparison_yaml):
    return language_model_comparison_yaml


def test_the_score_is_in_results_tables_and_of_a_saved_sae(yaml, dataset):
    comparison = load_comparison(yaml, [dataset, "seeds=[0]"])
    check(comparison)
    train_group(comparison.planned, comparison.output, 2, lambda *_: None, StopFlag())
    results = summarise(comparison, {})
    for run in results.runs:
        assert run.figures["contrastive_score"] > 0
    assert "contrastive ↑" in markdown(results)
    write_all(results, comparison.output)
    assert "contrastive" in (comparison.output / "report.html").read_text()
    run = results.runs[0]
    folder = str(comparison.output / run.folder / "sae")
    found = evaluate_saved([folder], data_of(str(yaml), [dataset]))[folder]
    expected = run.figures["contrastive_score"]
    assert found.figures["contrastive_score"] == pytest.approx(expected, abs=1e-5)


def test_the_key_changes_the_evaluation_and_not_the_training(yaml, dataset):
    without, with_key = (load_comparison(yaml, more).planned[0] for more in ([], [dataset]))
    assert without.contrastive_stories is None
    assert without.evaluation_key != with_key.evaluation_key
    assert without.training_key == with_key.training_key


def test_a_dataset_that_cannot_be_read_stops_the_check(yaml):
    comparison = load_comparison(yaml, ["contrastive_stories={dataset: not/there}"])
    with pytest.raises(SettingsError, match=r"^contrastive_stories\.dataset must be .*'not/there'"):
        check(comparison)


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "{pairs: 0}": "contrastive_stories.pairs must be above 0, got 0",
        "{pair: 3}": "contrastive_stories.pair: unknown key, did you mean 'pairs'?",
        "{dataset: [a]}": "contrastive_stories.dataset must be a valid string, got ['a']",
    }.items(),
)
def test_mistakes_are_one_line(yaml, value, message):
    with pytest.raises(SettingsError) as caught:
        load_comparison(yaml, [f"contrastive_stories={value}"])
    assert str(caught.value) == message


def test_stories_need_a_language_model(comparison_yaml):
    with pytest.raises(SettingsError, match="contrastive_stories: allowed only with"):
        load_comparison(comparison_yaml, ["contrastive_stories={}"])


def test_a_sweep_can_be_ordered_by_the_score(yaml, dataset):
    sweep = "sweep={over: {lr: [1e-3, 1e-2]}, objective: contrastive_score}"
    assert load_sweep(yaml, [dataset, sweep]).sweep.objective == "contrastive_score"
    with pytest.raises(SettingsError, match=r"sweep\.objective"):
        load_sweep(yaml, [sweep])


def test_the_folder_of_a_sweep_becomes_absolute(yaml, tmp_path):
    (tmp_path / "stories").mkdir()
    sweep = "sweep={over: {lr: [1e-3]}, objective: explained_variance}"
    for given, expected in (("stories", str(tmp_path / "stories")), ("on/hub", "on/hub")):
        overrides = [f"contrastive_stories={{dataset: {given}}}", sweep]
        planned = load_sweep(yaml, overrides, absolute_paths=True).planned[0]
        assert planned.contrastive_stories.dataset == expected
