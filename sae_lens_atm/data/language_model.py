"""Load a language model, check the hook that an SAE reads, and open datasets in local folders."""

import difflib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.load_model import load_model

from sae_lens_atm.errors import SettingsError, with_type

_METADATA = (
    *("model_name", "model_class_name", "model_from_pretrained_kwargs"),
    *("hook_name", "hook_head_index", "dataset_path", "context_size", "prepend_bos"),
    *("seqpos_slice", "exclude_special_tokens"),
    *("sequence_separator_token", "disable_concat_sequences"),
)


def load_language_model(cfg: LanguageModelSAERunnerConfig[Any]) -> Any:
    """Return the language model of a run.

    Raises:
        SettingsError: the model cannot be loaded, or hook_name or sae.d_in do not fit it.
    """

    def load(hook_names: list[str] | None) -> Any:
        return load_model(
            cfg.model_class_name,
            cfg.model_name,
            device=cfg.llm_device or cfg.device,
            model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
            hook_names=hook_names,
        )

    try:
        try:
            model = load([cfg.hook_name])
        except ValueError as error:
            if "hook_names" not in str(error):
                raise
            model = load(None)  # with all hooks, so that `check_hook` can name similar ones
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingsError(
            f"cannot load model_name {cfg.model_name!r}: {with_type(error)}"
        ) from error
    check_hook(cfg, model)
    return model


def set_metadata(sae: Any, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Record in an SAE on which activations it is trained, as SAELens' runner does for its own."""
    metadata = sae.cfg.metadata
    for name in _METADATA:
        setattr(metadata, name, getattr(cfg, name))


@torch.no_grad()
def check_hook(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> None:
    """Check hook, head, width, context size and chat format of a run, with one token.

    The hook must exist, its width must be the SAE's `d_in`, and the model must have as many
    positions as the context.

    Raises:
        SettingsError: one of them does not fit. The message names similar hooks, or the width.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if cfg.use_chat_formatting and tokenizer is not None and not tokenizer.chat_template:
        raise SettingsError(
            f"use_chat_formatting must be False, as the tokenizer of {cfg.model_name} has no chat "
            "template, got True"
        )
    if cfg.hook_name not in model.hook_dict:
        inner: Any = getattr(model, "model", model)
        names = dict.fromkeys([*model.hook_dict, *(name for name, _ in inner.named_modules())])
        close = difflib.get_close_matches(cfg.hook_name, names, n=3, cutoff=0.4)
        similar = f"; similar names: {', '.join(close)}" if close else ""
        raise SettingsError(f"hook_name is {cfg.hook_name!r}: no such hook in the model{similar}")
    positions = _positions(model)
    if positions is not None and cfg.context_size > positions:
        raise SettingsError(
            f"context_size must be at most {positions}, the positions of {cfg.model_name}, "
            f"got {cfg.context_size}"
        )
    token = torch.zeros(1, 1, dtype=torch.long, device=cfg.llm_device)
    _, cache = model.run_with_cache(token, names_filter=[cfg.hook_name], **cfg.model_kwargs)
    if cfg.hook_name not in cache:
        raise SettingsError(f"hook_name is {cfg.hook_name!r}: its output is not a tensor")
    shape, head = cache[cfg.hook_name].shape[2:], cfg.hook_head_index
    if head is not None and (len(shape) < 2 or not 0 <= head < shape[0]):
        heads = f"from 0 to {shape[0] - 1}" if len(shape) > 1 else "None, as the hook has no heads"
        raise SettingsError(f"hook_head_index must be {heads}, got {head}")
    width = shape[-1] if head is not None else shape.numel()
    if width != cfg.sae.d_in:
        raise SettingsError(f"sae.d_in must be {width}, the width of the hook, got {cfg.sae.d_in}")


def _positions(model: Any) -> int | None:
    """Return the largest number of tokens in a prompt of a model, or None if it is unknown."""
    if hasattr(model, "cfg"):  # TransformerLens
        return getattr(model.cfg, "n_ctx", None)
    inner: Any = getattr(model, "model", model)
    return getattr(getattr(inner, "config", None), "max_position_embeddings", None)


def saved_dataset(path: str) -> Dataset | None:
    """Return a dataset written by `Dataset.save_to_disk`, or None if the path holds none.

    SAELens reads datasets with `load_dataset`, which does not read such folders.
    """
    if not any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    dataset = load_from_disk(path)
    return dataset["train"] if isinstance(dataset, DatasetDict) else dataset
