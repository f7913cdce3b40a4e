"""A language model that is loaded to time its forward passes, evaluations and prompts."""

import time
from typing import Any, NamedTuple

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig
from torch import Tensor
from typing_extensions import Self

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.first_letters import residual_stream
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    language_model_figures,
    make_store,
)
from sae_lens_atm.evaluation.letter_words import (
    PROMPTS_IN_BATCH,
    FirstLetterConfig,
    split_and_prompts,
)
from sae_lens_atm.training.hooks import synchronize
from sae_lens_atm.training.preflight.memory import available_bytes, size_text
from sae_lens_atm.training.preflight.model_facts import (
    NotChecked,
    is_at_hand,
    look_up_model,
    shape_of,
)
from sae_lens_atm.training.preflight.timing import NotTimed, Timed, time_work


class EvaluationTime(NamedTuple):
    """The time to evaluate SAEs on held-out tokens."""

    first: Timed
    """For one SAE, with the passes of the model that all SAEs share."""
    further: float
    """For each further SAE, in seconds."""


class TimedModel(NamedTuple):
    """A language model of a run, its dataset, and a batch of tokens."""

    cfg: LanguageModelSAERunnerConfig[Any]
    model: Any
    store: Any
    loading: float
    """Seconds that loading took."""
    tokens: Tensor
    """A batch of the model."""
    reading: float
    """Seconds that reading the text of a batch took."""

    @classmethod
    def load(cls, cfg: LanguageModelSAERunnerConfig[Any]) -> Self:
        """Load the model and SAELens' activation store, without a download.

        Raises:
            SettingsError: hook, width or context do not fit the model.
            NotTimed: the model or the dataset is not here, or the memory is too small.
        """
        start = time.perf_counter()
        model, store = _load(cfg)
        loading = time.perf_counter() - start
        store.get_batch_tokens()
        start = time.perf_counter()
        tokens = store.get_batch_tokens()
        return cls(cfg, model, store, loading, tokens, time.perf_counter() - start)

    @property
    def share_kept(self) -> float:
        """Share of the tokens that are not excluded from training."""
        if self.store.exclude_special_tokens is None:
            return 1.0
        special = torch.isin(self.tokens, self.store.exclude_special_tokens.to(self.tokens.device))
        return max(1 - special.float().mean().item(), 1 / self.tokens.numel())

    @property
    def evaluated(self) -> Tensor:
        """The tokens of a batch of an evaluation."""
        prompts = self.cfg.eval_batch_size_prompts or self.cfg.store_batch_size_prompts
        return self.tokens.repeat(-(-prompts // len(self.tokens)), 1)[:prompts]

    def wait(self) -> None:
        """Wait until the device has done all work."""
        synchronize(self.cfg.llm_device or self.cfg.device)

    def time_batch(self, limit: float) -> Timed:
        """Return the time of a batch of the model up to the hook, with reading its text.

        Args:
            limit: seconds for the measurement.
        """

        def forward(size: int) -> None:
            self.store.get_activations(part_of(self.tokens, size))
            self.wait()

        timed = time_work(forward, token_sizes(self.tokens), limit)
        return timed._replace(seconds=timed.seconds + self.reading)

    def time_evaluation(self, sae: SAE[Any], limit: float) -> EvaluationTime:
        """Return the time to evaluate SAEs on the tokens of an evaluation.

        Args:
            sae: an SAE at the hook of the run.
            limit: seconds for the measurement.
        """
        cfg, spent = self.cfg, dict[int, tuple[float, float]]()
        sae.cfg.metadata.hook_name = cfg.hook_name
        sae.cfg.metadata.hook_head_index = cfg.hook_head_index
        rows = self.evaluated

        def evaluate_twice(size: int) -> None:
            held_out = HeldOutTokens.from_rows(part_of(rows, size))
            times = [time.perf_counter()]
            for _ in range(2):
                language_model_figures(sae, self.model, held_out, cfg)
                self.wait()
                times.append(time.perf_counter())
            spent[size] = times[1] - times[0], times[2] - times[1]

        timed = time_work(evaluate_twice, token_sizes(rows, 64), limit)
        first, second = spent[timed.measured]
        both = cfg.n_eval_batches * timed.seconds
        further = both * second / (first + second)
        return EvaluationTime(timed._replace(seconds=both - further), further)

    def time_prompts(self, cfg: FirstLetterConfig, limit: float) -> tuple[int, float]:
        """Return the number of prompts for first letters, and the time of all.

        Args:
            cfg: the settings of the first letters.
            limit: seconds for the measurement.

        Raises:
            SettingsError: the vocabulary has too few words.
        """
        _, prompts = split_and_prompts(self.model.tokenizer, cfg.words, cfg.seed)
        number, sample = sum(map(len, prompts)), prompts.asked[:PROMPTS_IN_BATCH]

        def ask(size: int) -> None:
            residual_stream(self.model, ModelHook.of(self.cfg), sample[:size])
            self.wait()

        sizes = sorted({1, min(8, len(sample)), len(sample)})
        return number, number / len(sample) * time_work(ask, sizes, limit).seconds


def _load(cfg: LanguageModelSAERunnerConfig[Any]) -> tuple[Any, Any]:
    """Load the model and SAELens' activation store, without a download."""
    try:
        if not is_at_hand(cfg):
            raise NotTimed(f"{cfg.model_name} is not on this machine")
        shape = shape_of(cfg, look_up_model(cfg, online=False))
    except NotChecked as reason:
        raise NotTimed(str(reason)) from reason
    needed, free = shape.parameters * shape.dtype.itemsize, available_bytes(cfg.llm_device)
    if free is not None and needed > 0.9 * free:
        raise NotTimed(
            f"{cfg.model_name} needs {size_text(needed)}, and {cfg.llm_device} has "
            f"{size_text(free)} free"
        )
    model = load_language_model(cfg)
    try:
        return model, make_store(cfg, model)
    except SettingsError as error:  # the dataset may be out of reach here alone
        raise NotTimed(str(error)) from error


def token_sizes(tokens: Tensor, smallest: int = 16) -> list[int]:
    """Return numbers of tokens to time: a part of one prompt, one prompt, all prompts."""
    context = tokens.shape[1]
    return sorted({min(smallest, context), context, tokens.numel()})


def part_of(tokens: Tensor, size: int) -> Tensor:
    """Return part of the first prompt, or the first prompts, with `size` tokens in all."""
    context = tokens.shape[1]
    return tokens[:1, :size] if size <= context else tokens[: size // context]
