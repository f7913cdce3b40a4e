import pytest
from sae_lens import SAE

from sae_lens_atm.compare import load_comparison, planned_jobs, read_results, summarise, write_all
from sae_lens_atm.compare.evaluate_saved import data_of, evaluate_saved
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.report.tables import markdown, row_tables
from sae_lens_atm.compare.run.comparison import check
from sae_lens_atm.compare.run.language_model import train_group
from sae_lens_atm.compare.run.probing import add_probing, probing_jobs, task_store
from sae_lens_atm.data import probing_tasks
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import Phase
from tests.probing_package import NAMES, install

PROBES = "sae_probes={tasks: all, max_samples: 300, k: [1, 3]}"
FIGURES = [f"probe_{score}_{on}" for score in ("auc", "accuracy") for on in ("k1", "k3", "raw")]


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory):
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        install(tmp_path_factory.mktemp("site"), patch)
        yield
    probing_tasks.task_names.cache_clear()


def write_yaml(folder, gemma_folder, text_folder):
    path = folder / "probing.yaml"
    path.write_text(
        f"""
runner: language_model
model_name: {gemma_folder}
model_class_name: AutoModelForCausalLM
hook_name: model.layers.1
dataset_path: {text_folder}
is_dataset_tokenized: false
streaming: false
context_size: 16
training_tokens: 640
train_batch_size_tokens: 64
store_batch_size_prompts: 4
n_batches_in_buffer: 4
n_eval_batches: 1
seeds: [0]
l0: [4]
sae: {{d_in: 16, d_sae: 64}}
curve_points: 2
output_path: {folder / "out"}
architectures:
  atm: {{role: candidate, sae: {{schedule_steps: 10, mask_warm_up_steps: 2}}}}
  batchtopk: {{}}
"""
    )
    return path


@pytest.fixture
def yaml(tmp_path, gemma_folder, text_folder):
    return write_yaml(tmp_path, gemma_folder, text_folder)


@pytest.fixture
def comparison(yaml):
    return load_comparison(yaml, [PROBES])


@pytest.fixture(scope="module")
def done(tmp_path_factory, gemma_folder, text_folder):
    """A comparison that was run in this process, which finds the tests' package."""
    path = write_yaml(tmp_path_factory.mktemp("done"), gemma_folder, text_folder)
    comparison = load_comparison(path, [PROBES])
    for job in probing_jobs(comparison.planned, comparison.output):
        job.work(lambda _steps: None, StopFlag())
    train_group(comparison.planned, comparison.output, 2, lambda *_: None, StopFlag())
    return path, comparison, summarise(comparison, {})


def test_the_model_reads_the_tasks_in_a_job_of_its_own(comparison):
    labels = [job.label for job in planned_jobs(comparison)]
    assert labels == ["probing tasks", "seed 0"]
    (job,) = probing_jobs(comparison.planned, comparison.output)
    reported = []
    job.work(reported.append, StopFlag())
    phases = [report for report in reported if isinstance(report, Phase)]
    assert 0 < sum(report for report in reported if report not in phases) <= job.steps
    assert phases[0].what == "loading the language model"
    assert (phases[-1].what, phases[-1].unit) == ("reading", "characters")
    assert 0 < phases[-1].done <= phases[-1].total
    assert [job.label for job in planned_jobs(comparison)] == ["seed 0"]


def test_the_job_stops_before_a_batch(comparison):
    (job,) = probing_jobs(comparison.planned, comparison.output)
    stop = StopFlag()
    stop.request()
    with pytest.raises(Interrupted):
        job.work(lambda _: None, stop)


def test_figures_intervals_and_values_on_tasks_are_in_the_results(done):
    _, _, results = done
    assert results.tasks == NAMES
    for run in results.runs:
        assert set(FIGURES) <= run.figures.keys()
        assert "probe_f1_k1" not in run.figures
        for name in FIGURES:
            low, high = run.intervals[name]
            assert low - 1e-5 <= run.figures[name] <= high + 1e-5
            values = run.by_task[name]
            assert len(values) == len(NAMES)
            assert run.figures[name] == pytest.approx(sum(values) / 3, abs=1e-5)
    raw = {run.figures["probe_auc_raw"] for run in results.runs}
    assert len(raw) == 1
    assert raw.pop() > 0.75
    assert not [test for test in results.tests if "raw" in test.figure]


def test_they_are_in_tables_and_report(done):
    _, comparison, results = done
    json_file, *_ = write_all(results, comparison.output)
    again = read_results(json_file)
    assert [run.by_task for run in again.runs] == [run.by_task for run in results.runs]
    assert "probe AUC, k 3" in (comparison.output / "report.html").read_text()
    (table,) = row_tables(results)
    assert "AUC k1 ↑" in [str(column.header) for column in table.columns]
    assert "probe AUC, no SAE" in markdown(results)


def test_a_saved_sae_is_probed_on_the_stored_activations(done):
    path, comparison, results = done
    run = results.runs[0]
    folder = str(comparison.output / run.folder / "sae")
    found = evaluate_saved([folder], data_of(str(path), [PROBES]))[folder]
    assert found.intervals.keys() == set(FIGURES)
    assert list(found.by_task["probe_f1_k1"]) == NAMES
    assert {"intervals", "by_task"} <= found.as_json().keys()
    for name in FIGURES:
        assert found.figures[name] == pytest.approx(run.figures[name], abs=1e-5)


def test_another_evaluation_needs_no_model_for_the_tasks(done):
    path, comparison, _ = done
    again = load_comparison(path, ["sae_probes={tasks: 1, max_samples: 300, k: [2]}"])
    assert {p.evaluation_key for p in again.planned}.isdisjoint(
        {p.evaluation_key for p in comparison.planned}
    )
    assert {p.training_key for p in again.planned} == {p.training_key for p in comparison.planned}

    def load():
        raise AssertionError

    planned = again.planned[0]
    sae = SAE.load_from_disk(again.output / planned.folder / "sae")
    content = {"figures": {}}
    tasks = []
    add_probing(content, planned, again.output, sae, load, lambda *done: tasks.append(done))
    assert tasks == [(0, 1)]
    assert content["tasks"] == NAMES[:1]
    assert "probe_auc_k2" in content["figures"]


def test_without_the_key_nothing_is_probed(yaml):
    planned = load_comparison(yaml).planned
    content = {"figures": {}}
    add_probing(content, planned[0], yaml.parent, None, None, None)
    assert content == {"figures": {}}
    assert probing_jobs(planned, yaml.parent) == []


def test_a_missing_package_is_one_line_before_anything_runs(comparison, monkeypatch):
    found = probing_tasks.find_spec
    monkeypatch.setattr(
        probing_tasks, "find_spec", lambda name: None if name == "sae_probes" else found(name)
    )
    for first in (check, planned_jobs):
        with pytest.raises(SettingsError, match=r"^sae_probes needs sae-probes: run pip install"):
            first(comparison)


def test_a_task_that_does_not_exist_is_one_line(yaml):
    comparison = load_comparison(yaml, ["sae_probes={tasks: [1_even, 1_evn]}"])
    with pytest.raises(SettingsError, match=r"sae_probes.tasks: .* no task '1_evn'"):
        check(comparison)


@pytest.mark.parametrize(
    ("value", "message"),
    {
        "{k: [0]}": "sae_probes.k must be above 0, got [0]",
        "{k: 3}": "sae_probes.k must be a valid list, got 3",
        "{tasks: some}": "sae_probes.tasks",
        "{taks: 3}": "sae_probes.taks: unknown key, did you mean 'tasks'?",
        "{max_samples: 100}": "sae_probes.max_samples must be at least 256, got 100",
    }.items(),
)
def test_mistakes_are_one_line(yaml, value, message):
    with pytest.raises(SettingsError) as caught:
        load_comparison(yaml, [f"sae_probes={value}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tasks_need_a_language_model(comparison_yaml):
    with pytest.raises(SettingsError, match="sae_probes: allowed only with"):
        load_comparison(comparison_yaml, ["sae_probes={}"])


def test_a_sweep_can_be_ordered_by_a_figure_of_the_tasks(yaml):
    sweep = "sweep={over: {lr: [1e-3, 1e-2]}, objective: probe_auc_k5}"
    assert load_sweep(yaml, ["sae_probes={}", sweep]).sweep.objective == "probe_auc_k5"
    with pytest.raises(SettingsError, match=r"sweep\.objective"):
        load_sweep(yaml, [sweep])


def test_the_store_is_in_the_folder_of_the_comparison(comparison):
    store = task_store(comparison.planned[0], comparison.output)
    assert store.tasks == NAMES
    assert comparison.output / "sae-probes" in store._home.parents
