"""Measure time and memory of evaluating SAEs on a language model, SAELens' way and ours.

    python benchmarks/evaluation_cost.py MODEL DATASET --hook model.layers.3 --hook model.layers.9

MODEL is a folder or name that `AutoModelForCausalLM` loads, DATASET a folder of
`Dataset.save_to_disk` with a column of text. The SAE is not trained: its figures mean nothing, but
both ways must find the same ones. All runs in one process, in turn. Times are CPU times of one
thread, so that other processes disturb them little.
"""

import ctypes
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import load_from_disk
from sae_lens import SAE, TopKSAEConfig
from sae_lens.load_model import load_model

from sae_lens_atm.evaluation import language_model
from sae_lens_atm.evaluation.language_model import HeldOutTokens, language_model_figures
from sae_lens_atm.training.run_file import parse_run


def main(
    model_name: str,
    dataset: Path,
    hook: Annotated[list[str], typer.Option(help="Hook of the SAE. Repeatable.")],
    context: int = 1024,
    prompts: int = 2,
    d_sae: int = 2048,
    threads: int = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the result.")] = None,
) -> None:
    """Measure time and memory of evaluating SAEs on a language model."""
    torch.set_num_threads(threads)
    model: Any = load_model("AutoModelForCausalLM", model_name, "cpu", hook_names=hook)
    rows = _tokens(model.tokenizer, dataset, context, prompts)
    width = model.model.config.get_text_config().hidden_size
    with torch.no_grad():
        model(rows[:1, :64])  # reads the weights from the disk
    ways = [_measure(model, name, rows, width, d_sae) for name in hook]
    found = {
        "model": Path(model_name).name,
        "vocabulary": model.model.config.get_text_config().vocab_size,
        "context": context,
        "prompts": prompts,
        "d_sae": d_sae,
        "threads": threads,
        "hooks": dict(zip(hook, ways, strict=True)),
    }
    print(json.dumps(found, indent=1))
    print(table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, Any]) -> str:
    """Return the result as a table."""
    names = {"saelens": "SAELens, each SAE", "first": "ours, first SAE", "next": "ours, each next"}
    lines = ["| hook | | seconds for 1,024 tokens | peak memory, MiB |", "|---|---|--:|--:|"]
    for hook, ways in found["hooks"].items():
        for way, label in names.items():
            seconds, peak = ways[way]["seconds"], ways[way]["peak_mib"]
            lines.append(f"| `{hook}` | {label} | {seconds:.1f} | {peak:,.0f} |")
    return "\n".join(lines)


def _tokens(tokenizer: Any, dataset: Path, context: int, prompts: int) -> torch.Tensor:
    """Return text without gaps in rows of a context, each after the first token of the model."""
    ids: list[int] = []
    texts: Any = load_from_disk(str(dataset))
    for row in texts:
        ids += tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if len(ids) >= context * prompts:
            break
    rows = torch.tensor(ids[: context * prompts]).view(prompts, context)
    rows[:, 0] = tokenizer.bos_token_id
    return rows


def _measure(
    model: Any, hook: str, rows: torch.Tensor, width: int, d_sae: int
) -> dict[str, dict[str, float]]:
    cfg = parse_run(
        {
            "runner": "language_model",
            "model_name": "here",
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": hook,
            "dataset_path": "here",
            "context_size": rows.shape[1],
            "training_tokens": 4096,
            "exclude_special_tokens": True,
            "sae": {"architecture": "topk", "d_in": width, "d_sae": d_sae, "k": 32},
        }
    ).runner
    torch.manual_seed(0)
    sae = SAE[Any].from_dict(TopKSAEConfig(d_in=width, d_sae=d_sae, k=32).to_dict())
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn_like(sae.W_dec))
    sae.W_enc.data = sae.W_dec.data.T.clone()
    sae.cfg.metadata.hook_name = hook
    tokens = HeldOutTokens.from_rows(rows)
    per = 1024 / rows.numel()

    def ours() -> dict[str, float]:
        return language_model_figures(sae, model, tokens, cfg)[0]  # pyright: ignore[reportArgumentType]

    def of_saelens() -> dict[str, float]:
        theirs = HeldOutTokens(list(rows.split(1)), rows.shape[1], 1)  # more take too much memory
        return language_model._figures_of_saelens(sae, model, theirs, cfg)[0]  # pyright: ignore

    found: dict[str, dict[str, float]] = {}
    figures: dict[str, dict[str, float]] = {}
    for way, work in (("first", ours), ("next", ours), ("saelens", of_saelens)):
        figures[way], seconds, peak = _cost(work)
        found[way] = {"seconds": round(per * seconds, 2), "peak_mib": round(peak)}
        found[way] |= {n: figures[way][n] for n in ("ce_loss_score", "kl_div_score", "l0")}
        print(hook, way, found[way], flush=True)
    return found


def _cost(work: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float, float]:
    """Return the result of some work, its CPU time, and its peak memory beyond that before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    start = time.process_time()
    result = work()
    return result, time.process_time() - start, _memory("VmHWM") - before


def _memory(name: str) -> float:
    """Return an amount of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


if __name__ == "__main__":
    typer.run(main)
