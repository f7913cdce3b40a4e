"""The work of the command that makes the page of an SAE."""

from pathlib import Path

from huggingface_hub.utils import logging as hub_logging
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from sae_lens_atm.cli.progress import PhaseLines
from sae_lens_atm.cli.terminal import config_path, console
from sae_lens_atm.cli.threads import use_threads
from sae_lens_atm.compare.evaluate_saved import data_of
from sae_lens_atm.explore import LetterSource, explore
from sae_lens_atm.training.phases import Phase
from sae_lens_atm.training.quiet import silence_saelens


def explore_on_file(
    sae: str,
    config: str,
    overrides: list[str],
    output: Path,
    tokens: int,
    megabytes: float,
    beside: str | None = None,
    neuronpedia: Path | None = None,
    threads: int | None = None,
) -> None:
    """Write the page of an SAE, or of two, on the data of a configuration file."""
    use_threads(threads)
    silence_saelens()
    hub_logging.set_verbosity_error()  # its client logs every retry; the last error is enough
    data = data_of(str(config_path(config)), overrides)
    letters = None
    if data.first_letters is not None:
        letters = LetterSource(data.first_letters, data.folder)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    lines = PhaseLines(console)
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def on_phase(phase: Phase) -> None:
            if lines.show(phase):
                bar.reset(task, description=phase.what)
            bar.update(task, completed=phase.done, total=phase.total or None)

        path = explore(
            sae, data.run, output, tokens, megabytes, letters, beside, neuronpedia, on_phase
        )
    console.print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", highlight=False)
    if neuronpedia is not None:
        console.print(f"wrote {neuronpedia}, in the format of SAEDashboard", highlight=False)
