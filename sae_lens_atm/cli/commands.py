"""The commands: their arguments, their help, and the checks that need neither torch nor SAELens.

Each command imports the module that does its work after these checks, since torch and SAELens take
seconds to import.
"""

import runpy
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from sae_lens_atm.cli.terminal import Overrides, check_config, clear_errors
from sae_lens_atm.files import check_writable, check_writable_file
from sae_lens_atm.yaml_files import apply_overrides

Jobs = Annotated[int, typer.Option(min=1, help="Number of processes.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of threads of each process on a CPU.")
]
Quick = Annotated[bool, typer.Option(help="Apply the settings under `quick` in the file.")]
OnlyPlan = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan and its time, and stop.")
]
Reference = Annotated[str, typer.Argument(help="A folder, or REPO:SAE_ID on the Hub.")]


def load_plugins() -> None:
    """Register the architectures of this package and of other plugins with SAELens.

    SAELens does not look for plugins. These declare the entry point `sae_lens.architectures`.
    """
    from sae_lens_atm.sae import register

    register()
    for entry_point in entry_points(group="sae_lens.architectures"):
        entry_point.load()()


# --- training ------------------------------------------------------------------------------------


def train(
    config: Annotated[str, typer.Argument(help="A run file, or the name of a shipped one.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="The same as --set.", metavar="[KEY=VALUE]...")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A run's folder, to resume from its newest checkpoint, or one checkpoint."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Check everything, estimate memory, disk and time, and stop."),
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep only this many checkpoints, the newest.")
    ] = None,
    extend: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --resume: train this many samples (tokens) more than CONFIG says."
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train an SAE from a run file.

    Ctrl-C saves a checkpoint after the current step, and prints the command that resumes. A
    resumed run writes into its own folder, unless --set changes output_path.

    --dry-run times a few steps on this machine, for about 20 seconds.
    """
    with clear_errors():
        given = [*(settings or []), *(overrides or [])]
        check_config(config, given)
        load_plugins()
        from sae_lens_atm.cli.train import train_from_file

        train_from_file(config, given, resume, dry_run, keep, extend or 0, threads)


def cache(
    config: Annotated[
        str,
        typer.Argument(help="A run, comparison or sweep file, or the name of a shipped one."),
    ],
    overrides: Overrides = None,
    only_plan: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every file with its checksum, and stop.")
    ] = False,
) -> None:
    """Write the activations of a language model to disk, for all SAEs that are trained on them.

    The folder is `activations.cache` in the file. The same command resumes after an interruption.
    """
    with clear_errors():
        check_config(config, overrides or [])
        load_plugins()
        from sae_lens_atm.cli.cache import cache_of_file

        cache_of_file(config, overrides or [], only_plan, check)


def saelens(context: typer.Context) -> None:
    """Run SAELens' own training command line, with `--architecture atm`."""
    load_plugins()
    module = "sae_lens.llm_sae_training_runner"
    sys.argv = [module, *context.args]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*")
        runpy.run_module(module, run_name="__main__")


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
        check_writable("folder", folder)
        from sae_lens_atm.cli.lm import make_and_probe

        make_and_probe(folder, values)


# --- comparisons ---------------------------------------------------------------------------------


def compare(
    config: Annotated[str, typer.Argument(help="A comparison file, or the name of a shipped one.")],
    overrides: Overrides = None,
    jobs: Jobs = 1,
    quick: Quick = False,
    only_plan: OnlyPlan = False,
    threads: Threads = None,
) -> None:
    """Train several architectures at the same L0, and report how they differ.

    Finished runs are kept. The same command resumes after an interruption. After a change of the
    file it trains only the runs that changed.
    """
    with clear_errors():
        check_config(config, overrides or [])
        load_plugins()
        from sae_lens_atm.cli.compare import compare_file

        compare_file(config, overrides or [], jobs, quick, only_plan, threads)


def sweep(
    config: Annotated[str, typer.Argument(help="A sweep file, or the name of a shipped one.")],
    overrides: Overrides = None,
    jobs: Jobs = 1,
    quick: Quick = False,
    only_plan: OnlyPlan = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its address, `auto`, or `local` for a new one."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train SAEs at many settings, on a grid or at random, and report the best.

    Finished runs are kept, and the same command resumes, as in `compare`.
    """
    with clear_errors():
        check_config(config, overrides or [])
        load_plugins()
        from sae_lens_atm.cli.compare import sweep_file

        sweep_file(config, overrides or [], jobs, quick, only_plan, ray, threads)


def find_l0(
    config: Annotated[
        str, typer.Argument(help="A run or comparison file, or the name of a shipped one.")
    ],
    overrides: Overrides = None,
    l0: Annotated[
        str | None,
        typer.Option(
            "--l0", help="LOW,HIGH. By default d_sae / 1024 to a quarter of min(d_in, d_sae)."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    longest: Annotated[
        float,
        typer.Option(help="Longest training, as a multiple of the file's."),
    ] = 2.0,
    jobs: Jobs = 1,
    only_plan: Annotated[
        bool, typer.Option("--dry-run", help="Check the file, estimate the time, and stop.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Find the L0 at which an SAE saves the most bits, which is near the true L0.

    Needs no labels. Trains SAEs at many L0s. The same command resumes after an interruption.
    """
    with clear_errors():
        check_config(config, overrides or [])
        load_plugins()
        from sae_lens_atm.cli.find_l0 import find_l0_of_file

        find_l0_of_file(config, overrides or [], l0, seeds, longest, jobs, only_plan, threads)


def report(
    results: Annotated[Path, typer.Argument(help="The results.json of a comparison or sweep.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report. By default the folder of the file.")
    ] = None,
) -> None:
    """Draw the report of a comparison or sweep again."""
    with clear_errors():
        check_writable("--output", output or results.parent)
        from sae_lens_atm.cli.compare import draw_report

        draw_report(results, output or results.parent)


def evaluate(
    saes: Annotated[list[str], typer.Argument(help="Folders, or REPO:SAE_ID on the Hub.")],
    on: Annotated[
        str,
        typer.Option(help="A run, comparison or sweep file, or the name of a shipped one."),
    ],
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Evaluate saved SAEs on the data of a configuration file."""
    with clear_errors():
        check_config(on, overrides or [])
        check_writable_file("--json", json_file)
        load_plugins()
        from sae_lens_atm.cli.compare import evaluate_on_file

        evaluate_on_file(saes, on, overrides or [], json_file, threads)


# --- saved SAEs ----------------------------------------------------------------------------------


def explore(
    sae: Reference,
    on: Annotated[
        str,
        typer.Option(help="A run, comparison or sweep file, or the name of a shipped one."),
    ],
    overrides: Overrides = None,
    beside: Annotated[
        str | None, typer.Option(help="Another SAE of the same activations, to compare with.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("explore.html"),
    tokens: Annotated[
        int, typer.Option(min=1, help="About how many tokens or samples are read.")
    ] = 200_000,
    max_size: Annotated[
        float,
        typer.Option(
            min=1, help="Largest size of the file in MB. Smaller files show fewer contexts."
        ),
    ] = 20.0,
    neuronpedia: Annotated[
        Path | None,
        typer.Option(help="Also write the latents into this folder, for Neuronpedia."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Write a page on which a person looks at the latents of an SAE and at their hierarchy.

    It is one HTML file, which opens anywhere and needs no network.
    """
    with clear_errors():
        check_config(on, overrides or [])
        check_writable_file("--output", output)
        load_plugins()
        from sae_lens_atm.cli.explore import explore_on_file

        explore_on_file(
            sae, on, overrides or [], output, tokens, max_size, beside, neuronpedia, threads
        )


def inspect(sae: Reference) -> None:
    """Show an SAE: its architecture, training settings and importance."""
    with clear_errors():
        load_plugins()
        from sae_lens_atm.cli.saes import show

        show(sae)


def push(
    path: Annotated[Path, typer.Argument(help="The folder of a run or of a saved SAE.")],
    repo_id: Annotated[str, typer.Argument(help="The repo on the Hub: NAMESPACE/NAME.")],
    sae_id: Annotated[
        str | None,
        typer.Option("--id", help="The SAE's folder in the repo. By default hook, width and L0."),
    ] = None,
    private: Annotated[
        bool, typer.Option(help="Create the repo as private if it does not exist.")
    ] = False,
    revision: Annotated[str, typer.Option(help="An existing branch of the repo.")] = "main",
    dry_run: Annotated[
        bool, typer.Option(help="Check everything, print the files and the card, and stop.")
    ] = False,
) -> None:
    """Upload an SAE to the Hugging Face Hub, with a model card."""
    with clear_errors():
        load_plugins()
        from sae_lens_atm.cli.saes import upload

        upload(path, repo_id, sae_id, private, revision, dry_run)


def saebench(
    sae: Reference,
    evals: Annotated[
        str | None,
        typer.Option(
            help="Names separated by commas: absorption, core, sparse_probing, sae_probes. By "
            "default the first three."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A Hub name or a folder. By default the model in the SAE's metadata."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Text for core: a Hub name or a folder. By default SAEBench's."),
    ] = None,
    env: Annotated[
        Path | None,
        typer.Option(help="SAEBench's environment. By default in the user's cache."),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A trial: few batches of core, few words, few tasks.")
    ] = False,
    words: Annotated[
        int | None,
        typer.Option(min=1, help="Number of words for absorption. By default the vocabulary."),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks for sae_probes. By default all.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, after each eval.")
    ] = None,
) -> None:
    """Run SAEBench's evals on a saved SAE.

    SAEBench runs in a separate environment, which is installed at the first use.
    """
    with clear_errors():
        check_writable_file("--json", json_file)
        load_plugins()
        from sae_lens_atm.cli.saes import run_saebench

        run_saebench(sae, evals, model, dataset, env, quick, words, tasks, json_file)
