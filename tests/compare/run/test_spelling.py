import pytest
from sae_lens import SAE

from sae_lens_atm.compare import compare, load_comparison, planned_jobs
from sae_lens_atm.compare.evaluate_saved import data_of, evaluate_saved
from sae_lens_atm.compare.report.results import Entry, Run
from sae_lens_atm.compare.report.summary import make_rows, make_tests
from sae_lens_atm.compare.report.tables import markdown, row_tables
from sae_lens_atm.errors import SettingsError
from tests.compare.silent import Silent


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    path = tmp_path_factory.mktemp("spelling") / "spelling.yaml"
    path.write_text(
        f"""
runner: language_model
seeds: [0, 1]
l0: [4]
spelling_lm: {{seeds: [3, 4], words_per_letter: 8, layers: 2, d_model: 8, heads: 2, steps: 3,
               batch_size: 4, dataset_rows: 64}}
first_letters: {{probe_epochs: 2, sparse_batch_size: 64}}
sae: {{d_in: 8, d_sae: 32}}
training_tokens: 1280
train_batch_size_tokens: 64
store_batch_size_prompts: 4
n_batches_in_buffer: 4
n_eval_batches: 2
curve_points: 4
output_path: {path.parent / "out"}
architectures:
  atm: {{role: candidate, sae: {{schedule_steps: 20, mask_warm_up_steps: 5}}}}
  batchtopk: {{}}
  untrained: {{architecture: topk, role: control, trained: false}}
"""
    )
    return path


@pytest.fixture(scope="module")
def results(yaml):
    return compare(load_comparison(yaml), 2, Silent())


def test_every_sae_is_trained_on_every_model(results):
    assert not results.failed
    runs = {(run.entry, run.model_seed, run.seed) for run in results.runs}
    entries = ("atm", "batchtopk", "untrained")
    assert runs == {(e, model, seed) for e in entries for model in (3, 4) for seed in (0, 1)}


@pytest.mark.usefixtures("results")
def test_models_are_made_once_and_runs_of_one_model_and_seed_together(yaml):
    labels = [job.label for job in planned_jobs(load_comparison(yaml, ["output_path=elsewhere"]))]
    letters = [f"first letters, model {model}" for model in (3, 4)]
    groups = [f"model {model}, seed {seed}" for seed in (0, 1) for model in (3, 4)]
    assert labels == ["model 3", "model 4", *letters, *groups]
    assert not planned_jobs(load_comparison(yaml))
    again = planned_jobs(load_comparison(yaml, ["first_letters.seed=1"]))
    assert [job.label for job in again] == [*letters, *groups]
    assert [job.steps for job in again[2:]] == [0] * 4
    # The words and probes are those that are stored.
    again = planned_jobs(load_comparison(yaml, ["first_letters.match_l0=true"]))
    assert [job.label for job in again] == groups


def test_another_model_is_another_training(yaml):
    def keys(*overrides):
        return {p.training_key for p in load_comparison(yaml, overrides).planned}

    assert len(keys()) == 12
    assert not keys() & keys("spelling_lm.steps=4")
    assert keys() == keys("output_path=elsewhere", "first_letters.seed=1")


def test_first_letters_are_among_the_figures(results):
    for run in results.runs:
        assert {"absorption_fraction", "probe_f1", "k1_f1", "ce_loss_score"} <= run.figures.keys()
        assert len(run.absorption_by_parent) == 26
    assert len(results.parents) == 26
    assert sum(parent.probability for parent in results.parents) == pytest.approx(1, abs=1e-4)


def test_words_probes_and_intervals_are_among_the_results(results):
    assert results.absorption_metric == "SAEBench 0.6.0"
    assert [letters.model_seed for letters in results.first_letters] == [3, 4]
    for letters in results.first_letters:
        assert sum(letters.words_by_letter) == letters.words
        assert letters.test_words == letters.words - int(0.8 * letters.words)
        assert letters.letters_above == sum(f1 > 0.6 for f1 in letters.probe_f1_by_letter)
        assert letters.settings["words"] == 4000
    assert len({letters.words_hash for letters in results.first_letters}) == 1
    for run in results.runs:
        assert run.intervals.keys() < run.figures.keys()
        low, high = run.intervals["l0_words"]
        assert 0 < low <= run.figures["l0_words"] <= high
    row = results.rows[0]
    ends = [run.intervals["l0_words"][1] for run in results.runs if run.entry == row.entry]
    assert row.intervals["l0_words"][1] == pytest.approx(sum(ends) / len(ends))


def test_stability_is_of_saes_on_one_model(results):
    row = next(row for row in results.rows if row.entry == "batchtopk")
    assert row.figures["stability"].n == 2
    assert row.figures["l0"].n == 4


def test_a_saved_sae_is_evaluated_on_the_first_model(yaml, results):
    run = next(run for run in results.runs if (run.model_seed, run.seed) == (3, 0))
    folder = str(yaml.parent / "out" / run.folder / "sae")
    assert SAE.load_from_disk(folder).cfg.d_in == 8
    found = evaluate_saved([folder], data_of(str(yaml)))[folder]
    for name in ("l0", "l0_words", "k1_f1", "sparse_probing_2", "feature_splits"):
        kept = run.figures[name]
        assert kept is None or found.figures[name] == pytest.approx(kept, rel=1e-4)
    assert found.intervals["l0_words"] == pytest.approx(run.intervals["l0_words"], rel=1e-4)
    assert found.as_json()["first_letters"]["words_hash"] == results.first_letters[0].words_hash


@pytest.mark.usefixtures("results")
def test_matched_l0_needs_a_target_for_a_saved_sae(yaml):
    data = data_of(str(yaml), ["first_letters.match_l0=true"])
    with pytest.raises(SettingsError, match=r"^first_letters\.match_l0 must be a number"):
        evaluate_saved(["nowhere"], data)


@pytest.mark.usefixtures("results")
def test_first_letters_that_cannot_be_read_stop_the_comparison(yaml):
    found = compare(load_comparison(yaml, ["first_letters.words=20"]), 2, Silent())
    assert sorted(found.failed) == ["first letters, model 3", "first letters, model 4"]
    assert "there are 20 words" in found.failed["first letters, model 3"]
    assert not found.runs


def test_tests_pair_language_models_not_seeds():
    def run(entry, model, seed, value):
        return Run(
            entry=entry, l0_target=4, seed=seed, model_seed=model, figures={"f1": value, "l0": 4.0},
            matched=True, moving=False,
        )  # fmt: skip

    gains = {(0, 0): 0.1, (0, 1): 0.3, (1, 0): 0.4, (1, 1): 0.4}
    runs = [run("atm", *unit, 0.5 + gain) for unit, gain in gains.items()]
    runs += [run("topk", *unit, 0.5) for unit in gains]
    roles = {"atm": "candidate", "topk": "baseline"}
    entries = {
        name: Entry(architecture=name, role=role, l0_parameter="k", settings={})
        for name, role in roles.items()
    }
    rows = make_rows(runs, {})
    test = next(t for t in make_tests(runs, rows, entries) if t.figure == "f1")
    assert (test.n, test.difference) == (2, pytest.approx(0.3))
    assert test.p == pytest.approx(0.2048, abs=1e-3)  # t = 0.3 / (0.1414 / sqrt 2) = 3, 1 degree


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "spelling_lm.seeds=[]": "spelling_lm.seeds must be a list",
        "spelling_lm.steps=0": "spelling_lm.steps",
        "spelling_lm.step=4": "spelling_lm.step: unknown key, did you mean 'steps'?",
        "first_letters.probe_lr=0": "first_letters.probe_lr",
        "model_name=gpt2": "model_name cannot be set",
        "sae.d_in=16": "sae.d_in must be 8",
        "activations={cache: kept}": "activations: not allowed beside spelling_lm",
    }.items(),
)
def test_mistakes_are_one_line(yaml, override, message):
    with pytest.raises(SettingsError) as caught:
        load_comparison(yaml, [override])
    assert message in str(caught.value)


def test_first_letters_need_a_language_model(comparison_yaml):
    with pytest.raises(SettingsError, match="first_letters: "):
        load_comparison(comparison_yaml, ["first_letters={}"])


def test_tables_show_the_figures_of_probes_beside_absorption(results):
    (table,) = row_tables(results)
    assert "4 runs, 2 seeds on each language model" in str(table.title)
    heads = [str(column.header) for column in table.columns]
    assert {"abs. frac. ↓", "probe F1", "k1 F1 ↑", "CE rec. ↑"} <= set(heads)
    head = markdown(results).splitlines()[0]
    for label in (
        "letter probes, F1",
        "best latent, F1",
        "sparse probing, k 5",
        "fraction, learned",
    ):
        assert label in head
