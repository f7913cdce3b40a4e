"""Measure training on a language model: with the model in the loop, and from cached activations.

    python benchmarks/cache_speed.py MODEL DATASET --hook model.layers.9 --d-in 640

MODEL is a folder or name that `AutoModelForCausalLM` loads, DATASET a folder of
`Dataset.save_to_disk` with a column of text. Both ways train the same architecture in one process,
one after the other. Times are CPU times of one thread, so that other processes disturb them little.
"""

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from sae_lens_atm.training.cached_run import cache_activations
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import parse_run

CONTEXT, BATCH = 128, 1024
BEFORE = 4  # steps before the first one that is timed


def main(
    model_name: str,
    dataset: Path,
    hook: Annotated[str, typer.Option(help="Hook of the SAE.")],
    d_in: Annotated[int, typer.Option(help="Width of the model.")],
    d_sae: int = 4096,
    k: int = 64,
    architecture: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    steps: int = 24,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the result.")] = None,
) -> None:
    """Measure training with the model in the loop and from cached activations."""
    torch.set_num_threads(1)
    silence_saelens()
    found: dict[str, Any] = {
        "model": Path(model_name).name,
        "hook": hook,
        "d_sae": d_sae,
        "k": k,
        "batch": BATCH,
        "steps": steps,
        "architectures": {},
    }
    with TemporaryDirectory() as folder:
        base: dict[str, Any] = {
            "runner": "language_model",
            "model_name": model_name,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": hook,
            "dataset_path": str(dataset),
            "is_dataset_tokenized": False,
            "streaming": False,
            "context_size": CONTEXT,
            "exclude_special_tokens": True,
            "training_tokens": steps * BATCH,
            "train_batch_size_tokens": BATCH,
            "store_batch_size_prompts": 8,
            "n_batches_in_buffer": 4 * BATCH // CONTEXT,
            "prefetch_llm_batches": False,
            "n_eval_batches": 0,
            "n_checkpoints": 0,
        }
        cached = base | {"activations": {"cache": f"{folder}/cache", "dtype": "float32"}}
        start = time.process_time()
        cache_activations(parse_run(_with_sae(cached, "topk", d_in, d_sae, k)), lambda *_: None)
        found["caching_tokens_per_second"] = steps * BATCH / (time.process_time() - start)
        for name in architecture or ["atm", "batchtopk"]:
            ways: dict[str, float] = {}
            for way, content in (("model", base), ("cache", cached)):
                run = _with_sae(content, name, d_in, d_sae, k)
                run["output_path"] = f"{folder}/{name}-{way}"
                ways[way] = _tokens_per_second(run)
            found["architectures"][name] = ways
            print(name, ways, flush=True)
    print(json.dumps(found, indent=1))
    print(table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = [
        "| architecture | model in the loop, tokens/s | from the cache, tokens/s | ratio |",
        "|---|--:|--:|--:|",
    ]
    for name, ways in found["architectures"].items():
        ratio = ways["cache"] / ways["model"]
        lines.append(f"| {name} | {ways['model']:,.0f} | {ways['cache']:,.0f} | {ratio:.1f} |")
    return "\n".join(lines)


def _with_sae(
    content: dict[str, Any], architecture: str, d_in: int, d_sae: int, k: int
) -> dict[str, Any]:
    sae = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "k": k}
    return content | {"sae": sae | ({"mask_warm_up_steps": 0} if architecture == "atm" else {})}


def _tokens_per_second(content: dict[str, Any]) -> float:
    """Return the tokens of a training step divided by the mean time from one step to the next."""
    times: list[float] = []
    train(parse_run(content), on_step=lambda _trainer, _output: times.append(time.process_time()))
    return BATCH / statistics.mean(b - a for a, b in pairwise(times[BEFORE:]))


if __name__ == "__main__":
    typer.run(main)
