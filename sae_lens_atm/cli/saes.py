"""The work of the commands for one saved SAE: inspect it, publish it, run SAEBench on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from rich.table import Table
from sae_lens import SAE
from torch import Tensor

from sae_lens_atm import saebench
from sae_lens_atm.cli.terminal import console, exit_with, facts_table
from sae_lens_atm.files import to_json, write_text
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.hub.push import prepare
from sae_lens_atm.hub.push import push as push_to_hub
from sae_lens_atm.sae.active import active_settings
from sae_lens_atm.sae.atm_sae import IMPORTANCE_QUANTILES
from sae_lens_atm.sae.inference import ATMSAE

_LONGEST_BAR = 30  # characters
_BINS = 10


# --- inspect -------------------------------------------------------------------------------------


def show(reference: str) -> None:
    """Print what an SAE is. `reference` is a folder, or REPO:SAE_ID on the Hub."""
    hub_logging.set_verbosity_error()
    for table in describe(load_sae(reference)):
        console.print(table)


def describe(sae: SAE[Any]) -> Iterator[Table]:
    """Yield tables about an SAE: what it is, its importance, the settings that had an effect."""
    metadata = sae.cfg.metadata
    facts: dict[str, Any] = {
        "architecture": sae.cfg.architecture(),
        "trained as": metadata.training_architecture,
        "d_in, d_sae": f"{sae.cfg.d_in}, {sae.cfg.d_sae}",
        "dtype": sae.cfg.dtype,
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "dataset": metadata.dataset_path,
        "L0 at the end of training": metadata.l0,
        "SAELens": metadata.sae_lens_training_version,
    }
    yield _pairs("SAE", facts)
    if isinstance(sae, ATMSAE):
        yield _importance_table(sae.importance)
    elif metadata.importance_quantiles:
        quantiles = {f"quantile {q}": v for q, v in metadata.importance_quantiles.items()}
        yield _pairs("Importance", quantiles)
    details = active_settings(metadata.training_architecture_details or {})
    if details:
        yield _pairs("Settings with an effect", details)


def _pairs(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    for name, value in facts.items():
        if value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(name, text)
    return table


def _importance_table(importance: Tensor) -> Table:
    """Return quantiles of the importance, and a histogram."""
    quantiles = importance.quantile(torch.tensor(IMPORTANCE_QUANTILES)).tolist()
    named = {f"quantile {q}": v for q, v in zip(IMPORTANCE_QUANTILES, quantiles, strict=True)}
    table = _pairs("Importance", named)
    top = max(importance.max().item(), 1e-12)
    counts = torch.histc(importance, _BINS, 0, top).tolist()
    for i, count in enumerate(counts):
        bar = "█" * round(_LONGEST_BAR * count / max(counts))
        span = f"{i * top / _BINS:.3g} to {(i + 1) * top / _BINS:.3g}"
        table.add_row(span, f"{bar} {count:.0f}")
    return table


# --- push ----------------------------------------------------------------------------------------


def upload(
    path: Path, repo_id: str, sae_id: str | None, private: bool, revision: str, dry_run: bool
) -> None:
    """Upload an SAE to the Hub, or print what would be sent."""
    hub_logging.set_verbosity_error()
    prepared = prepare(path, repo_id, sae_id, revision)
    console.print(facts_table({name: f"{n:,} B" for name, n in prepared.sizes.items()}))
    if dry_run:
        console.print(prepared.write_card(None), highlight=False, soft_wrap=True)
        return
    commit = push_to_hub(prepared, private)
    console.print(f"pushed {repo_id}:{prepared.sae_id}, {commit.commit_url}", highlight=False)


# --- SAEBench ------------------------------------------------------------------------------------


def run_saebench(
    sae: str,
    evals: str | None,
    model: str | None,
    dataset: str | None,
    env: Path | None,
    quick: bool,
    words: int | None,
    tasks: int | None,
    json_file: Path | None,
) -> None:
    """Run SAEBench's evals on an SAE, print the scores, and write all results to a file."""
    names = evals or ",".join(saebench.DEFAULT_EVALS)
    request = saebench.plan_evals(sae, names, model, dataset, quick, words, tasks)
    environment = env or saebench.default_folder()
    if not saebench.is_complete(environment):
        console.print(f"installing {environment}: once, some minutes", highlight=False)
        saebench.prepare(environment)

    def keep(results: dict[str, Any]) -> None:
        if json_file is not None:
            scores = saebench.scores_of(results["evals"])
            content = {"sae": sae, "model": request.model, "scores": scores, "saebench": results}
            write_text(json_file, to_json(content))

    results = saebench.run_evals(request, environment, keep)
    console.print(saebench.table(f"SAEBench of {sae}", results["evals"]))
    failed = saebench.failures(results["evals"])
    if failed:
        exit_with("\n".join(failed), 1)
