"""A language model before its weights: its shape, its hooks, what a forward pass costs."""

import copy
import difflib
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NamedTuple, TypeVar, cast

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import get_session
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight.memory import LanguageModel

_T = TypeVar("_T")
_HUB, _PATIENCE = 3.0, 15.0  # seconds for the Hub to answer at all, and to send a config.json


class NotChecked(Exception):
    """Something could not be looked up, and why."""


class Known(NamedTuple):
    """A language model without weights, and where its shape is known from."""

    model: Any
    config: PretrainedConfig
    source: str


# Public facts of the models in `configs/`, from their config.json, for a plan made offline.
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


def within(seconds: float, look: Callable[[], _T]) -> _T:
    """What `look` returns or raises, or `NotChecked`: whatever it waits for, this does not."""
    answers: Queue[tuple[bool, Any]] = Queue()

    def ask() -> None:
        try:
            answers.put((True, look()))
        except BaseException as error:
            answers.put((False, error))

    Thread(target=ask, daemon=True).start()
    try:
        done, answer = answers.get(timeout=seconds)
    except Empty:
        raise NotChecked(f"no answer within {seconds:.0f} s") from None
    if not done:
        raise answer
    return answer


def hub_answers() -> bool:
    """Whether the Hub can be reached: asked once, as its client would try for half a minute."""
    try:
        within(2 * _HUB, lambda: get_session().head(ENDPOINT, timeout=_HUB))
    except Exception:
        return False
    return True


def look_up_model(cfg: LanguageModelSAERunnerConfig[Any], online: bool) -> Known:
    """The model of a run without its weights, from a local folder, the Hub's cache or, if `online`,
    the Hub, or else from the public facts.

    Raises:
        SettingsError: there is none of that name.
        NotChecked: it is not known here.
    """
    name, hooked = cfg.model_name, cfg.model_class_name == "HookedTransformer"
    if not hooked and cfg.model_class_name != "AutoModelForCausalLM":
        raise NotChecked(f"model_class_name is {cfg.model_class_name}")
    if hooked:
        name = _official(name)
    try:
        config, source = within(_PATIENCE, lambda: _config(name, online)), "its config.json"
    except Exception as error:
        if _is_missing(name, error):
            raise SettingsError(
                f"model_name is {cfg.model_name!r}: no such model on the Hub, or no access to it"
            ) from error
        if name not in PUBLIC_FACTS:
            raise NotChecked(one_line(error)) from error
        config, source = AutoConfig.for_model(**PUBLIC_FACTS[name]), "public facts, not the Hub"
    try:
        return Known(_without_weights(hooked, config), config, source)
    except Exception as error:  # whatever an architecture stumbles on without weights
        raise NotChecked(one_line(error)) from error


def _config(name: str, online: bool) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(name, local_files_only=not online)
    return cast(PretrainedConfig, config)


def _official(name: str) -> str:
    try:
        return get_official_model_name(name)
    except ValueError as error:
        reason = str(error).partition(". Valid")[0]
        raise SettingsError(f"model_name is {name!r}: {reason} in TransformerLens") from error


def _is_missing(name: str, error: BaseException) -> bool:
    """Whether this says that there is no such model, and not just that nobody answers."""
    if Path(name).is_absolute() or name.startswith("."):
        return not Path(name).is_dir()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RepositoryNotFoundError):
            return not isinstance(cause, GatedRepoError)
        cause = cause.__cause__
    return False


def _without_weights(hooked: bool, config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        if not hooked:
            return HookedProxyLM(AutoModelForCausalLM.from_config(config), cast(Any, None))
        with TemporaryDirectory() as folder:  # TransformerLens reads names and folders
            config.save_pretrained(folder)
            cfg: Any = get_pretrained_model_config(folder)
        cfg.tokenizer_name, cfg.device = None, "meta"
        return HookedTransformer(cfg, move_to_device=False)


def measure(cfg: LanguageModelSAERunnerConfig[Any], known: Known) -> LanguageModel:
    """What a forward pass of a run's model costs, its operations counted without doing any."""
    config: Any = known.config
    count = FlopCounterMode(display=False)
    with torch.no_grad(), count:
        known.model.run_with_cache(
            torch.zeros(1, cfg.context_size, dtype=torch.long, device="meta"),
            names_filter=[cfg.hook_name],
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(cfg.hook_name),
            prepend_bos=False,
            **cfg.model_kwargs,
        )
    return LanguageModel(
        parameters=sum(p.numel() for p in known.model.parameters()),
        dtype=_dtype(cfg, config),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        flops=count.get_total_flops() / cfg.context_size,
    )


def _dtype(cfg: LanguageModelSAERunnerConfig[Any], config: Any) -> torch.dtype:
    """As the loaders choose it: TransformerLens float32, transformers what the weights are in."""
    given = cfg.model_from_pretrained_kwargs or {}
    default = None if cfg.model_class_name == "HookedTransformer" else config.dtype
    dtype = given.get("dtype", given.get("torch_dtype")) or default
    dtype = default if dtype == "auto" else dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def check_hook_without_weights(cfg: LanguageModelSAERunnerConfig[Any], known: Known) -> None:
    """`check_hook`, before anything is downloaded."""
    elsewhere = copy.copy(cfg)
    elsewhere.llm_device = "meta"
    check_hook(elsewhere, known.model)


@torch.no_grad()
def check_hook(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> None:
    """Check that the hook exists and that the SAE fits it, with one token.

    Raises:
        SettingsError: naming the nearest hooks, or the width that fits.
    """
    if cfg.hook_name not in model.hook_dict:
        inner: Any = getattr(model, "model", model)
        names = dict.fromkeys([*model.hook_dict, *(name for name, _ in inner.named_modules())])
        close = difflib.get_close_matches(cfg.hook_name, names, n=3, cutoff=0.4)
        near = f", near it are {', '.join(close)}" if close else ""
        raise SettingsError(f"hook_name is {cfg.hook_name!r}: no such hook in the model{near}")
    token = torch.zeros(1, 1, dtype=torch.long, device=cfg.llm_device)
    _, cache = model.run_with_cache(token, names_filter=[cfg.hook_name], **cfg.model_kwargs)
    shape = cache[cfg.hook_name].shape[2:]
    width = shape[-1] if cfg.hook_head_index is not None else shape.numel()
    if width != cfg.sae.d_in:
        raise SettingsError(f"sae.d_in is {cfg.sae.d_in}: allowed is {width}, the hook's width")


def saved_dataset(path: str) -> Dataset | None:
    """A dataset that `Dataset.save_to_disk` wrote, which SAELens' `load_dataset` does not read."""
    if not any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    dataset = load_from_disk(path)
    return dataset["train"] if isinstance(dataset, DatasetDict) else dataset


def one_line(error: BaseException, most: int = 160) -> str:
    """An error in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else f"{text[:most]}..."
