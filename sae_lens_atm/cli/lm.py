"""The work of the command that makes a small language model."""

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sae_lens.load_model import load_model

from sae_lens_atm.cli.progress import BatchesProgress
from sae_lens_atm.cli.terminal import console
from sae_lens_atm.data.spelling.model import HOOK, TOKENS, SpellingLMConfig, make_spelling_lm
from sae_lens_atm.evaluation.first_letters import SMALL_MODEL, look_at_first_letters
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.schema import parse_fields


def make_and_probe(folder: Path, values: dict[str, Any]) -> None:
    """Make a language model, and print how well linear probes read first letters from it.

    Args:
        folder: the folder of the model.
        values: fields of SpellingLMConfig.
    """
    cfg = parse_fields(SpellingLMConfig, values, "")
    columns = (TextColumn("training"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=cfg.steps)
        make_spelling_lm(cfg, folder, lambda _loss: bar.advance(task))
    silence_saelens()
    model = load_model("AutoModelForCausalLM", str(folder), "cpu", hook_names=[HOOK])
    with BatchesProgress(console, "first letters") as progress:
        letters = look_at_first_letters(model, ModelHook(HOOK), SMALL_MODEL, progress.on_batch)
    console.print(
        f"saved {folder}: hook {HOOK}, d_in {cfg.d_model}, tokens in {folder / TOKENS}\n"
        f"letter probes on held-out words: mean F1 {letters.probe_f1.mean():.3f}, "
        f"{letters.above.sum()} of 26 above {SMALL_MODEL.min_f1}",
        highlight=False,
    )
