import pytest
import yaml

from sae_lens_atm.compare import load_comparison, planned_jobs
from sae_lens_atm.compare.run.batch_pool import model_folder
from sae_lens_atm.compare.run.stored_run import FIGURES, TRAINING
from sae_lens_atm.compare.run.synthetic import pool_of
from sae_lens_atm.compare.run.tasks import make_jobs, needs_cosine_map, steps_of
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.files import write_json
from sae_lens_atm.training.hooks import StopFlag


def labels(jobs):
    return [job.label for job in jobs]


def test_a_pool_for_each_seed_comes_before_the_runs(comparison_yaml):
    comparison = load_comparison(comparison_yaml)
    models, pools, runs = make_jobs(comparison)
    assert models == []
    assert labels(pools) == ["40 batches of 64, seed 0", "40 batches of 64, seed 1"]
    assert labels(runs) == [p.label for p in comparison.planned]
    assert [job.steps for job in runs] == [40, 40, 40, 40, 40, 40, 0, 0] * 2
    assert labels(planned_jobs(comparison)) == labels(pools + runs)


def test_stored_runs_are_left_out(comparison_yaml):
    comparison = load_comparison(comparison_yaml, ["seeds=[0]", "l0=[2, 3]"])
    trained, evaluated, other = comparison.planned[:3]
    for planned in (trained, evaluated):
        (comparison.output / planned.folder).mkdir(parents=True)
        write_json(comparison.output / planned.folder / TRAINING, {})
    (comparison.output / trained.folder / "sae").mkdir()
    write_json(comparison.output / trained.folder / "sae/cfg.json", {})
    figures = {"evaluation_key": evaluated.evaluation_key, "cosine_map": "iVBORw"}
    write_json(comparison.output / evaluated.folder / FIGURES, figures)
    _, _, runs = make_jobs(comparison)
    steps = {job.label: job.steps for job in runs}
    assert evaluated.label not in steps
    assert steps[trained.label] == 0  # evaluation is left to do
    assert steps[other.label] == 40


def test_a_slow_synthetic_model_is_made_first(comparison_yaml):
    content = yaml.safe_load(comparison_yaml.read_text())
    del content["hierarchy_model"]
    content["synthetic_model"] = {"num_features": 24, "hidden_dim": 16}
    comparison_yaml.write_text(yaml.safe_dump(content))
    comparison = load_comparison(comparison_yaml)
    models, *_ = make_jobs(comparison)
    assert labels(models) == ["synthetic model"]
    models[0].work(lambda _steps: None, StopFlag())
    assert model_folder(comparison.planned[0].run, comparison.output).is_dir()
    assert make_jobs(comparison)[0] == []


def test_drawing_a_pool_can_be_stopped_and_starts_again(comparison_yaml):
    comparison = load_comparison(comparison_yaml, ["seeds=[0]"])
    _, (job,), _ = make_jobs(comparison)
    stop = StopFlag()
    stop.request(15)
    with pytest.raises(Interrupted):
        job.work(lambda _steps: None, stop)
    pool = pool_of(comparison.planned[0], comparison.output)
    assert not pool.path.exists()
    reported = []
    job.work(reported.append, StopFlag())
    assert reported == [25]
    assert pool.path.exists()
    assert make_jobs(comparison)[1] == []


def test_a_language_model_has_a_job_for_each_group(language_model_comparison_yaml):
    comparison = load_comparison(language_model_comparison_yaml)
    models, readings, runs = make_jobs(comparison)
    assert models == readings == []
    assert labels(runs) == ["seed 0", "seed 1"]
    assert [job.steps for job in runs] == [60, 60]  # three trained entries and one control
    apart = load_comparison(
        language_model_comparison_yaml,
        ["seeds=[0]", "architectures.gated.run={train_batch_size_tokens: 32}"],
    )
    *_, runs = make_jobs(apart)
    assert labels(runs) == ["seed 0", "seed 0, train_batch_size_tokens 32"]


def test_controls_have_no_steps(comparison_yaml):
    steps = {p.entry: steps_of(p) for p in load_comparison(comparison_yaml).planned}
    assert steps == {"atm": 40, "topk": 40, "jumprelu": 40, "untrained": 0}


def test_one_run_of_each_entry_has_a_picture_of_cosines(comparison_yaml):
    comparison = load_comparison(comparison_yaml, ["l0=[2, 3, 4]", "seeds=[5, 6]"])
    with_map = [p for p in comparison.planned if needs_cosine_map(comparison, p)]
    assert [(p.entry, p.l0, p.seed) for p in with_map] == [
        (entry, 3, 5) for entry in ("atm", "topk", "jumprelu", "untrained")
    ]
