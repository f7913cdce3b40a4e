import io
import itertools
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sae_lens_atm.cli import progress
from sae_lens_atm.cli.progress import BatchesProgress, RunsProgress, TrainingProgress, figures_table
from sae_lens_atm.compare.run.processes import Job
from sae_lens_atm.training.phases import Phase


def console(terminal=False):
    return Console(file=io.StringIO(), width=120, force_terminal=terminal, markup=False)


def text_of(console):
    return console.file.getvalue()


def output(metrics):
    acts = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return SimpleNamespace(
        loss=torch.tensor(0.25), feature_acts=acts, metrics=metrics, sae_in=x, sae_out=x / 2
    )


def trainer_at(step):
    return SimpleNamespace(n_training_steps=step, dead_neurons=torch.tensor([True, False]))


def train(progress, steps, metrics):
    with progress:
        for step in range(steps):
            progress.on_step(trainer_at(step), output(metrics))


FIGURES = ["loss", "0.25", "EV", "0.500", "L0", "1.5", "dead", "1"]


def test_a_log_gets_a_line_every_few_seconds(monkeypatch):
    clock = itertools.count(0, 2)  # a step takes 2 seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    log = console()
    train(TrainingProgress(log, 10), 10, {"masked_fraction": lambda: torch.tensor(0.25)})
    lines = [line.split() for line in text_of(log).splitlines()]
    assert [line[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[0] == ["step", "1/10", *FIGURES, "masked", "25%"]
    assert lines[1][-4:] == ["about", "12", "s", "left"]
    assert lines[-1] == ["step", "10/10", *FIGURES, "masked", "25%"]


def test_other_architectures_have_no_masks():
    log = console()
    train(TrainingProgress(log, 1), 1, {})
    assert text_of(log).split() == ["step", "1/1", *FIGURES]


def test_a_terminal_gets_a_bar():
    screen = console(terminal=True)
    train(TrainingProgress(screen, 40), 40, {})
    assert "before step 1" in text_of(screen)
    assert "40/40" in text_of(screen)
    assert "step 40" not in text_of(screen)


def test_sparse_activations_have_an_l0_too():
    log = console()
    sparse = output({})
    sparse.feature_acts = sparse.feature_acts.to_sparse()
    TrainingProgress(log, 1).on_step(trainer_at(0), sparse)
    assert "L0 1.5" in text_of(log)


def test_runs_are_counted_and_their_errors_printed():
    log = console()
    jobs = [Job(f"run {i}", 100, None) for i in range(2)]
    with RunsProgress(log, jobs) as progress:
        for job, error in zip(jobs, (None, "ValueError: bad"), strict=True):
            progress.started(job)
            progress.advanced(job, 100)
            progress.ended(job, error)
    lines = text_of(log).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "run 0: started",
        "50% of all steps",
        "[1/2] run 0: 0 s",
        "100% of all steps",
        "[2/2] run 1 failed: ValueError: bad",
    ]
    assert lines[1].endswith("under 1 s left")
    assert lines[3] == "100% of all steps"


@pytest.mark.usefixtures("clock")
def test_the_time_left_is_that_of_the_training_steps():
    log = console()
    reading, *runs = [Job(f"job {i}", 100, None, needed=i == 0) for i in range(3)]
    with RunsProgress(log, [reading, *runs]) as bar:
        bar.started(reading)
        for _ in range(1000):
            progress.time.monotonic()  # reading takes 1,000 seconds
        bar.advanced(reading, 100)
        bar.ended(reading, None)
        bar.started(runs[0])
        for _ in range(119):
            progress.time.monotonic()
        bar.advanced(runs[0], 100)
    lines = text_of(log).splitlines()
    assert lines[1] == "[1/3] job 0: 1001 s"
    assert lines[2] == "50% of all steps, about 2 min left"


def test_nothing_to_train_is_no_division_by_zero():
    with RunsProgress(console(), []):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that is one second further at each reading."""
    seconds = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


def show_phases(bar):
    with bar:
        bar.on_phase(Phase("loading"))
        for done in range(9):
            bar.on_phase(Phase("filling", done, 8, "batches"))
        bar.on_step(trainer_at(0), output({}))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_every_few_seconds_before_step_1():
    log = console()
    show_phases(TrainingProgress(log, 1))
    lines = text_of(log).splitlines()
    assert lines[0] == "loading"
    assert lines[1] == "filling: 0 of 8 batches"
    assert lines[2] == "filling: 5 of 8 batches"
    assert lines[3] == "filling: 8 batches, 8 s"
    assert lines[4].startswith("step 1/1")
    assert len(lines) == 5


def test_a_terminal_gets_a_bar_before_step_1():
    screen = console(terminal=True)
    show_phases(TrainingProgress(screen, 40))
    text = text_of(screen)
    assert "filling: 8 batches, 0 s" in text
    assert "filling: 5 of 8" not in text
    assert "1/40" in text  # the bar of the steps


@pytest.mark.usefixtures("clock")
def test_phases_of_runs_are_shown_with_their_names():
    log, job = console(), Job("run 0", 100, None)
    with RunsProgress(log, [job]) as progress:
        progress.started(job)
        progress.is_in(job, Phase("loading"))
        progress.is_in(job, Phase("filling", 8, 8, "batches"))
        progress.advanced(job, 100)
        progress.ended(job, None)
    lines = text_of(log).splitlines()
    assert lines[:3] == ["run 0: started", "run 0: loading", "run 0: filling: 8 batches, 0 s"]


def test_phases_of_runs_are_on_their_bars():
    screen, job = console(terminal=True), Job("run 0", 100, None)
    with RunsProgress(screen, [job]) as progress:
        progress.started(job)
        progress.is_in(job, Phase("filling", 3, 8, "batches"))
    assert "run 0: filling: 3 of 8 batches" in text_of(screen)


def test_a_table_of_figures():
    columns = {"a": {"mcc": 0.5, "dead_latents": 3}, "b": {"mcc": 0.25}}
    log = console()
    log.print(figures_table("Figures", columns))
    rows = [line.split("│")[1:4] for line in text_of(log).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [["mcc ↑", "0.5", "0.25"], ["dead_latents ↓", "3", "nan"]]


def test_intervals_stand_beside_their_figures():
    log = console()
    intervals = {"a": {"mcc": (0.25, 0.625)}}
    log.print(figures_table("Figures", {"a": {"mcc": 0.5, "l0": 3.0}}, intervals))
    assert "0.5 [0.25, 0.625] │" in text_of(log)
    assert " 3 │" in text_of(log)


def test_batches_are_counted_from_the_first():
    log, screen = console(), console(terminal=True)
    for where in (log, screen):
        with BatchesProgress(where, "first letters") as progress:
            for done in range(40):
                progress.on_batch(done, 40)
    lines = text_of(log).splitlines()
    assert lines == [f"first letters: {done}/40 batches" for done in range(0, 40, 4)]
    assert "39/40" in text_of(screen)


def test_other_work_that_follows_has_its_own_name_and_unit():
    log, screen = console(), console(terminal=True)
    for where in (log, screen):
        with BatchesProgress(where, "first letters") as progress:
            progress.on_batch(0, 2)
            on_text = progress.named("probing tasks", "characters")
            progress.on_batch(1, 2)
            on_text(0, 4000)
            on_text(3000, 4000)
    assert text_of(log).splitlines() == [
        "first letters: 0/2 batches",
        "first letters: 1/2 batches",
        "probing tasks: 0/4,000 characters",
        "probing tasks: 3,000/4,000 characters",
    ]
    assert "probing tasks" in text_of(screen)


def test_waiting_for_another_process_has_no_batches():
    with BatchesProgress(console(), "first letters") as progress:
        progress.on_batch(0, 0)


@pytest.mark.parametrize("columns", [{}, {"a": {}}])
def test_a_table_without_figures(columns):
    assert figures_table("Figures", columns).row_count == 0


def test_the_name_of_a_run_is_no_markup():
    screen = console(terminal=True)
    job = Job("a[/b] :star:, L0 4, seed 0", 100, None)
    with RunsProgress(screen, [job]) as progress:
        progress.started(job)
        progress.advanced(job, 50)
    assert job.label in text_of(screen)
