"""The command line: a thin shell over the package. How commands end: see `terminal`."""

import runpy
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.utils import logging as hub_logging
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from sae_lens.load_model import load_model

from sae_lens_atm import saebench
from sae_lens_atm.cli.compare import compare_command, evaluate, report, sweep
from sae_lens_atm.cli.progress import Progress, figures_table
from sae_lens_atm.cli.terminal import (
    Overrides,
    clear_errors,
    config_path,
    console,
    exit_with,
    facts_table,
)
from sae_lens_atm.data.spelling.model import (
    HOOK,
    TOKENS,
    SpellingLMConfig,
    make_spelling_lm,
)
from sae_lens_atm.evaluation.first_letters import SMALL_MODEL, look_at_first_letters
from sae_lens_atm.files import to_json
from sae_lens_atm.hub.loading import describe, load_sae
from sae_lens_atm.hub.push import prepare
from sae_lens_atm.hub.push import push as push_to_hub
from sae_lens_atm.metrics.first_letter import PROBE_F1
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.ranks import rank
from sae_lens_atm.training.run import Result, train_checked
from sae_lens_atm.training.run_file import LanguageModelRun, apply_overrides, load_run, parse_fields

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train SAELens SAEs with Adaptive Temporal Masking, and look at them.",
)


def main() -> None:
    """The console command."""
    warnings.formatwarning = _one_line_warning
    load_plugins()
    app()


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"


def load_plugins() -> None:
    """Let other packages register their architectures, as this one does.

    SAELens does not look for plugins yet; those that declare the entry point are at hand here.
    """
    for entry_point in entry_points(group="sae_lens.architectures"):
        entry_point.load()()


@app.command("train")
def train_command(
    config: Annotated[str, typer.Argument(help="A run file, or the name of a shipped one.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="As with --set.", metavar="[KEY=VALUE]...")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(help="A checkpoint, or a run's folder (its newest checkpoint).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, print the plan and what it needs, stop.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Checkpoints to keep, the newest; else all.")
    ] = None,
) -> None:
    """Train the SAE of a run file."""
    console.quiet = rank() > 0
    with clear_errors():
        run = load_run(config_path(config), [*(settings or []), *(overrides or [])])
        checkpoint = None if resume is None else newest_checkpoint(resume)
        console.print(facts_table(check_run(run, checkpoint, dry_run)))
        if dry_run:
            return
        silence_saelens()
        with Progress(console, run.runner.total_training_steps) as progress:
            result = train_checked(run, checkpoint, progress.on_step, keep=keep)
        _print_result(result, isinstance(run, LanguageModelRun))


@app.command("make-lm")
def make_lm(
    folder: Annotated[Path, typer.Argument(help="Where to; a new folder.")],
    seed: Annotated[int, typer.Option(help="Another seed, another model.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of SpellingLMConfig; repeatable.")
    ] = None,
) -> None:
    """Train a small language model that knows how words begin, to train SAEs on."""
    with clear_errors():
        values = apply_overrides({"seed": seed}, overrides or [])
        cfg = parse_fields(SpellingLMConfig, values, "")
        columns = (TextColumn("training"), BarColumn(), TimeRemainingColumn())
        with RichProgress(*columns, console=console) as bar:
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


app.command("compare")(compare_command)
app.command()(sweep)
app.command()(report)
app.command()(evaluate)


@app.command("saebench")
def saebench_command(
    sae: Annotated[str, typer.Argument(help="A folder, or a Hub id: REPO:SAE_ID.")],
    evals: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(saebench.EVALS),
    model: Annotated[
        str | None, typer.Option(help="A Hub name or a folder; else what the SAE says.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Text for core: a Hub name or a folder; else SAEBench's.")
    ] = None,
    env: Annotated[Path | None, typer.Option(help="SAEBench's environment; else cached.")] = None,
    quick: Annotated[bool, typer.Option(help="Core on few batches: to see that it runs.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all that was found here.")
    ] = None,
) -> None:
    """Run SAEBench's evals of a saved SAE, in an environment of its own (made at the first use)."""
    with clear_errors():
        planned = saebench.plan_evals(sae, evals, model, dataset, quick)
        environment = env or saebench.default_folder()
        if not saebench.is_whole(environment):
            console.print(f"making {environment}: minutes, once", highlight=False)
            saebench.prepare(environment)
        found = saebench.run_evals(planned, environment)
        console.print(saebench.table(f"SAEBench of {sae}", found["evals"]))
        if json_file is not None:
            scores = saebench.scores_of(found["evals"])
            everything = {"sae": sae, "model": planned.model, "scores": scores, "saebench": found}
            json_file.write_text(to_json(everything), encoding="utf-8")
        failed = saebench.failures(found["evals"])
        if failed:
            exit_with("\n".join(failed), 1)


@app.command()
def inspect(
    sae: Annotated[str, typer.Argument(help="A folder, or a Hub id: REPO:SAE_ID.")],
) -> None:
    """Show what a SAE is, where it comes from, and how important its latents are."""
    with clear_errors():
        hub_logging.set_verbosity_error()
        for table in describe(load_sae(sae)):
            console.print(table)


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a saved SAE's.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: NAMESPACE/NAME.")],
    sae_id: Annotated[
        str | None, typer.Option("--id", help="Its folder in the repo; by default hook and width.")
    ] = None,
    private: Annotated[bool, typer.Option(help="If the repo is to be made, make it so.")] = False,
    revision: Annotated[str, typer.Option(help="A branch that is there.")] = "main",
    dry_run: Annotated[bool, typer.Option(help="Check, print what would be sent, stop.")] = False,
) -> None:
    """Upload a SAE to the Hugging Face Hub, with a model card."""
    with clear_errors():
        hub_logging.set_verbosity_error()
        upload = prepare(path, repo_id, sae_id, revision)
        console.print(facts_table({name: f"{n:,} B" for name, n in upload.sizes.items()}))
        if dry_run:
            console.print(upload.write_card(None), markup=False, highlight=False, soft_wrap=True)
            return
        commit = push_to_hub(upload, private)
        console.print(f"pushed {repo_id}:{upload.sae_id}, {commit.commit_url}", highlight=False)


@app.command(
    "saelens",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def saelens(context: typer.Context) -> None:
    """SAELens' own training command line, which then knows `--architecture atm`."""
    module = "sae_lens.llm_sae_training_runner"
    sys.argv = [module, *context.args]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*")
        runpy.run_module(module, run_name="__main__")


def _print_result(result: Result, language_model: bool) -> None:
    title = "on the language model" if language_model else "on fresh synthetic samples"
    if result.figures:
        console.print(figures_table(f"The saved SAE {title}", {"value": result.figures}))
    if result.skipped_batches:
        console.print(
            f"skipped {result.skipped_batches} batches with NaN, Inf or enormous values",
            highlight=False,
        )
    console.print(f"saved {result.output_path} in {result.seconds:.0f} s")
