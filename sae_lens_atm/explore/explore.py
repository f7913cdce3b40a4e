"""Make the page on which a person looks at the latents of an SAE."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sae_lens import SAE
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.evaluation.first_letters import matched_l0
from sae_lens_atm.explore.content import Described, Material, Subject, describe, write_page
from sae_lens_atm.explore.examples import WINDOW
from sae_lens_atm.explore.found_parents import found_in_training
from sae_lens_atm.explore.letters import LetterSource, describe_letters, read_letters
from sae_lens_atm.explore.neuronpedia import LogitHistograms, check_export, export
from sae_lens_atm.explore.over_training import over_training
from sae_lens_atm.explore.promoted import Promoted, promoted_tokens
from sae_lens_atm.explore.reading import LONGEST, Reading, read_tokens
from sae_lens_atm.explore.samples import (
    feature_names,
    joined,
    nearest_features,
    sample_contexts,
    samples_of,
)
from sae_lens_atm.explore.strings import Strings
from sae_lens_atm.explore.text import text_of, tokens_of
from sae_lens_atm.explore.wording import SAMPLES, TEXT
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.hub.same_activations import check_sae
from sae_lens_atm.training.cached_run import open_cache
from sae_lens_atm.training.phases import LOADING_MODEL, OnPhase, Phase, ignore_phase
from sae_lens_atm.training.preflight.checks import check_dataset_exists, check_devices
from sae_lens_atm.training.preflight.lookups import check_files
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun
from sae_lens_atm.training.synthetic_run import build_synthetic_model

TOKENS = 200_000
MEGABYTES = 20.0
_NO_NAMES = ("sae", "checkpoints")  # folders that are called the same in all runs


def explore(
    sae: str | SAE[Any],
    run: Run,
    output: str | Path,
    tokens: int = TOKENS,
    megabytes: float = MEGABYTES,
    letters: LetterSource | None = None,
    beside: str | SAE[Any] | None = None,
    neuronpedia: str | Path | None = None,
    on_phase: OnPhase = ignore_phase,
) -> Path:
    """Write the page of an SAE, and return its path.

    Args:
        sae: an SAE, a folder, or ``REPO:SAE_ID`` on the Hub.
        run: the data: the run of a configuration file, see `load_run`.
        output: the HTML file.
        tokens: about how many tokens or samples are read.
        megabytes: largest size of the file. A smaller page shows fewer contexts.
        letters: also show first letters, with these settings. Only for a language model.
        beside: another SAE of the same activations, to compare with.
        neuronpedia: also write the latents of `sae` into this folder, in the format of
            SAEDashboard. Only for a language model.
        on_phase: is called often with what is done. It may raise an error to stop.

    Raises:
        SettingsError: the SAE cannot be loaded, was trained on other activations than the run's, or
            the page does not fit into `megabytes`. The folder `neuronpedia` has files, or the data
            is synthetic. `first_letters.match_l0` is true: a saved SAE has no target L0.
    """
    check_devices(run)
    if letters is not None:
        matched_l0(letters.settings, None)
    folder = None if neuronpedia is None else Path(neuronpedia)
    if folder is not None:
        check_export(folder, run)
    subjects = [_subject(one, run) for one in (sae, beside) if one is not None]
    name = subjects[0].name
    if len(subjects) > 1 and subjects[0].name == subjects[1].name:
        subjects = [
            one._replace(name=f"{one.name} ({at})") for one, at in zip(subjects, "AB", strict=True)
        ]
    logits = LogitHistograms()
    if isinstance(run, LanguageModelRun):
        on_logits = None if folder is None else logits.add
        described, material = _on_text(subjects, run, tokens, letters, on_logits, on_phase)
    else:
        described, material = _on_samples(subjects, run, tokens, on_phase)
    page = write_page(subjects, described, material, Path(output), megabytes, on_phase)
    if folder is not None:
        export(folder, name, run, described[0], material, logits, on_phase)
    return page


def _subject(sae: str | SAE[Any], run: Run) -> Subject:
    if not isinstance(sae, str):
        return _checked(Subject(type(sae).__name__, sae, None), run)
    found = Subject(_short(sae), load_sae(sae), found_in_training(sae), over_training(sae))
    return _checked(found, run)


def _short(reference: str) -> str:
    """Return the end of a folder's path that says which SAE it is, or a name on the Hub."""
    path = Path(reference)
    if not path.is_dir():
        return reference
    path = path.resolve()
    return path.parent.name if path.name in _NO_NAMES else path.name


def _checked(subject: Subject, run: Run) -> Subject:
    check_sae(subject.name, subject.sae, run)
    subject.sae.to(run.runner.device)
    return subject


def _on_text(
    subjects: Sequence[Subject],
    run: LanguageModelRun,
    number: int,
    letters: LetterSource | None,
    on_logits: Callable[[Tensor], None] | None,
    on_phase: OnPhase,
) -> tuple[list[Described], Material]:
    cfg = run.runner
    if run.activations is None:
        check_dataset_exists(cfg)
    else:
        open_cache(run)  # before the model is loaded
    check_files(cfg)
    on_phase(Phase(LOADING_MODEL))
    model = load_language_model(cfg)
    tokens = tokens_of(run, model, number)
    readings = read_tokens([subject.sae for subject in subjects], tokens, on_phase)
    flat, notices = tokens.ids.ravel(), list[str]()
    described: list[Described] = []
    for subject, reading in zip(subjects, readings, strict=True):
        promoted = promoted_tokens(
            model,
            cfg.hook_name,
            cfg.model_kwargs,
            reading.decoder,
            on_phase,
            None if described else on_logits,  # of the first SAE
        )
        seen = flat[reading.places]
        ones = (np.ones(len(seen), np.float32), (seen, np.arange(len(seen))))
        occurs = csr_matrix(ones, (int(flat.max()) + 1, len(seen)))
        described.append(describe(subject, reading, occurs, promoted, TEXT, on_phase))
    if letters is not None:
        words = read_letters(run, letters, lambda: model, on_phase)
        described = [
            one._replace(letters=describe_letters(subject.sae, words))
            for subject, one in zip(subjects, described, strict=True)
        ]
    if described[0].promoted is None:
        notices.append(
            "Promoted tokens are not shown: the SAE does not read the residual stream of a model "
            "whose unembedding is known."
        )
    reading = readings[0]
    notices += _about_reading(readings, tokens.rows, "tokens")
    if reading.left_out:
        notices.append(
            f"{reading.left_out:,} tokens are left out. Their activations are more than "
            f"{LONGEST:g} times as long as the median one, as at the first tokens of some contexts."
        )
    shown = (part for one in described for part in (one.latents.tokens, *_tokens_in(one.promoted)))
    strings = Strings([flat, *shown])
    contexts = {
        "tokens": strings.small_index(flat),
        "size": tokens.ids.shape[1],
        "around": WINDOW,
    }
    texts = text_of(getattr(model, "tokenizer", None), strings.used)
    facts = {
        "model": f"{Path(cfg.model_name).name} at {cfg.hook_name}",
        "tokens": f"{reading.rows:,}, of {Path(cfg.dataset_path).name}",
    }
    size = tokens.ids.shape[1]
    return described, Material(
        TEXT, partial(_all_of, contexts), strings, texts, size, facts, notices, tokens.ids
    )


def _all_of(contexts: Mapping[str, Any], _places: NDArray[Any]) -> Mapping[str, Any]:
    return contexts


def _on_samples(
    subjects: Sequence[Subject], run: SyntheticRun, number: int, on_phase: OnPhase
) -> tuple[list[Described], Material]:
    model = build_synthetic_model(run)
    samples = samples_of(model, number)
    saes = [subject.sae for subject in subjects]
    readings = read_tokens(saes, samples.tokens, on_phase, longest=None)
    features = joined(samples.features)
    described: list[Described] = []
    for subject, reading in zip(subjects, readings, strict=True):
        near = nearest_features(model, reading.decoder)
        described.append(describe(subject, reading, features.sign().T, near, SAMPLES, on_phase))
    facts = {
        "data": f"synthetic, {features.shape[1]:,} features",
        "samples": f"{readings[0].rows:,}",
    }
    names = feature_names(model)
    strings = Strings([np.arange(len(names))])
    notices = _about_reading(readings, number, "samples")
    contexts = partial(sample_contexts, features)
    return described, Material(SAMPLES, contexts, strings, names, 1, facts, notices)


def _about_reading(readings: Sequence[Reading], wanted: int, units: str) -> list[str]:
    reading, notices = readings[0], list[str]()
    if any(one.is_signed for one in readings):
        notices.append("The SAE has activations below 0. They are left out on this page.")
    if reading.rows + reading.left_out < wanted:
        notices.append(
            f"Only {reading.rows:,} of {wanted:,} {units} were read, as many latents fire."
        )
    return notices


def _tokens_in(promoted: Promoted | None) -> tuple[NDArray[np.uint32], ...]:
    return () if promoted is None else (promoted.tokens, promoted.lowest_tokens)
