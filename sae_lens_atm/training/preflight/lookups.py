"""What a dry run looks up beyond the run file: everything short of the download of the weights.

What cannot be looked up is said in a line and is no error: a plan may be made offline, and
elsewhere than it is carried out.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from datasets import load_dataset
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_atm.data.language_model import (
    NotChecked,
    check_hook_without_weights,
    hub_answers,
    look_up_model,
    measure,
    one_line,
    saved_dataset,
    within,
)
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight import memory as budget
from sae_lens_atm.training.preflight.memory import GIB, LanguageModel

# In the order in which SAELens' activation store looks for them.
_TOKENS, _TEXT = ("tokens", "input_ids"), ("text", "problem")
_CHATS = ("conversation", "conversations", "messages", "text")
_PATIENCE = 30.0  # seconds for the first row of a dataset


def look_up(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, str]:
    """Check model, hook, width and dataset, and say what memory, disk and time the run needs.

    Raises:
        SettingsError: something was found and does not fit.
    """
    facts = {"disk": _disk(cfg)}
    if cfg.use_cached_activations:
        return facts
    online = hub_answers()
    try:
        known = look_up_model(cfg, online)
        check_hook_without_weights(cfg, known)
        model = measure(cfg, known)
    except NotChecked as reason:
        facts["checked"] = f"not checked: the model ({reason})"
    else:
        facts["checked"] = f"hook and d_in, from {known.source}: {_shape(model)}"
        facts |= needs(cfg, model)
    if not online and not Path(cfg.dataset_path).exists():
        return facts | {"columns": "not checked: the dataset (the Hub does not answer)"}
    return facts | {"columns": _columns(cfg)}


def needs(cfg: LanguageModelSAERunnerConfig[Any], model: LanguageModel) -> dict[str, str]:
    """Memory and time, worked out."""
    parts = budget.memory(cfg, model)
    memory = f"about {budget.describe(parts, GIB, 'GiB')}"
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(torch.device(cfg.device)).total_memory
        fits = "this GPU has" if sum(parts.values()) < 0.9 * there else "TOO MUCH: this GPU has"
        memory += f"; {fits} {there / GIB:.1f}"
    time = budget.describe(budget.seconds(cfg, model), 3600, "hours")
    return {
        "memory": memory,
        "time": f"about {time}, at {budget.SHARE:.0%} of the peak of an A100; not measured",
    }


def _shape(model: LanguageModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.parameters:,} parameters in {dtype}, {model.layers} layers"


def _disk(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    output = Path(cfg.output_path or "").absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, budget.disk(cfg)
    there = "free here" if needed < free else "free here: TOO LITTLE"
    return f"{needed / GIB:.1f} GiB for checkpoints and the SAE; {free / GIB:.1f} GiB {there}"


def _columns(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    try:
        row = within(_PATIENCE, lambda: _first_row(cfg.dataset_path))
    except Exception as error:
        return f"not checked: the dataset ({one_line(error)})"
    wanted = _CHATS if cfg.use_chat_formatting else (*_TOKENS, *_TEXT)
    column = next((name for name in wanted if name in row), None)
    if column is None:
        raise SettingsError(
            f"dataset_path {cfg.dataset_path!r} has the columns {', '.join(row)}: needed is one "
            f"of {', '.join(wanted)}"
        )
    tokenized = column in _TOKENS and not cfg.use_chat_formatting
    if tokenized and len(row[column]) < cfg.context_size:
        raise SettingsError(
            f"context_size is {cfg.context_size}: allowed is at most {len(row[column])}, the "
            f"tokens in a row of dataset_path {cfg.dataset_path!r}"
        )
    return f"{column}, {'tokenised' if tokenized else 'tokenised on the way'}"


def _first_row(path: str) -> dict[str, Any]:
    saved = saved_dataset(path)
    rows: Any = load_dataset(path, split="train", streaming=True) if saved is None else saved
    return cast(dict[str, Any], next(iter(rows)))
