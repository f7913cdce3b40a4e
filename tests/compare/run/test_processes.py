import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from sae_lens_atm.compare.run.processes import Job, StepCounter, run_jobs, threads_per_job
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import Phase


class Events:
    def __init__(self, stop=None):
        self.calls = []
        self.steps = {}
        self.phases = []
        self.stop = stop

    def started(self, job):
        self.calls.append(("started", job.label))

    def advanced(self, job, steps):
        self.steps[job.label] = self.steps.get(job.label, 0) + steps
        if self.stop is not None:
            self.stop.request(signal.SIGTERM)

    def is_in(self, job, phase):
        self.phases.append((job.label, phase))

    def ended(self, job, error):
        self.calls.append(("ended", job.label, error))


# Jobs are pickled for other processes, so their functions are at the module's level.
def write(path, on_progress, _stop):
    on_progress(3)
    on_progress(Phase("waiting", 1, 2, "things"))
    on_progress(4)
    path.write_text(f"{os.getpid()} {torch.get_num_threads()}")


def fail(_on_progress, _stop):
    raise ValueError("no\ngood")


def die(_on_progress, _stop):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_stop(path, on_progress, stop):
    on_progress(1)
    start = time.monotonic()
    while stop.signal_number is None and time.monotonic() - start < 60:
        time.sleep(0.02)
    path.write_text("stopped well")
    raise Interrupted(None, stop.signal_number)


def test_jobs_run_in_processes_of_their_own(tmp_path):
    jobs = [Job(name, 7, partial(write, tmp_path / name)) for name in "abc"]
    events = Events()
    assert run_jobs(jobs, 2, events, StopFlag()) == {}
    assert sorted(events.phases) == [(n, Phase("waiting", 1, 2, "things")) for n in "abc"]
    written = [Path(tmp_path / name).read_text().split() for name in "abc"]
    assert len({pid for pid, _ in written} | {str(os.getpid())}) == 4
    assert {threads for _, threads in written} == {str(threads_per_job(2))}
    assert events.steps == dict.fromkeys("abc", 7)
    assert events.calls[:2] == [("started", "a"), ("started", "b")]
    assert {call for call in events.calls if call[0] == "ended"} == {
        ("ended", name, None) for name in "abc"
    }


@pytest.mark.parametrize(("alone", "at_once"), [(True, 1), (False, 2)])
def test_a_job_that_is_alone_gets_all_cores(tmp_path, alone, at_once, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = Job("only", 7, partial(write, tmp_path / "only"), alone=alone)
    assert run_jobs([job], 2, Events(), StopFlag()) == {}
    threads = (tmp_path / "only").read_text().split()[1]
    assert threads == str(threads_per_job(at_once))


def test_a_job_has_the_threads_that_are_asked_for(tmp_path):
    run_jobs([Job("a", 7, partial(write, tmp_path / "a"))], 1, Events(), StopFlag(), threads=1)
    assert Path(tmp_path / "a").read_text().split()[1] == "1"


@pytest.mark.parametrize(
    ("given", "at_once", "threads"),
    [("", 1, 8), ("", 3, 2), ("", 20, 1), ("1", 1, 1), ("3", 1, 3), ("99", 2, 4), ("2,1", 1, 8)],
)
def test_jobs_divide_the_cores_as_far_as_omp_num_threads_allows(
    given, at_once, threads, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_per_job(at_once) == threads


def test_a_job_that_fails_leaves_the_others(tmp_path):
    jobs = [
        Job("bad", 1, fail),
        Job("dead", 1, die),
        Job("good", 1, partial(write, tmp_path / "g")),
    ]
    events = Events()
    failed = run_jobs(jobs, 1, events, StopFlag())
    assert failed == {"bad": "ValueError: no good", "dead": "ended with exit code -9"}
    assert ("ended", "bad", "ValueError: no good") in events.calls
    assert (tmp_path / "g").exists()


def test_a_stop_reaches_running_jobs_and_waits_for_them(tmp_path):
    stop = StopFlag()
    jobs = [Job(n, 1, partial(wait_for_stop, tmp_path / n)) for n in ("one", "two", "three")]
    events = Events(stop)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_jobs(jobs, 1, events, stop)
    assert events.calls == [("started", "one")]  # not told as done
    assert (tmp_path / "one").read_text() == "stopped well"
    assert not (tmp_path / "two").exists()


def test_every_25_steps_are_reported():
    reported = []
    counter = StepCounter(reported.append)
    for _ in range(60):
        counter.count()
    assert reported == [25, 25]
