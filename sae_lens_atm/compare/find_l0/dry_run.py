"""The plan of the searches of a file, and an estimate of their time from a few timed steps."""

from typing import Any

from sae_lens_atm.compare.dry_run import estimate
from sae_lens_atm.compare.find_l0.search import expected_rounds
from sae_lens_atm.compare.find_l0.searches import Searches
from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.training.preflight.timing import Report


def dry_run(
    searches: Searches, at_once: int, report: Report, threads: int | None = None
) -> dict[str, Any]:
    """Check the searches, and return their plan with an estimate of their time on this machine.

    The estimate is for a peak in the middle of the L0s, found in three rounds.

    Args:
        searches: the searches.
        at_once: maximum number of processes.
        report: is called before each measurement.
        threads: number of threads of each process; None divides the cores among the processes.

    Raises:
        SettingsError: the output folder is not writable, or the data do not fit.
    """
    rounds: list[Comparison] = []
    checked: dict[str, str] = {}
    for one in searches.searches:
        rounds += [one.comparison(*planned) for planned in expected_rounds(one.seeds, one.limits)]
        checked |= check(rounds[-1])
    limits = searches.searches[0].limits
    return {
        "architectures": ", ".join(one.entry for one in searches.searches),
        "L0": f"{limits.low:g} to {limits.high:g}",
        "seeds": ", ".join(map(str, searches.searches[0].seeds)),
        "rounds": "1/4, 1/2 and 1 of the training"
        + (f", up to {limits.longest:g} if the answer moves" if limits.longest > 1 else ""),
        "SAEs": f"about {sum(len(comparison.planned) for comparison in rounds)}",
        **checked,
        "output": str(searches.output),
        **estimate(rounds, at_once, report, threads, evaluates=False),
    }
