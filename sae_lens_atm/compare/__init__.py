"""Compare architectures: train SAEs at the same L0, on the same data, over several seeds."""

from sae_lens_atm.compare.dry_run import dry_run
from sae_lens_atm.compare.plan.comparison_file import Comparison, load_comparison
from sae_lens_atm.compare.report.html import write_all
from sae_lens_atm.compare.report.results import Results, read_results
from sae_lens_atm.compare.run.comparison import compare, summarise
from sae_lens_atm.compare.run.tasks import planned_jobs

__all__ = [
    "Comparison",
    "Results",
    "compare",
    "dry_run",
    "load_comparison",
    "planned_jobs",
    "read_results",
    "summarise",
    "write_all",
]
