"""Look up model, hook and dataset before a run, without loading or downloading the weights.

What cannot be looked up is reported in the table of a dry run and is no error. A dry run may be
made offline, or on another machine than the run.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from datasets import load_dataset
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_atm.data.language_model import saved_dataset
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import existing_parent
from sae_lens_atm.training.preflight import memory
from sae_lens_atm.training.preflight.memory import GIB
from sae_lens_atm.training.preflight.model_facts import (
    ModelShape,
    NotChecked,
    check_hook_without_weights,
    hub_answers,
    is_path,
    look_up_model,
    shape_of,
    short,
    within,
)

# In the order in which SAELens' activation store tries them.
_TOKENS, _TEXT = ("tokens", "input_ids"), ("text", "problem")
_CHATS = ("conversation", "conversations", "messages", "text")
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    "spiece.model",
)
_FIRST_ROW_TIMEOUT = 30.0  # seconds


def look_up(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, str]:
    """Check model, hook, width and dataset, and return the memory and disk that a run needs.

    Raises:
        SettingsError: model, hook, width or dataset do not fit.
    """
    facts = {"disk": _disk(cfg)}
    if cfg.use_cached_activations:
        return facts
    is_here = Path(cfg.model_name).is_dir() and Path(cfg.dataset_path).exists()
    online = not is_here and hub_answers()
    return facts | check_model(cfg, online) | check_dataset(cfg, online)


def check_files(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Check model and dataset of a run where they are files of this machine. Needs no connection.

    Raises:
        SettingsError: model, hook, width or dataset do not fit.
    """
    if Path(cfg.model_name).is_dir() or is_path(cfg.model_name):
        check_model(cfg, online=False)
    if Path(cfg.dataset_path).exists():
        check_dataset(cfg, online=False)


def check_model(cfg: LanguageModelSAERunnerConfig[Any], online: bool) -> dict[str, str]:
    """Check model, tokenizer, hook and width. Return what was checked, and the memory for a run.

    Args:
        cfg: the settings of the run.
        online: whether the Hub answers.

    Raises:
        SettingsError: they do not fit.
    """
    folder = Path(cfg.model_name)
    needs_tokenizer = folder.is_dir() and cfg.model_class_name == "AutoModelForCausalLM"
    if needs_tokenizer and not any((folder / name).exists() for name in _TOKENIZERS):
        raise SettingsError(
            f"model_name is {cfg.model_name!r}: the folder has no tokenizer, save it there (one of "
            f"{', '.join(_TOKENIZERS)})"
        )
    try:
        meta = look_up_model(cfg, online)
        check_hook_without_weights(cfg, meta)
        shape = shape_of(cfg, meta)
        _check_separator(cfg, shape.vocabulary)
    except NotChecked as reason:
        return {"checked": f"not checked: the model ({reason})"}
    return {
        "checked": f"hook and d_in, from {meta.source}: {_describe(shape)}",
        "memory": memory_needed(cfg, shape),
    }


def _check_separator(cfg: LanguageModelSAERunnerConfig[Any], vocabulary: int) -> None:
    token = cfg.sequence_separator_token
    if isinstance(token, int) and not 0 <= token < vocabulary:
        raise SettingsError(
            f"sequence_separator_token must be a token of the model, 0 to {vocabulary - 1}, got "
            f"{token}"
        )


def check_dataset(cfg: LanguageModelSAERunnerConfig[Any], online: bool) -> dict[str, str]:
    """Check that the first row of a dataset holds text or enough tokens. Return what it holds.

    Args:
        cfg: the settings of the run.
        online: whether the Hub answers.

    Raises:
        SettingsError: it does not, or a dataset on this machine cannot be read.
    """
    is_here = Path(cfg.dataset_path).exists()
    if not is_here and not online:
        return {"columns": "not checked: the dataset (the Hub does not answer)"}
    try:
        row = within(_FIRST_ROW_TIMEOUT, lambda: _first_row(cfg.dataset_path))
    except Exception as error:
        if isinstance(error, SettingsError):
            raise
        if is_here and not isinstance(error, NotChecked):
            raise SettingsError(
                f"dataset_path {cfg.dataset_path!r} cannot be read: {short(error)}"
            ) from error
        return {"columns": f"not checked: the dataset ({short(error)})"}
    return {"columns": _columns(cfg, row)}


def memory_needed(cfg: LanguageModelSAERunnerConfig[Any], shape: ModelShape) -> str:
    """Return the memory that a run needs as text, and whether the GPU of this machine has it."""
    parts = memory.memory(cfg, shape)
    text = f"about {memory.describe(parts)}"
    if torch.cuda.is_available() and torch.device(cfg.device).type == "cuda":
        total = torch.cuda.get_device_properties(torch.device(cfg.device)).total_memory
        fits = "this GPU has" if sum(parts.values()) < 0.9 * total else "TOO MUCH: this GPU has"
        text += f"; {fits} {total / GIB:.1f}"
    return text


def _describe(shape: ModelShape) -> str:
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{shape.parameters:,} parameters in {dtype}, {shape.layers} layers"


def _disk(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    existing = existing_parent(Path(cfg.output_path or ""))
    free, needed = shutil.disk_usage(existing).free, memory.disk(cfg)
    enough = "free here" if needed < free else "free here: TOO LITTLE"
    sizes = memory.size_text(needed), memory.size_text(free)
    return f"{sizes[0]} for checkpoints and the SAE; {sizes[1]} {enough}"


def _columns(cfg: LanguageModelSAERunnerConfig[Any], row: dict[str, Any]) -> str:
    wanted = _CHATS if cfg.use_chat_formatting else (*_TOKENS, *_TEXT)
    column = next((name for name in wanted if name in row), None)
    if column is None:
        raise SettingsError(
            f"dataset_path {cfg.dataset_path!r} must have one of the columns {', '.join(wanted)}, "
            f"got {', '.join(row)}"
        )
    tokenized = column in _TOKENS and not cfg.use_chat_formatting
    if tokenized and len(row[column]) < cfg.context_size:
        raise SettingsError(
            f"context_size must be at most {len(row[column])}, the tokens in a row of "
            f"dataset_path {cfg.dataset_path!r}, got {cfg.context_size}"
        )
    if not tokenized and not isinstance(row[column], str | list):
        raise SettingsError(
            f"column {column} of dataset_path {cfg.dataset_path!r} must hold text, got "
            f"{type(row[column]).__name__}"
        )
    return f"{column}, {'tokenised' if tokenized else 'tokenised during training'}"


def _first_row(path: str) -> dict[str, Any]:
    try:
        saved = saved_dataset(path)
        rows: Any = load_dataset(path, split="train", streaming=True) if saved is None else saved
        row = next(iter(rows), None)
    except IndexError:  # from `load_from_disk`, if it was saved without rows
        row = None
    if row is None:
        raise SettingsError(f"dataset_path {path!r} has no rows")
    return cast(dict[str, Any], row)
