"""Look up model, hook and dataset for a dry run, without downloading the weights.

What cannot be looked up is reported in the table and is no error. A dry run may be made offline,
or on another machine than the run.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from datasets import load_dataset
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_atm.data.language_model import saved_dataset
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight import memory
from sae_lens_atm.training.preflight.memory import GIB
from sae_lens_atm.training.preflight.model_facts import (
    ModelShape,
    NotChecked,
    check_hook_without_weights,
    hub_answers,
    look_up_model,
    shape_of,
    short,
    within,
)

# In the order in which SAELens' activation store tries them.
_TOKENS, _TEXT = ("tokens", "input_ids"), ("text", "problem")
_CHATS = ("conversation", "conversations", "messages", "text")
_FIRST_ROW_TIMEOUT = 30.0  # seconds


def look_up(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, str]:
    """Check model, hook, width and dataset, and return the memory and disk that a run needs.

    Raises:
        SettingsError: model, hook, width or dataset do not fit.
    """
    facts = {"disk": _disk(cfg)}
    if cfg.use_cached_activations:
        return facts
    online = hub_answers()
    try:
        meta = look_up_model(cfg, online)
        check_hook_without_weights(cfg, meta)
        shape = shape_of(cfg, meta)
    except NotChecked as reason:
        facts["checked"] = f"not checked: the model ({reason})"
    else:
        facts["checked"] = f"hook and d_in, from {meta.source}: {_describe(shape)}"
        facts["memory"] = memory_needed(cfg, shape)
    if not online and not Path(cfg.dataset_path).exists():
        return facts | {"columns": "not checked: the dataset (the Hub does not answer)"}
    return facts | {"columns": _columns(cfg)}


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
    output = Path(cfg.output_path or "").absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, memory.disk(cfg)
    enough = "free here" if needed < free else "free here: TOO LITTLE"
    sizes = memory.size_text(needed), memory.size_text(free)
    return f"{sizes[0]} for checkpoints and the SAE; {sizes[1]} {enough}"


def _columns(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    try:
        row = within(_FIRST_ROW_TIMEOUT, lambda: _first_row(cfg.dataset_path))
    except Exception as error:
        return f"not checked: the dataset ({short(error)})"
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
    return f"{column}, {'tokenised' if tokenized else 'tokenised during training'}"


def _first_row(path: str) -> dict[str, Any]:
    saved = saved_dataset(path)
    rows: Any = load_dataset(path, split="train", streaming=True) if saved is None else saved
    return cast(dict[str, Any], next(iter(rows)))
