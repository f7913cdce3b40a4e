"""CE-Bench's contrastive score of an SAE, on pairs of opposite stories.

The stories are those of a dataset with the columns `story1` and `story2`. The score is that of
`metrics.contrastive`. It needs the activations at all tokens of the stories. The model reads them
once for all SAEs that one process evaluates. They stay in memory: with 200 pairs of 2 x 250 tokens,
100,000 times `d_in` values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig
from torch import Tensor

from sae_lens_atm.data.language_model import saved_dataset
from sae_lens_atm.errors import SettingsError, with_type
from sae_lens_atm.evaluation.hooked_reading import ModelHook, activations_of
from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.evaluation.task_activations import batches_by_length, context_of
from sae_lens_atm.metrics import ContrastiveScore

_KEY, _COLUMNS = "contrastive_stories", ("story1", "story2")

StoryPair = tuple[str, str]
"""A story and the opposite one."""
StoryActivations = list[tuple[Tensor, Tensor]]
"""The activations of each pair of stories, each ``(tokens, d_in)``, on the CPU."""


@dataclass(frozen=True)
class ContrastiveStoriesConfig:
    """Settings for the contrastive score.

    Args:
        dataset: the stories: a name on the Hugging Face Hub, or a folder with a dataset. By default
            those of CE-Bench.
        pairs: number of pairs, at even distances in the dataset. None for all; CE-Bench has 5000.
    """

    dataset: str = "GulkoA/contrastive-stories-v4"
    pairs: int | None = 200

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs must be above 0, got {self.pairs}")


def read_stories(cfg: ContrastiveStoriesConfig | None) -> list[StoryPair]:
    """Return the pairs of stories; without settings none.

    Raises:
        SettingsError: the dataset cannot be read, or lacks a column.
    """
    if cfg is None:
        return []
    try:
        stored: Any = saved_dataset(cfg.dataset)
        dataset: Any = load_dataset(cfg.dataset, split="train") if stored is None else stored
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise SettingsError(
            f"{_KEY}.dataset must be a name on the Hub or a folder with a dataset, got "
            f"{cfg.dataset!r}: {with_type(error)}"
        ) from error
    if not set(_COLUMNS) <= set(dataset.column_names):
        raise SettingsError(
            f"{_KEY}.dataset must have the columns {' and '.join(_COLUMNS)}, got {cfg.dataset!r} "
            f"with {', '.join(dataset.column_names)}"
        )
    number = min(cfg.pairs or len(dataset), len(dataset))
    chosen = dataset.select([i * len(dataset) // number for i in range(number)])
    first, second = (chosen[name] for name in _COLUMNS)
    return list(zip(first, second, strict=True))


def story_activations(
    model: Any,
    run: LanguageModelSAERunnerConfig[Any],
    stories: Sequence[StoryPair],
    on_batch: OnBatch = ignore_batch,
) -> StoryActivations:
    """Return the activations of pairs of stories.

    The tokens are those that the tokenizer gives by default, as in CE-Bench. Of a story longer than
    the model's context, the first tokens are read.

    Args:
        model: the language model, with its tokenizer.
        run: has the hook.
        stories: the stories.
        on_batch: is called before each batch, with the stories done and all of them. It may raise.
    """
    if not stories:
        return []
    hook, context = ModelHook.of(run), context_of(model)
    every: list[list[int]] = model.tokenizer([t for pair in stories for t in pair])["input_ids"]
    rows = [tokens[:context] or [0] for tokens in every]
    found: dict[int, Tensor] = {}
    for batch in batches_by_length(rows):
        on_batch(len(found), len(rows))
        read = activations_of(model, hook, [rows[i] for i in batch])
        found |= zip(batch, read, strict=True)
    return [(found[i], found[i + 1]) for i in range(0, len(rows), 2)]


@torch.no_grad()
def contrastive_figures(sae: SAE[Any], stories: StoryActivations) -> dict[str, float]:
    """Return the contrastive score of an SAE; without stories nothing.

    Args:
        sae: an SAE, trained at the hook where the activations were read.
        stories: the activations.
    """
    if not stories:
        return {}
    metric = ContrastiveScore()
    for pair in stories:
        first, second = (sae.encode(x.to(sae.device, sae.dtype)).to_dense() for x in pair)
        metric.update(first, second)
    return {"contrastive_score": metric.compute()}
