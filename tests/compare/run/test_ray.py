import os
import signal
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.compare import read_results
from sae_lens_atm.compare.run.processes import Job
from sae_lens_atm.compare.run.ray import LOCAL, run_jobs_on_ray
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.training.hooks import StopFlag
from tests.compare.run.test_processes import Events, die, fail, wait_for_stop, write

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine with room for two jobs. All tests here share it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, configure_logging=False)
    yield LOCAL
    ray.shutdown()


def test_no_cluster_at_the_address():
    with pytest.raises(SettingsError, match=r"--ray 127\.0\.0\.1:1"):
        run_jobs_on_ray([Job("a", 1, fail)], "127.0.0.1:1", 0, Events(), StopFlag())


def run(cluster, jobs, events, stop=None):
    return run_jobs_on_ray(jobs, cluster, 0, events, stop or StopFlag())


def test_jobs_run_in_other_processes(cluster, tmp_path):
    jobs = [Job(name, 7, partial(write, tmp_path / name)) for name in "abc"]
    events = Events()
    assert run(cluster, jobs, events) == {}
    pids = {Path(tmp_path / name).read_text().split()[0] for name in "abc"}
    assert str(os.getpid()) not in pids
    assert events.steps == dict.fromkeys("abc", 7)
    assert sorted(label for label, _ in events.phases) == list("abc")
    for name in "abc":
        assert events.calls.index(("started", name)) < events.calls.index(("ended", name, None))


def test_a_job_that_fails_leaves_the_others(cluster, tmp_path):
    good = partial(write, tmp_path / "good")
    jobs = [Job("bad", 1, fail), Job("dead", 1, die), Job("good", 7, good)]
    events = Events()
    failed = run(cluster, jobs, events)
    assert failed["bad"] == "ValueError: no good"
    assert "died" in failed["dead"]
    assert failed.keys() == {"bad", "dead"}
    assert (tmp_path / "good").exists()
    assert ("ended", "bad", "ValueError: no good") in events.calls


def test_a_stop_reaches_running_jobs_and_waits_for_them(cluster, tmp_path):
    stop = StopFlag()
    jobs = [Job(str(i), 1, partial(wait_for_stop, tmp_path / str(i))) for i in range(5)]
    with pytest.raises(Interrupted) as caught:
        run(cluster, jobs, Events(stop), stop)
    assert caught.value.signal_number == signal.SIGTERM
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert 1 <= len(written) < 5  # Ray may have begun some more
    assert set(written) == {"stopped well"}


def test_a_sweep_on_a_cluster(cluster, synthetic_yaml):
    over = "sweep.over={lr: [1.0e-2, 1.0e-3]}"
    short = ["--set", "training_samples=640"]
    args = ["sweep", str(synthetic_yaml), "--set", over, *short, "--ray", cluster]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    results = read_results("out/results.json")
    assert len(results.runs) == 2
    assert results.failed == {}
    assert all((Path("out") / run.folder / "sae/cfg.json").exists() for run in results.runs)
