"""Run SAEBench's evals on one SAE: `python -m inside.run JOB RESULTS`, two JSON files.

SAEBench's own `run_eval` does the work. Some of its functions are replaced here. By default it
loads the model by a name on the Hub, writes into its installation, and takes words in the order of
a hash table. Here it gets the model, folders, and the words in alphabetical order.
"""
# pyright: basic, reportMissingImports=false

import json
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from sae_bench.evals.absorption import common, feature_absorption
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.absorption.vocab import LETTERS, get_alpha_tokens
from sae_bench.evals.core import main as core_main
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing_main
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing_sae_probes import main as sae_probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_bench.sae_bench_utils import dataset_utils, general_utils
from sae_bench.sae_bench_utils.activation_collection import (
    LLM_NAME_TO_BATCH_SIZE,
    LLM_NAME_TO_DTYPE,
)
from sae_lens.training.activations_store import ActivationsStore
from sae_probes import DATASETS, generate_model_activations

from .choices import evenly_spaced, frequent_words
from .models import load_model, load_sae
from .parent import end_with_parent
from .plain import to_json

SEED = 42  # SAEBench's
SMALL_VOCABULARY = 8192
"""With fewer words, SAEBench's batches of 4096 give its probes too few training steps."""
TEXT = "Skylion007/openwebtext"
"""SAEBench's text for the core eval."""


class CannotRun(Exception):
    """An eval lacks something that it needs. The message says what."""


@dataclass
class Subject:
    """An SAE, its model, and SAEBench's settings for that model."""

    sae: Any
    model: Any
    model_name: str
    dtype: str
    batch_size: int
    device: str
    text: str
    quick: bool
    words: int | None
    """Number of words for absorption. None: all of the vocabulary, as in SAEBench."""
    tasks: int | None
    """Number of tasks of sae-probes. None: all, as in SAEBench."""


def absorption(subject: Subject) -> dict[str, Any]:
    """Run the absorption eval, and add the F1 scores of its probes."""
    tokenizer, most = subject.model.tokenizer, subject.words
    words = sorted(get_alpha_tokens(tokenizer))
    if most is not None:
        words = frequent_words(tokenizer, words, most)
    missing = set(LETTERS) - {word.strip()[0].lower() for word in words}
    if missing:
        raise CannotRun(
            f"none of the {len(words)} words starts with {', '.join(sorted(missing))}: SAEBench "
            "needs words of every letter"
        )
    config = absorption_main.AbsorptionEvalConfig(
        model_name=subject.model_name,
        llm_batch_size=subject.batch_size,
        llm_dtype=subject.dtype,
    )
    if len(words) < SMALL_VOCABULARY:
        print(f"{len(words)} words: batches of 128 and longer training for the probes")
        config.k_sparse_probe_batch_size = 128
        common.train_and_save_probes = partial(
            common.train_and_save_probes, num_epochs=100, lr=5e-2
        )
    for module in (common, feature_absorption):
        module.get_alpha_tokens = lambda _tokenizer: words
    home = Path("absorption").absolute()
    probes = {"probes_dir": home / "probes"}
    # SAEBench would run all layers, and compute logits, for activations of one layer.
    subject.model.run_with_cache = partial(
        subject.model.run_with_cache, stop_at_layer=layer_of(subject.sae) + 1
    )
    absorption_main.HookedTransformer = given(subject.model)
    absorption_main.run_k_sparse_probing_experiment = partial(
        absorption_main.run_k_sparse_probing_experiment, experiment_dir=home / "k", **probes
    )
    absorption_main.run_feature_absortion_experiment = partial(
        absorption_main.run_feature_absortion_experiment,
        experiment_dir=home,
        sparse_probing_experiment_dir=home / "k",
        **probes,
    )
    random.seed(SEED)  # SAEBench seeds nothing here
    torch.manual_seed(SEED)
    try:
        results = run(absorption_main.run_eval, config, subject, home)
    finally:
        del subject.model.run_with_cache
    (probing,) = Path("artifacts/absorption").glob("*_k_sparse_probing.json")
    f1 = {row["letter"]: row for row in json.loads(probing.read_text())}
    if not results:
        good = sum(row["f1_probe"] > config.min_GT_probe_f1 for row in f1.values())
        raise CannotRun(
            f"the model represents too few first letters: the F1 of a linear probe is above "
            f"{config.min_GT_probe_f1} for {good} letters, SAEBench needs "
            f"{config.min_feats_for_eval}"
        )
    (result,) = results.values()
    scored = [f1[letter["first_letter"]] for letter in result["eval_result_details"]]
    result["eval_result_metrics"]["probes"] = {
        name: sum(row[name] for row in scored) / len(scored)
        for name in ("f1_probe", "f1_sparse_sae_1")
    }
    return result


@torch.no_grad()
def core(subject: Subject) -> dict[str, Any]:
    """Run the core eval."""
    context = min(128, subject.model.cfg.n_ctx)
    config = CoreEvalConfig(
        model_name=subject.model_name,
        llm_dtype=subject.dtype,
        batch_size_prompts=16,
        n_eval_reconstruction_batches=10 if subject.quick else 200,
        n_eval_sparsity_variance_batches=10 if subject.quick else 2000,
        dataset=subject.text,
        context_size=context,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        verbose=True,
    )
    general_utils._standardize_sae_cfg(subject.sae.cfg)
    store = ActivationsStore.from_sae(
        subject.model, subject.sae, text(subject.text), context_size=context
    )
    store.shuffle_input_dataset(seed=SEED)
    tokenizer = subject.model.tokenizer
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    metrics, by_latent = core_main.run_evals(
        subject.sae,
        store,
        subject.model,
        config,
        ignore_tokens={token for token in special if token is not None},
        verbose=True,
    )
    metrics["misc_metrics"] = core_main.calculate_misc_metrics(by_latent)
    return {"eval_config": asdict(config), "eval_result_metrics": metrics}


def sparse_probing(subject: Subject) -> dict[str, Any]:
    """Run the sparse-probing eval."""
    config = SparseProbingEvalConfig(
        model_name=subject.model_name,
        llm_batch_size=subject.batch_size,
        llm_dtype=subject.dtype,
    )
    dataset_utils.load_dataset = from_hub
    sparse_probing_main.HookedTransformer = given(subject.model)
    results = run(
        partial(sparse_probing_main.run_eval, save_activations=False),
        config,
        subject,
        Path("sparse_probing"),
    )
    (result,) = results.values()
    return result


def sae_probes(subject: Subject) -> dict[str, Any]:
    """Run the sparse-probing eval on the tasks of sae-probes."""
    names = DATASETS if subject.tasks is None else evenly_spaced(DATASETS, subject.tasks)
    config = SparseProbingSaeProbesEvalConfig(
        model_name=subject.model_name,
        dataset_names=names,
    )
    generate_model_activations.HookedTransformer = given(subject.model)
    results = run(sae_probes_main.run_eval, config, subject, Path("sae_probes"))
    (result,) = results.values()
    return result


EVALS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "absorption": absorption,
    "core": core,
    "sparse_probing": sparse_probing,
    "sae_probes": sae_probes,
}


def run(
    run_eval: Callable[..., dict[str, Any]], config: Any, subject: Subject, home: Path
) -> dict[str, Any]:
    """Call SAEBench's `run_eval` for one SAE."""
    home.mkdir(parents=True, exist_ok=True)
    return run_eval(config, [("sae", subject.sae)], subject.device, str(home), force_rerun=True)


def given(model: Any) -> Any:
    """Return a replacement for the class with which SAEBench loads a model by its name."""
    return SimpleNamespace(from_pretrained_no_processing=lambda *_args, **_options: model)


def layer_of(sae: Any) -> int:
    """Return the layer whose output an SAE of the residual stream reads."""
    return int(sae.cfg.metadata.hook_name.split(".")[1])


def text(path: str) -> Any:
    """Load a dataset from the Hub, or from a folder written by `Dataset.save_to_disk`."""
    if not Path(path).is_dir():
        return from_hub(path, split="train", streaming=True)
    dataset = datasets.load_from_disk(path)
    return dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset


def from_hub(name: str, *args: Any, **options: Any) -> Any:
    """Load a dataset with `load_dataset`."""
    try:
        return datasets.load_dataset(name, *args, **options)
    except Exception as error:
        raise CannotRun(f"cannot load the dataset {name}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the type and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def subject_of(job: dict[str, Any]) -> Subject:
    """Load the SAE and the model of a job."""
    device = general_utils.setup_environment()
    name = job["model"].rstrip("/").split("/")[-1]
    dtype = LLM_NAME_TO_DTYPE.get(name, "float32")
    return Subject(
        sae=load_sae(Path(job["sae"]), device, general_utils.str_to_dtype(dtype)),
        model=load_model(job["model"], device, general_utils.str_to_dtype(dtype)),
        model_name=name,
        dtype=dtype,
        batch_size=LLM_NAME_TO_BATCH_SIZE.get(name, 32),
        device=device,
        text=job["text"] or TEXT,
        quick=job["quick"],
        words=job["words"],
        tasks=job["tasks"],
    )


def all_evals(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run all evals of a job. Yield the results so far after each, or the error if it failed."""
    results: dict[str, Any] = {}
    try:
        subject = subject_of(job)
    except Exception as error:
        traceback.print_exc()
        yield {"error": f"cannot load {job['model']} or the SAE: {reason(error)}"}
        return
    versions = {name: version(name) for name in ("sae-bench", "sae-probes", "sae-lens", "torch")}
    for name in job["evals"]:
        print(f"--- SAEBench: {name}", flush=True)
        try:
            results[name] = EVALS[name](subject)
        except CannotRun as error:
            results[name] = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": reason(error)}
        yield {"device": subject.device, "versions": versions, "evals": results}


def main() -> None:
    """Read a job, run it, and write its results after each eval."""
    job, output = map(Path, sys.argv[1:])
    end_with_parent()
    unfinished = output.with_suffix(".part")
    for results in all_evals(json.loads(job.read_text(encoding="utf-8"))):
        unfinished.write_text(to_json(results), encoding="utf-8")
        unfinished.replace(output)  # the parent reads it at any time


if __name__ == "__main__":
    main()
