"""Stores the activations of words and the letter probes. All SAEs of a model and hook share them.

    FOLDER/first-letters/activations-KEY   activations, and the words in words.json
    FOLDER/first-letters/probes-KEY        probes of the letters

The keys are hashes of everything that determines the content. A folder is complete once it holds
its manifest. A damaged one is made again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_atm.data.activation_cache import LETTERS_FOLDER
from sae_lens_atm.data.model_identity import model_identity
from sae_lens_atm.evaluation.first_letters import (
    FirstLetters,
    LetterActivations,
    look_at_first_letters,
    read_letter_activations,
    train_letter_probes,
    with_probes,
)
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig, Split
from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.files import (
    MANIFEST_FILENAME,
    check_writable,
    hash_of,
    manifest_mismatch,
    read_json,
    saved_at_once,
    turn,
    write_json,
    write_manifest,
)
from sae_lens_atm.metrics.probes import Probe, Words

_VERSION = 1  # of the prompts, the probes and the files
_TENSORS, _WORDS = "tensors.safetensors", "words.json"


def first_letters_of(
    run: LanguageModelSAERunnerConfig[Any],
    cfg: FirstLetterConfig,
    load: Callable[[], Any],
    folder: Path | None = None,
    on_batch: OnBatch = ignore_batch,
) -> FirstLetters:
    """Return words, activations and probes of a run's model, from disk if they are there.

    Args:
        run: model and hook.
        cfg: the settings.
        load: returns the language model with its tokenizer. Called only if the activations are not
            stored.
        folder: where they are stored. None does not store them.
        on_batch: is called before each batch of prompts, and while another process makes the same
            activations. It may raise to stop.

    Raises:
        SettingsError: the vocabulary has too few words, or the folder cannot be written.
    """
    if folder is None:
        return look_at_first_letters(load(), ModelHook.of(run), cfg, on_batch).to(run.device)
    check_writable("the folder for first letters", folder)
    key = _key_of(run, cfg)
    home = folder / LETTERS_FOLDER
    home.mkdir(parents=True, exist_ok=True)
    with turn(home / f".{key}.lock", lambda: on_batch(0, 0)):
        found = _activations(home / f"activations-{key}", run, cfg, load, on_batch)
        probe = _probes(_probes_folder(home, key, cfg), found, cfg)
    return with_probes(found, probe, cfg).to(run.device)


def are_stored(
    run: LanguageModelSAERunnerConfig[Any], cfg: FirstLetterConfig, folder: Path
) -> bool:
    """Return whether the activations and probes are stored."""
    key, home = _key_of(run, cfg), folder / LETTERS_FOLDER
    return _is_whole(home / f"activations-{key}") and _is_whole(_probes_folder(home, key, cfg))


def _key_of(run: LanguageModelSAERunnerConfig[Any], cfg: FirstLetterConfig) -> str:
    return hash_of([model_identity(run), cfg.words, cfg.seed, _VERSION])


def _probes_folder(home: Path, key: str, cfg: FirstLetterConfig) -> Path:
    return home / f"probes-{hash_of([key, cfg.probe_epochs, cfg.probe_lr])}"


def _is_whole(folder: Path) -> bool:
    return (folder / MANIFEST_FILENAME).exists() and manifest_mismatch(folder) is None


def _activations(
    folder: Path,
    run: LanguageModelSAERunnerConfig[Any],
    cfg: FirstLetterConfig,
    load: Callable[[], Any],
    on_batch: OnBatch,
) -> LetterActivations:
    if not _is_whole(folder):
        found = read_letter_activations(load(), ModelHook.of(run), cfg, on_batch)
        tensors = {
            "train": found.train.x,
            "train_letter": found.train.letter,
            "test": found.test.x,
            "test_letter": found.test.letter,
            "asked": found.asked,
        }
        facts = {"model_name": run.model_name, "hook_name": run.hook_name, "seed": cfg.seed}
        _store(folder, tensors, {**facts, **found.words._asdict()})
        return found
    tensors, words = load_file(folder / _TENSORS), read_json(folder / _WORDS)
    return LetterActivations(
        Split(words["train"], words["test"]),
        Words(tensors["train"], tensors["train_letter"]),
        Words(tensors["test"], tensors["test_letter"]),
        tensors["asked"],
    )


def _probes(folder: Path, found: LetterActivations, cfg: FirstLetterConfig) -> Probe:
    if not _is_whole(folder):
        probe = train_letter_probes(found, cfg)
        _store(folder, probe._asdict())
        return probe
    return Probe(**load_file(folder / _TENSORS))


def _store(folder: Path, tensors: dict[str, Tensor], words: dict[str, Any] | None = None) -> None:
    # A damaged folder keeps no manifest while its files are replaced.
    (folder / MANIFEST_FILENAME).unlink(missing_ok=True)
    with saved_at_once(folder, last=MANIFEST_FILENAME) as partial:
        save_file(tensors, partial / _TENSORS)
        if words is not None:
            write_json(partial / _WORDS, words)
        write_manifest(partial)
