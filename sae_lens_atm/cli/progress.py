"""Progress of long work: a bar on a terminal, lines in a log file. And tables of figures."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from typing_extensions import Self, override

from sae_lens_atm.compare.run.processes import Job
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.metrics.figures import figure as figure_info
from sae_lens_atm.metrics.word_figures import Interval
from sae_lens_atm.training.history import step_figures
from sae_lens_atm.training.phases import Phase
from sae_lens_atm.training.preflight.timing import time_left

_REFRESH = 20  # steps between two readings, each of which waits for the device
_SECONDS = 5.0  # between two lines on a phase or on training in a log file


class PhaseLines:
    """Prints phases as lines: the first, the last, and one every few seconds.

    On a terminal, which has a bar, it prints only the last.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what = ""
        self._start = self._printed = 0.0

    def show(self, phase: Phase, before: str = "") -> bool:
        """Print a phase if it is time to, and return whether the phase is a new one.

        Args:
            phase: the phase.
            before: text before it.
        """
        now, is_new = time.monotonic(), phase.what != self._what
        if is_new:
            self._what, self._start = phase.what, now
        is_due = is_new or now - self._printed >= _SECONDS
        if phase.is_finished or (is_due and not self._console.is_terminal):
            took = f", {now - self._start:.0f} s" if phase.is_finished else ""
            self._console.print(f"{before}{phase}{took}", highlight=False)
            self._printed = now
        return is_new


class _Bars:
    """Bars on a terminal, shown in a `with` statement. A log file gets none.

    Args:
        console: where to print.
        columns: what is shown behind each bar.
        transient: whether the bars vanish at the end.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = False) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=transient,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class PhasesProgress(_Bars):
    """Shows the phases of some work, one after the other in the same bar.

    Args:
        console: where to print.
        columns: what is shown behind the bar; by default the time left.
        start: what the bar shows before the first phase.
        total: the length of the bar before the first phase; None if it is unknown.
    """

    def __init__(
        self,
        console: Console,
        *columns: ProgressColumn,
        start: str = "starting",
        total: int | None = None,
    ) -> None:
        super().__init__(console, *(columns or (TimeRemainingColumn(),)))
        self._lines = PhaseLines(console)
        self._task = self._bar.add_task(start, total=total, figures="")

    def on_phase(self, phase: Phase) -> None:
        """Show a phase."""
        if self._lines.show(phase):
            self._bar.reset(self._task, description=phase.what)
        self._bar.update(self._task, completed=phase.done, total=phase.total or None)


class TrainingProgress(PhasesProgress):
    """Shows the figures and the remaining time of a training run.

    They are those of its history. A log file gets a line every few seconds.

    Args:
        console: where to print.
        steps: number of steps of the run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        figures = TextColumn("{task.fields[figures]}")
        columns = (MofNCompleteColumn(), TimeRemainingColumn(), figures)
        super().__init__(console, *columns, start="before step 1", total=steps)
        self._steps = steps
        self._in_phase = False
        self._printed = 0.0
        self._begun: tuple[float, int] | None = None  # time and number of the first step

    @override
    def on_phase(self, phase: Phase) -> None:
        """Show work before or after training."""
        if not self._in_phase:
            self._bar.reset(self._task, description=phase.what, figures="")
        self._in_phase = True
        super().on_phase(phase)

    def on_step(self, trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> None:
        """Show a completed step."""
        step = trainer.n_training_steps + 1
        if self._in_phase:
            self._in_phase = False
            self._bar.reset(self._task, description="training", total=self._steps, completed=step)
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, step)
        is_last = step == self._steps
        if self._console.is_terminal:
            is_due = step % _REFRESH == 0
        else:
            is_due = now - self._printed >= _SECONDS or step == self._begun[1]
        if not is_due and not is_last:
            return
        figures = shown_figures(step_figures(trainer, output))
        self._bar.update(self._task, description="training", completed=step, figures=figures)
        if not self._console.is_terminal:
            self._printed = now
            left = self._time_left(step, now)
            self._console.print(f"step {step}/{self._steps}  {figures}{left}", highlight=False)

    def _time_left(self, step: int, now: float) -> str:
        start, first = self._begun or (now, step)
        if step in (first, self._steps):
            return ""
        seconds = (now - start) / (step - first) * (self._steps - step)
        return f"  {time_left(seconds)}"


def shown_figures(figures: Mapping[str, float]) -> str:
    """Return the figures of a training step in one line."""
    parts = [
        f"loss {figures['loss']:.4g}",
        f"EV {figures['explained_variance']:.3f}",
        f"L0 {figures['l0']:.1f}",
        f"dead {figures['dead_latents']:.0f}",
    ]
    if "masked_fraction" in figures:
        parts.append(f"masked {figures['masked_fraction']:.0%}")
    return "  ".join(parts)


class RunsProgress(_Bars):
    """Shows the progress of the runs of a comparison.

    Args:
        console: where to print.
        jobs: all jobs. The time left is estimated from the steps of those that no others need: a
            step of training takes another time than a step of reading texts.
    """

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        super().__init__(console, TaskProgressColumn(), TimeRemainingColumn())
        self._runs = len(jobs)
        self._steps = max(sum(job.steps for job in jobs if not job.needed), 1)
        self._done = 0
        self._ended = 0
        self._start = 0.0
        self._started: dict[str, float] = {}
        self._all = self._bar.add_task("all", total=self._steps)
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, PhaseLines] = {}

    def started(self, job: Job) -> None:
        """Add a bar for a run. In a log file, a line says that the first one has started."""
        if not self._started and not self._console.is_terminal:
            self._console.print(f"{job.label}: started", highlight=False)
        self._started[job.label] = time.monotonic()
        if not job.needed and not self._start:
            self._start = self._started[job.label]
        self._tasks[job.label] = self._bar.add_task(job.label, total=max(job.steps, 1))

    def advanced(self, job: Job, steps: int) -> None:
        """Count steps of a run."""
        self._bar.update(self._tasks[job.label], advance=steps, description=job.label)
        if job.needed:
            return
        self._done += steps
        self._bar.advance(self._all, steps)
        before, now = (10 * (self._done - n) // self._steps for n in (steps, 0))
        if now > before and not self._console.is_terminal:
            self._console.print(f"{10 * now}% of all steps{self._time_left()}", highlight=False)

    def is_in(self, job: Job, phase: Phase) -> None:
        """Show work of a run before or after its training."""
        lines = self._lines.setdefault(job.label, PhaseLines(self._console))
        lines.show(phase, f"{job.label}: ")
        self._bar.update(self._tasks[job.label], description=f"{job.label}: {phase}")

    def _time_left(self) -> str:
        if self._done >= self._steps:
            return ""
        left = (time.monotonic() - self._start) * (self._steps / self._done - 1)
        return f", {time_left(left)}"

    def ended(self, job: Job, error: str | None) -> None:
        """Remove the bar of a run, and print its time or its error."""
        self._ended += 1
        self._bar.remove_task(self._tasks.pop(job.label))
        self._bar.update(self._all, description=f"{self._ended}/{self._runs}")
        took = time.monotonic() - self._started[job.label]
        text = f"[{self._ended}/{self._runs}] {job.label}: {took:.0f} s"
        if error is not None:
            text = f"[{self._ended}/{self._runs}] {job.label} failed: {error}"
        elif not self._console.is_terminal and self._done:
            text += self._time_left()
        self._console.print(text, highlight=False)


class BatchesProgress(_Bars):
    """Shows the progress of work whose number of batches is known only once it has begun.

    Args:
        console: where to print.
        what: what is done, for the bar.
    """

    def __init__(self, console: Console, what: str) -> None:
        super().__init__(console, MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
        self._what, self._unit = what, "batches"
        self._tenths = 0
        self._task: TaskID | None = None

    def on_batch(self, done: int, batches: int) -> None:
        """Show that a batch begins, after `done` of them."""
        if self._task is None:
            self._task = self._bar.add_task(self._what, total=batches)
        self._bar.update(self._task, completed=done, total=batches)
        tenths = 10 * done // max(batches, 1)
        if not self._console.is_terminal and (done == 0 or tenths > self._tenths):
            self._console.print(f"{self._what}: {done:,}/{batches:,} {self._unit}", highlight=False)
        self._tenths = tenths

    def named(self, what: str, unit: str) -> OnBatch:
        """Return `on_batch` for other work, which follows and is counted in other units."""

        def on_batch(done: int, every: int) -> None:
            if what != self._what:
                self._what, self._unit = what, unit
                if self._task is not None:
                    self._bar.reset(self._task, description=what)
            self.on_batch(done, every)

        return on_batch


def figures_table(
    title: str,
    columns: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Interval]] | None = None,
) -> Table:
    """Return a table with a row for each figure and a column for each SAE.

    An arrow shows whether higher or lower is better.

    Args:
        title: the title.
        columns: the figures of each SAE.
        intervals: the 95% intervals of some figures, shown in brackets.
    """
    table = Table(title=title)
    table.add_column("figure")
    for name in columns:
        table.add_column(name, justify="right")
    for figure in next(iter(columns.values()), {}):
        cells: list[str] = []
        for name, values in columns.items():
            value = values.get(figure, float("nan"))
            text = f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"
            low, high = (intervals or {}).get(name, {}).get(figure, (None, None))
            cells.append(text if low is None else f"{text} [{low:.4g}, {high:.4g}]")
        table.add_row(figure + figure_info(figure).arrow, *cells)
    return table
