"""The work of the command that makes the page of an SAE."""

from pathlib import Path

from huggingface_hub.utils import logging as hub_logging

from sae_lens_atm.cli.progress import PhasesProgress
from sae_lens_atm.cli.terminal import config_path, console
from sae_lens_atm.cli.threads import use_threads
from sae_lens_atm.compare.evaluate_saved import data_of
from sae_lens_atm.explore import LetterSource, explore
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
    with PhasesProgress(console) as bar:
        path = explore(
            sae, data.run, output, tokens, megabytes, letters, beside, neuronpedia, bar.on_phase
        )
    console.print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", highlight=False)
    if neuronpedia is not None:
        console.print(f"wrote {neuronpedia}, in the format of SAEDashboard", highlight=False)
