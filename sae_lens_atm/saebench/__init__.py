"""Run SAEBench's evals on a saved SAE, in a separate environment."""

from sae_lens_atm.errors import SAEBenchError
from sae_lens_atm.saebench.environment import default_folder, is_complete, prepare
from sae_lens_atm.saebench.evals import (
    DEFAULT_EVALS,
    EVALS,
    EvalRequest,
    failures,
    plan_evals,
    run_evals,
)
from sae_lens_atm.saebench.scores import scores_of, table

__all__ = [
    "DEFAULT_EVALS",
    "EVALS",
    "EvalRequest",
    "SAEBenchError",
    "default_folder",
    "failures",
    "is_complete",
    "plan_evals",
    "prepare",
    "run_evals",
    "scores_of",
    "table",
]
