"""The shape of a language model, and its modules without weights, before anything is downloaded."""

import copy
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NamedTuple, TypeVar, cast

import torch
from huggingface_hub import get_session, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
)
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sae_lens_atm.data.language_model import check_hook
from sae_lens_atm.errors import SettingsError, with_type

_T = TypeVar("_T")
_HUB_TIMEOUT, _CONFIG_TIMEOUT = 3.0, 15.0  # seconds
_SHORT = 160  # characters of an error

# From their config.json, for a dry run without a connection.
PUBLIC_FACTS: dict[str, dict[str, Any]] = {
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256_000,
    },
    "google/gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "intermediate_size": 14_336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256_000,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_ctx": 1024,
        "n_positions": 1024,
        "vocab_size": 50_257,
    },
    "EleutherAI/pythia-160m-deduped": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "vocab_size": 50_304,
    },
}


class NotChecked(Exception):
    """Something could not be looked up. The message says why."""


class ModelWithoutWeights(NamedTuple):
    """A language model on the meta device."""

    model: Any
    config: PretrainedConfig
    source: str
    """Where the configuration comes from."""


class ModelShape(NamedTuple):
    """What the memory of a forward pass depends on."""

    parameters: int
    dtype: torch.dtype
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int


# --- asking the Hub ------------------------------------------------------------------------------


def within(seconds: float, function: Callable[[], _T]) -> _T:
    """Return the result of a function, or raise its error, if it ends in time.

    Raises:
        NotChecked: it did not. Its thread continues until the process ends.
    """
    answers: Queue[tuple[bool, Any]] = Queue()

    def run() -> None:
        try:
            answers.put((True, function()))
        except BaseException as error:
            answers.put((False, error))

    Thread(target=run, daemon=True).start()
    try:
        succeeded, answer = answers.get(timeout=seconds)
    except Empty:
        raise NotChecked(f"no answer within {seconds:.0f} s") from None
    if not succeeded:
        raise answer
    return answer


def hub_answers() -> bool:
    """Return whether the Hub can be reached. One request: its client would retry for 30 s."""
    try:
        within(2 * _HUB_TIMEOUT, lambda: get_session().head(ENDPOINT, timeout=_HUB_TIMEOUT))
    except Exception:
        return False
    return True


def is_at_hand(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    """Return whether the weights of a run's model are in a local folder or in the Hub's cache."""
    name = cfg.model_name
    if cfg.model_class_name == "HookedTransformer":
        name = _official(name)
    if Path(name).is_dir():
        return True
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except ValueError:  # not a name on the Hub
        return False


# --- the model -----------------------------------------------------------------------------------


def look_up_model(cfg: LanguageModelSAERunnerConfig[Any], online: bool) -> ModelWithoutWeights:
    """Return the model of a run without its weights.

    Its configuration comes from a local folder, from the Hub's cache, from the Hub if `online`,
    or else from `PUBLIC_FACTS`.

    Raises:
        SettingsError: there is no such model.
        NotChecked: its configuration could not be read.
    """
    name, hooked = cfg.model_name, cfg.model_class_name == "HookedTransformer"
    if not hooked and cfg.model_class_name != "AutoModelForCausalLM":
        raise NotChecked(f"model_class_name is {cfg.model_class_name}")
    if hooked:
        name = _official(name)
    elif not name or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        raise SettingsError(f"model_name is {name!r}: there is no config.json of a model")
    try:
        config, source = within(_CONFIG_TIMEOUT, lambda: _config(name, online)), "its config.json"
    except Exception as error:
        if _is_missing(name, error):
            if is_path(name):
                raise SettingsError(f"model_name is {cfg.model_name!r}: no such folder") from error
            raise SettingsError(
                f"model_name is {cfg.model_name!r}: no such model on the Hub, or no access to it"
            ) from error
        if name not in PUBLIC_FACTS:
            raise NotChecked(short(error)) from error
        config, source = AutoConfig.for_model(**PUBLIC_FACTS[name]), "public facts, not the Hub"
    try:
        return ModelWithoutWeights(_without_weights(hooked, config), config, source)
    except Exception as error:  # architectures fail without weights in many ways
        raise NotChecked(short(error)) from error


def _config(name: str, online: bool) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(name, local_files_only=not online)
    return cast(PretrainedConfig, config)


def _official(name: str) -> str:
    try:
        return get_official_model_name(name)
    except ValueError as error:
        reason = str(error).partition(". Valid")[0]
        raise SettingsError(f"model_name is {name!r}: {reason} in TransformerLens") from error


def is_path(name: str) -> bool:
    """Return whether a name is a path, and no name on the Hub."""
    return Path(name).is_absolute() or name.startswith(".")


def _is_missing(name: str, error: BaseException) -> bool:
    """Return whether an error means that there is no such model, and not a lost connection."""
    if is_path(name):
        return not Path(name).is_dir()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RepositoryNotFoundError):
            return not isinstance(cause, GatedRepoError)
        cause = cause.__cause__
    return False


def _without_weights(hooked: bool, config: PretrainedConfig) -> Any:
    config = copy.copy(config)
    config.pad_token_id = None  # transformers compares tokens with it, which fails on meta tensors
    with torch.device("meta"):
        if not hooked:
            return HookedProxyLM(AutoModelForCausalLM.from_config(config), cast(Any, None))
        with TemporaryDirectory() as folder:  # TransformerLens reads names and folders
            config.save_pretrained(folder)
            cfg: Any = get_pretrained_model_config(folder)
        cfg.tokenizer_name, cfg.device = None, "meta"
        return HookedTransformer(cfg, move_to_device=False)


def shape_of(cfg: LanguageModelSAERunnerConfig[Any], meta: ModelWithoutWeights) -> ModelShape:
    """Return the sizes of a run's model."""
    config: Any = meta.config
    return ModelShape(
        parameters=sum(p.numel() for p in meta.model.parameters()),
        dtype=_dtype(cfg, config),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
    )


def _dtype(cfg: LanguageModelSAERunnerConfig[Any], config: Any) -> torch.dtype:
    """Return the dtype of the loaded model: TransformerLens' float32, transformers' as stored."""
    given = cfg.model_from_pretrained_kwargs or {}
    default = None if cfg.model_class_name == "HookedTransformer" else config.dtype
    dtype = given.get("dtype", given.get("torch_dtype")) or default
    dtype = default if dtype == "auto" else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_hook_without_weights(
    cfg: LanguageModelSAERunnerConfig[Any], meta: ModelWithoutWeights
) -> None:
    """Check hook and width (`check_hook`) before the weights are downloaded."""
    on_meta = copy.copy(cfg)
    on_meta.llm_device = "meta"
    check_hook(on_meta, meta.model)


def short(error: BaseException) -> str:
    """Return the type and message of an error in one short line."""
    text = with_type(error)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."
