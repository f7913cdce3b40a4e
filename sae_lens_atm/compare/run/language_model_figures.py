"""Evaluate saved SAEs of a comparison on a language model, and save their figures."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from safetensors.torch import save_file

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.letters import first_letters
from sae_lens_atm.compare.run.probing import add_probing
from sae_lens_atm.compare.run.stored_run import FIGURES, MEASURED, is_evaluated, is_trained
from sae_lens_atm.evaluation.contrastive_stories import (
    StoryActivations,
    contrastive_figures,
    read_stories,
    story_activations,
)
from sae_lens_atm.evaluation.first_letters import FirstLetters, figures_of, scores_of
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    flat_heads,
    language_model_figures,
)
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.evaluation.synthetic import is_signed
from sae_lens_atm.files import write_json
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import OnPhase, Phase
from sae_lens_atm.training.run_file import LanguageModelRun


def evaluate_group(
    group: Sequence[PlannedRun],
    folder: Path,
    model: Any,
    tokens: HeldOutTokens,
    stop: StopFlag,
    on_phase: OnPhase,
    on_sae: Callable[[int], None] = lambda _saes: None,
) -> None:
    """Evaluate the saved SAEs of a group that are not evaluated yet, on the same model and tokens.

    Args:
        group: the runs.
        folder: the folder of the comparison.
        model: the language model.
        tokens: held-out tokens.
        stop: flag to stop before the next batch.
        on_phase: is called with the progress of the evaluation of an SAE.
        on_sae: is called with 1 before each SAE.

    Raises:
        Interrupted: `stop` requested it. SAEs that are evaluated are not evaluated again.
    """

    def on_batch(what: str, done: int, total: int, unit: str = "batches") -> None:
        stop.check()
        on_phase(Phase(what, done, total, unit))

    letters: FirstLetters | None = None
    stories: StoryActivations | None = None
    for planned in group:
        # An SAE whose training failed is not stored. Its own job has reported why.
        if is_evaluated(planned, folder, with_map=False) or not is_trained(planned, folder):
            continue
        on_sae(1)
        if letters is None:
            prompts = partial(on_batch, "first letters")
            letters = first_letters(planned, folder, lambda: model, prompts)
        if stories is None:
            cfg = cast(LanguageModelRun, planned.run).runner
            reading = partial(on_batch, "reading", unit="stories")
            pairs = read_stories(planned.contrastive_stories)
            stories = story_activations(model, cfg, pairs, reading)
        evaluating = partial(on_batch, f"evaluating {planned.label}")
        probing = partial(on_batch, f"probing {planned.label}", unit="tasks")
        evaluate_on_language_model(
            planned, folder, model, tokens, letters, stories, evaluating, probing
        )


@torch.no_grad()
def evaluate_on_language_model(
    planned: PlannedRun,
    folder: Path,
    model: Any,
    tokens: HeldOutTokens,
    letters: FirstLetters | None,
    stories: StoryActivations,
    on_batch: OnBatch,
    on_task: OnBatch,
) -> None:
    """Evaluate a saved SAE as its users load it.

    Args:
        planned: the run of the SAE.
        folder: the folder of the comparison.
        model: the language model.
        tokens: held-out tokens.
        letters: words and probes for absorption; None leaves absorption out.
        stories: activations on contrastive stories; without any there is no contrastive score.
        on_batch: is called before each batch.
        on_task: is called before each task of sae-probes.
    """
    home = folder / planned.folder
    cfg = cast(LanguageModelRun, planned.run).runner
    sae = SAE[Any].load_from_disk(home / "sae", device=cfg.device)
    figures, alive = language_model_figures(sae, model, tokens, cfg, on_batch)
    save_file({"alive": alive}, home / MEASURED)
    content: dict[str, Any] = {"evaluation_key": planned.evaluation_key, "figures": figures}
    with flat_heads(sae):
        content["signed"] = is_signed(sae)
        if letters is not None:
            scores = scores_of(sae, letters, planned.l0)
            figures |= figures_of(scores, letters)
            content["intervals"] = scores.intervals
            content["first_letters"] = letters.facts()
            content["absorption_by_parent"] = scores.fraction_by_letter.tolist()
            content["parent_probability"] = letters.shares.tolist()
        figures |= contrastive_figures(sae, stories)
        add_probing(content, planned, folder, sae, lambda: model, on_task)
    write_json(home / FIGURES, content)
