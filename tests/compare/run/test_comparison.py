"""Whole comparisons of few steps."""

import json
import math
import shutil
import signal
from itertools import combinations

import pytest
import torch
from filelock import FileLock
from sae_lens import SAE

from sae_lens_atm.compare import compare, load_comparison, planned_jobs, read_results
from sae_lens_atm.compare.report.html import write_all
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.compare.run.comparison import summarise
from sae_lens_atm.compare.run.tasks import make_jobs
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.metrics import stability
from sae_lens_atm.training.hooks import StopFlag


class Events:
    """Records the jobs that ended, and requests a stop after some steps."""

    def __init__(self, stop=None, after=0):
        self.done = []
        self._stop, self._left = stop, after

    def started(self, _job):
        pass

    def advanced(self, _job, steps):
        self._left -= steps
        if self._stop is not None and self._left <= 0:
            self._stop.request(signal.SIGINT)

    def is_in(self, _job, _phase):
        pass

    def ended(self, job, error):
        assert error is None, error
        self.done.append(job.label)


def run_here(comparison, stop_after=math.inf):
    """Run all jobs in this process, and request a stop after some steps (a multiple of 25)."""
    stop, left = StopFlag(), stop_after

    def on_progress(progress):
        nonlocal left
        left -= progress if isinstance(progress, int) else 0
        if left <= 0:
            stop.request(signal.SIGINT)

    for jobs in make_jobs(comparison):
        for job in jobs:
            job.work(on_progress, stop)
    return summarise(comparison, {})


def warnings_of_masks(comparison, recwarn):
    check(comparison)
    return [str(w.message) for w in recwarn if "will be masked" in str(w.message)]


def test_an_entry_that_never_masks_is_announced(comparison_yaml, recwarn):
    assert warnings_of_masks(load_comparison(comparison_yaml), recwarn) == []
    entries = [
        "architectures.late={architecture: atm, sae: {mask_warm_up_steps: 99, mask_end: 1}}",
        "architectures.ends={architecture: atm, sae: {schedule_steps: 40, mask_warm_up_steps: 30}}",
        "architectures.off={architecture: atm, sae: {mask_rate: 0}}",
        "architectures.never={architecture: atm, trained: false}",
    ]
    assert warnings_of_masks(load_comparison(comparison_yaml, entries), recwarn) == [
        "late: no latent will be masked: masking begins at step 99 (mask_warm_up_steps), and the "
        "run ends after 40 steps",
        "ends: no latent will be masked: masking begins at step 30 (mask_warm_up_steps), and "
        "mask_end ends it at step 24",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small comparison, run once for all tests that only look at it."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def results(finished, comparison_yaml):
    return compare(load_comparison(comparison_yaml, [f"output_path={finished}"]), 2, Events())


def test_everything_is_there(results, finished):
    assert results.failed == {}
    assert len(results.runs) == 16
    assert [(row.entry, row.l0_target, row.seeds) for row in results.rows] == [
        (entry, l0, [0, 1])
        for entry in ("atm", "topk", "jumprelu", "untrained")
        for l0 in (2.0, 3.0)
    ]
    for run in results.runs:
        wanted = {"l0", "explained_variance", "mse", "cosine", "mcc", "absorption_fraction"}
        assert wanted <= run.figures.keys()
        assert len(run.absorption_by_parent) == len(results.parents) == 4
        trained = run.entry != "untrained"
        assert (run.curve is not None) == trained
        assert (run.importance is not None) == (run.entry == "atm")
        if trained:
            assert run.curve.steps == [10, 20, 30, 40]
            assert run.curve.dead_latents[0] >= 0
            assert {"seconds", "step_ms", "peak_memory_mib"} <= run.figures.keys()
            assert len(run.curve.coefficient) == (4 if run.entry == "jumprelu" else 0)
        saved = SAE.load_from_disk(finished / run.folder / "sae")
        assert saved.cfg.architecture() in ("jumprelu", "topk")
    assert [run.entry for run in results.runs if run.cosine_map] == [
        "atm",
        "topk",
        "jumprelu",
        "untrained",
    ]
    assert {parent.depth for parent in results.parents} == {0}
    # firing probabilities .25 to .04, as the hierarchy has them
    assert results.parents[0].probability == pytest.approx(0.25, abs=0.06)


def test_settings_seeds_and_versions_are_recorded(results):
    atm = results.entries["atm"]
    assert (atm.role, atm.l0_parameter, atm.architecture) == ("candidate", "k", "atm")
    assert atm.settings["sae"]["mask_rate"] == 1.0
    assert results.entries["jumprelu"].settings["trainer"]["lr"] == 3e-3
    assert results.entries["jumprelu"].l0_parameter == "l0, controlled"
    assert {"sae-lens", "sae-lens-atm", "torch", "python"} == results.versions.keys()
    assert results.config["seeds"] == [0, 1]


def test_matched_compares_the_measured_l0(results):
    for run in results.runs:
        off = abs(run.figures["l0"] / run.l0_target - 1)
        assert run.matched == (off <= 0.05)
    assert all(run.matched for run in results.runs if run.entry == "topk")
    # 40 steps do not bring an L1 or L0 penalty anywhere
    assert not any(run.matched for run in results.runs if run.entry == "jumprelu")


def test_stability_compares_the_saved_saes(results, finished):
    for row in results.rows:
        runs = [r for r in results.runs if (r.entry, r.l0_target) == (row.entry, row.l0_target)]
        saes = [SAE.load_from_disk(finished / run.folder / "sae") for run in runs]
        found = row.figures["stability"]
        assert found.n == len(list(combinations(saes, 2))) == 1
        if row.entry == "untrained":  # where all latents fire
            expected = stability(saes[0].W_dec, saes[1].W_dec)
            assert found.mean == pytest.approx(expected, abs=0.05)
        assert 0 < found.mean <= 1


def test_results_stay_when_the_saes_are_removed(results, finished, comparison_yaml, tmp_path):
    """As when the JSON files of the runs are copied to another machine."""
    output = tmp_path / "copied"
    for run in results.runs:
        (output / run.folder).mkdir(parents=True)
        for name in ("training.json", "figures.json"):
            shutil.copyfile(finished / run.folder / name, output / run.folder / name)
    comparison = load_comparison(comparison_yaml, [f"output_path={output}"])
    assert planned_jobs(comparison) == []
    copied = summarise(comparison, {})
    assert copied.runs == results.runs
    for row, before in zip(copied.rows, results.rows, strict=True):
        assert "stability" not in row.figures
        assert row.figures == {k: v for k, v in before.figures.items() if k != "stability"}
    # A run that must be evaluated again is trained again.
    changed = load_comparison(comparison_yaml, [f"output_path={output}", "eval_samples=501"])
    steps = [job.steps for job in planned_jobs(changed) if "L0" in job.label]
    assert sorted(steps) == [0] * 4 + [40] * 12
    # The picture of another run cannot be drawn without its SAE, and is not asked for.
    fewer = load_comparison(comparison_yaml, [f"output_path={output}", "l0=[3]"])
    assert planned_jobs(fewer) == []
    # Stability needs more than the SAEs.
    for run in results.runs:
        shutil.copytree(finished / run.folder / "sae", output / run.folder / "sae")
    assert not any("stability" in row.figures for row in summarise(comparison, {}).rows)


def test_nothing_is_left_to_do_and_nothing_changes(results, finished, comparison_yaml):
    comparison = load_comparison(comparison_yaml, [f"output_path={finished}"])
    assert planned_jobs(comparison) == []
    again = compare(comparison, 2, Events())
    assert again.runs == results.runs
    assert not (finished / "pools").exists()
    assert not list(finished.glob("runs/*/checkpoints"))


def test_the_files_are_written_and_redrawn(results, finished):
    names = {path.name for path in write_all(results, finished)}
    assert names == {
        "results.json",
        "results.csv",
        "tables.md",
        "report.html",
        "pareto.png",
        "importance.png",
    }
    again = read_results(finished / "results.json")
    assert [row.entry for row in again.rows] == [row.entry for row in results.rows]
    for name in ("pareto.png", "importance.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_a_change_reruns_only_what_it_changes(results, finished, comparison_yaml, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")

    def left(*overrides):
        return [
            job.label
            for job in planned_jobs(
                load_comparison(comparison_yaml, ["output_path=copy", *overrides])
            )
        ]

    one = left("architectures.topk.sae.aux_loss_coefficient=0.5", "seeds=[0]")
    assert one == ["40 batches of 64, seed 0", "topk, L0 2, seed 0", "topk, L0 3, seed 0"]
    # other samples to evaluate on: everything is evaluated again, and nothing trained
    comparison = load_comparison(
        comparison_yaml, ["output_path=copy", "eval_samples=600", "seeds=[0]", "l0=[2]"]
    )
    jobs = planned_jobs(comparison)
    assert [job.steps for job in jobs] == [0, 0, 0, 0]
    before = {r.entry: r for r in results.runs if (r.seed, r.l0_target) == (0, 2.0)}
    for run in compare(comparison, 2, Events()).runs:
        assert run.curve == before[run.entry].curve
        assert run.figures["mcc"] == pytest.approx(before[run.entry].figures["mcc"])
        assert run.figures["mse"] != before[run.entry].figures["mse"]


def test_runs_of_a_seed_see_the_same_batches(comparison_yaml, tmp_path):
    """Entries with equal settings give equal SAEs, and other seeds give others.

    The runs have 20.5 batches from a pool of 8, and a checkpoint on the way."""
    again = ["architectures.again.architecture=topk", "l0=[2]", "pool_batches=8"]
    odd = ["training_samples=1312", "n_checkpoints=3", "architectures.atm.trained=false"]
    comparison = load_comparison(comparison_yaml, [*again, *odd])
    results = compare(comparison, 2, Events())
    found = {
        (run.entry, run.seed): SAE.load_from_disk(tmp_path / "out" / run.folder / "sae").W_dec
        for run in results.runs
    }
    assert torch.equal(found["topk", 0], found["again", 0])
    assert torch.equal(found["topk", 1], found["again", 1])
    assert not torch.equal(found["topk", 0], found["topk", 1])


def test_activations_are_normalised_before_training(comparison_yaml, tmp_path):
    """The norm is estimated on batches of its own, and not again when a run resumes."""
    norm = ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=20"]
    short = [*norm, "l0=[2]", "seeds=[0]", "training_samples=6400"]
    short += ["architectures.jumprelu.trained=false"]
    straight = run_here(load_comparison(comparison_yaml, [*short, "output_path=a"]))
    comparison = load_comparison(comparison_yaml, [*short, "output_path=b"])
    with pytest.raises(Interrupted):
        run_here(comparison, stop_after=130)  # the pool has 100 steps
    (_,) = (tmp_path / "b").glob("runs/*/checkpoints/*/history.pt")
    halted = run_here(comparison)
    for one, other in zip(straight.runs, halted.runs, strict=True):
        first, second = (
            SAE.load_from_disk(tmp_path / name / run.folder / "sae").W_dec
            for name, run in (("a", one), ("b", other))
        )
        assert torch.equal(first, second), one.entry


def test_two_comparisons_do_not_share_a_folder(comparison_yaml, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(SettingsError, match="output_path"):
        compare(load_comparison(comparison_yaml), 2, Events())


def weights(folder):
    return {
        path.parent.parent.name: SAE.load_from_disk(path.parent).state_dict()
        for path in folder.glob("runs/*/sae/cfg.json")
    }


def test_an_interrupted_comparison_resumes_bit_for_bit(comparison_yaml, tmp_path):
    """Runs are stopped on the way. What resumes includes an L0 controller and ATM's state."""
    short = ["seeds=[0]", "l0=[2]", "training_samples=6400"]
    straight = load_comparison(comparison_yaml, [*short, "output_path=straight"])
    whole = run_here(straight)
    comparison = load_comparison(comparison_yaml, [*short, "output_path=halting"])
    # The pool has 100 steps, and so has each of three runs: one is stopped in each of three calls.
    for entry in ("atm", "topk", "jumprelu"):
        with pytest.raises(Interrupted):
            run_here(comparison, stop_after=110)
        assert (
            len(list((tmp_path / "halting").glob(f"runs/{entry}*/checkpoints/*/history.pt"))) == 1
        )
    halted = run_here(comparison)
    expected, resumed = weights(tmp_path / "straight"), weights(tmp_path / "halting")
    assert expected.keys() == resumed.keys()
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(value, resumed[name][key]), (name, key)
    for one, other in zip(whole.runs, halted.runs, strict=True):
        assert one.curve == other.curve
        assert one.importance == other.importance
        costs = {"seconds", "step_ms", "peak_memory_mib"}
        assert {k: v for k, v in one.figures.items() if k not in costs} == {
            k: v for k, v in other.figures.items() if k not in costs
        }


def test_a_run_that_fails_is_reported_and_leaves_the_others(comparison_yaml, tmp_path):
    class IgnoreErrors(Events):
        def ended(self, _job, _error):
            pass

    comparison = load_comparison(comparison_yaml, ["seeds=[0]", "l0=[2]"])
    bad = next(p for p in comparison.planned if p.entry == "topk")
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out" / bad.folder).write_text("in the way")
    found = compare(comparison, 2, IgnoreErrors())
    assert list(found.failed) == [bad.label]
    assert {run.entry for run in found.runs} == {"atm", "jumprelu", "untrained"}
    assert summarise(comparison, {}).failed == {}


def test_an_unwritable_folder_is_an_error_before_training(comparison_yaml):
    comparison = load_comparison(comparison_yaml, [f"output_path={comparison_yaml}/x"])
    with pytest.raises(SettingsError, match="output_path"):
        compare(comparison, 2, Events())


def test_on_a_language_model(language_model_comparison_yaml, tmp_path):
    comparison = load_comparison(language_model_comparison_yaml)
    assert [job.label for job in planned_jobs(comparison)] == ["seed 0", "seed 1"]
    events = Events()
    results = compare(comparison, 2, events)
    assert sorted(events.done) == ["seed 0", "seed 1"]
    assert len(results.runs) == 8
    assert results.parents == []
    for run in results.runs:
        assert {"ce_loss_score", "kl_div_score", "cosine", "mse", "dead_latents"} <= (
            run.figures.keys()
        )
        assert "mcc" not in run.figures
        if run.entry != "untrained":
            assert run.curve.steps == [5, 10, 15, 20]
    assert results.entries["batchtopk"].settings["trainer"]["lr"] == 1e-3
    assert all("stability" in row.figures for row in results.rows)
    names = {path.name for path in write_all(results, tmp_path / "out")}
    assert {"results.json", "report.html"} <= names
    # another architecture is trained alone, from a forward pass of its own, on the same tokens
    more = ["architectures.topk.role=baseline", "seeds=[0]"]
    (job,) = planned_jobs(load_comparison(language_model_comparison_yaml, more))
    assert job.steps == 20
    again = compare(load_comparison(language_model_comparison_yaml, more), 2, Events())
    before = {r.entry: r.figures for r in results.runs if r.seed == 0}
    for run in again.runs:
        if run.entry in before:
            assert run.figures == before[run.entry]


def test_a_group_on_a_language_model_resumes(language_model_comparison_yaml, tmp_path):
    overrides = ["seeds=[0]", "training_tokens=6400", "lr=1e-3", "prefetch_llm_batches=8"]
    comparison = load_comparison(language_model_comparison_yaml, overrides)
    stop = StopFlag()
    with pytest.raises(Interrupted):
        compare(comparison, 2, Events(stop, after=25), stop)
    (stopped,) = (tmp_path / "out").glob("groups/*/stopped")
    done = torch.load(next(stopped.glob("atm*/trainer_state.pt")), weights_only=False)
    assert 0 < done["n_training_steps"] < 100
    events = Events()
    results = compare(comparison, 2, events)
    assert {run.entry for run in results.runs} == {"atm", "batchtopk", "gated", "untrained"}
    for run in results.runs:
        if run.curve is not None:
            assert run.curve.steps == [25, 50, 75, 100]
    atm = next((tmp_path / "out").glob("runs/atm*/training.json"))
    assert json.loads(atm.read_text())["importance"]["steps"] == [25, 50, 75, 100]
    assert not list((tmp_path / "out").glob("groups/*"))


def test_its_own_learning_rate_reaches_a_language_models_sae(
    language_model_comparison_yaml, tmp_path
):
    base = ["seeds=[0]", "architectures.gated.trained=false"]
    slow = [*base, "architectures.batchtopk.run.lr=1e-9", "output_path=slow"]
    compare(load_comparison(language_model_comparison_yaml, slow), 2, Events())
    saes = {
        path.parent.parent.name.partition("-l0")[0]: SAE.load_from_disk(path.parent)
        for path in (tmp_path / "slow").glob("runs/*/sae/cfg.json")
    }
    moved = {
        name: (sae.W_dec - saes["untrained"].W_dec).abs().max().item() for name, sae in saes.items()
    }
    assert moved["batchtopk"] < 1e-5 < 1e-3 < moved["atm"]


def test_stored_files_are_json(results, finished):
    for run in results.runs:
        for name in ("training.json", "figures.json"):
            json.loads((finished / run.folder / name).read_text())
