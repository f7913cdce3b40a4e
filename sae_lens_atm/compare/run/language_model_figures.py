"""Evaluate a saved SAE of a comparison on a language model, and save its figures."""

from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from safetensors.torch import save_file

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.stored_run import FIGURES, MEASURED
from sae_lens_atm.evaluation.first_letters import FirstLetters, figures_of, scores_of
from sae_lens_atm.evaluation.language_model import HeldOutTokens, language_model_figures
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.evaluation.synthetic import is_signed
from sae_lens_atm.files import write_json
from sae_lens_atm.training.run_file import LanguageModelRun


@torch.no_grad()
def evaluate_on_language_model(
    planned: PlannedRun,
    folder: Path,
    model: Any,
    tokens: HeldOutTokens,
    letters: FirstLetters | None,
    on_batch: OnBatch,
) -> None:
    """Evaluate a saved SAE as its users load it.

    Args:
        planned: the run of the SAE.
        folder: the folder of the comparison.
        model: the language model.
        tokens: held-out tokens.
        letters: words and probes for absorption; None leaves absorption out.
        on_batch: is called before each batch.
    """
    home = folder / planned.folder
    cfg = cast(LanguageModelRun, planned.run).runner
    sae = SAE[Any].load_from_disk(home / "sae", device=cfg.device)
    figures, alive = language_model_figures(sae, model, tokens, cfg, on_batch)
    save_file({"alive": alive}, home / MEASURED)
    content: dict[str, Any] = {
        "evaluation_key": planned.evaluation_key,
        "figures": figures,
        "signed": is_signed(sae),
    }
    if letters is not None:
        scores = scores_of(sae, letters)
        figures |= figures_of(scores, letters)
        content["absorption_by_parent"] = scores.fraction_by_letter.tolist()
        content["parent_probability"] = letters.shares.tolist()
    write_json(home / FIGURES, content)
