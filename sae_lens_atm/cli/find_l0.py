"""The work of `find-l0`."""

from collections.abc import Sequence

from sae_lens_atm.cli.progress import RunsProgress
from sae_lens_atm.cli.terminal import config_path, console, facts_table, timing_status
from sae_lens_atm.cli.threads import warn_if_busy
from sae_lens_atm.compare.find_l0 import find_l0, load_searches
from sae_lens_atm.compare.find_l0.dry_run import dry_run
from sae_lens_atm.compare.find_l0.report import PICTURE, answers_table, draw, problem_lines
from sae_lens_atm.compare.run.processes import Job, threads_per_job
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.found_l0 import FILENAME
from sae_lens_atm.training.quiet import silence_saelens


def range_of(text: str | None) -> tuple[float, float] | None:
    """Return the numbers in `LOW,HIGH`.

    Raises:
        SettingsError: the text is something else.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--l0 must be LOW,HIGH, for example 8,256, got {text!r}") from None
    return low, high


def find_l0_of_file(
    config: str,
    overrides: list[str],
    l0: str | None,
    seeds: int,
    longest: float,
    jobs: int,
    only_plan: bool,
    threads: int | None,
) -> None:
    """Search for the L0 of each architecture of a file, and print and draw the answers."""
    searches = load_searches(config_path(config), overrides, range(seeds), range_of(l0), longest)
    if only_plan:
        silence_saelens()
        with timing_status() as report:
            facts = dry_run(searches, jobs, report, threads)
        console.print(facts_table(facts))
        return
    first = searches.searches[0].comparison(1, [1], [0])
    warn_if_busy(first.planned[0].run.runner.device, threads or threads_per_job(jobs))

    def on_round(name: str, to_do: Sequence[Job]) -> RunsProgress:
        if to_do:
            console.print(f"{name}: {len(to_do)} jobs", highlight=False, markup=False)
        return RunsProgress(console, to_do)

    found = find_l0(searches, jobs, on_round, threads=threads)
    console.print(answers_table(found))
    for line in problem_lines(found):
        console.print(f"not sure: {line}", highlight=False, markup=False)
    draw(found, searches.output / PICTURE)
    advice = (
        "`found` cannot use these answers: each is the lowest or highest L0 that was tried."
        if all(answer.at_edge for answer in found.values())
        else "`k: found` under `sae` of the run file, or `l0: found` in the comparison file, "
        "trains at this L0."
    )
    console.print(
        f"{searches.output / FILENAME} and {PICTURE} written. {advice}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
