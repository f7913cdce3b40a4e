"""The command that makes a small language model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sae_lens.load_model import load_model

from sae_lens_atm.cli.terminal import clear_errors, console
from sae_lens_atm.data.spelling.model import HOOK, TOKENS, SpellingLMConfig, make_spelling_lm
from sae_lens_atm.evaluation.first_letters import SMALL_MODEL, look_at_first_letters
from sae_lens_atm.files import check_writable
from sae_lens_atm.metrics.first_letter import PROBE_F1
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.schema import parse_fields
from sae_lens_atm.yaml_files import apply_overrides


def make_lm(
    folder: Annotated[Path, typer.Argument(help="A new folder for the model and its tokens.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights, batches and noise.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set FIELD=VALUE of SpellingLMConfig. Repeatable."),
    ] = None,
) -> None:
    """Train a small language model on which absorption can be measured.

    Its activations hold words and their first letters. Training takes a few minutes on a CPU, and
    needs no download.
    """
    with clear_errors():
        values = apply_overrides({"seed": seed}, overrides or [])
        cfg = parse_fields(SpellingLMConfig, values, "")
        check_writable("folder", folder)
        columns = (TextColumn("training"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=cfg.steps)
            make_spelling_lm(cfg, folder, lambda _loss: bar.advance(task))
        silence_saelens()
        model = load_model("AutoModelForCausalLM", str(folder), "cpu", hook_names=[HOOK])
        f1 = look_at_first_letters(model, HOOK, SMALL_MODEL).probe_f1
        console.print(
            f"saved {folder}: hook {HOOK}, d_in {cfg.d_model}, tokens in {folder / TOKENS}\n"
            f"letter probes on held-out words: mean F1 {f1.mean():.3f}, {(f1 > PROBE_F1).sum()} of "
            f"26 above {PROBE_F1}",
            highlight=False,
        )
