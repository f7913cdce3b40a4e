"""SAEBench's evals of a saved SAE, run in an environment of SAEBench's own."""

from sae_lens_atm.errors import SAEBenchError
from sae_lens_atm.saebench.environment import default_folder, is_whole, prepare
from sae_lens_atm.saebench.evals import EVALS, Plan, failures, plan_evals, run_evals
from sae_lens_atm.saebench.scores import scores_of, table

__all__ = [
    "EVALS",
    "Plan",
    "SAEBenchError",
    "default_folder",
    "failures",
    "is_whole",
    "plan_evals",
    "prepare",
    "run_evals",
    "scores_of",
    "table",
]
