"""Whether one training whose k falls finds the L0 that a search over many trainings finds.

k stays at the largest value for a start. It then falls to the smallest by the same ratio in each
step. The script records the bits that the SAE saves on held-out samples. k then settles where the
smoothed curve was highest, and the training goes on to its end. The trained SAE is evaluated. Its
figures are to be compared with those of an SAE trained at one k.

    python benchmarks/study/falling_k.py configs/compare-sister-a.yaml falling_k.json
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.batch_pool import draw_batch, synthetic_model
from sae_lens_atm.evaluation.synthetic import bits_saved_by, evaluate
from sae_lens_atm.files import read_json, to_json
from sae_lens_atm.training.run_file import SyntheticRun

POOL = 1000  # batches, as in the comparison
START = 0.1  # share of the training at the largest k
EVERY = 10  # steps
HELD_OUT = 2048  # samples
SMOOTHED = 0.05  # of the range of log k
KEPT = ("l0", "explained_variance", "mcc", "f1", "absorption_full", "absorption_fraction")
Curve = list[tuple[float, float]]


def train(
    run: SyntheticRun, model: SyntheticModel, low: float, high: float, end: float, seed: int
) -> tuple[Curve, Any]:
    """Train while k falls up to a share `end`. Return k and saved bits over steps, and the SAE."""
    cfg, steps = run.runner, run.runner.total_training_steps
    first, last = round(START * steps), round(end * steps)
    with temporary_seed(seed):
        sae: Any = TrainingSAE[Any].from_dict({**cfg.sae.to_dict(), "k": high})
    curve: Curve = []
    held_out = draw_batch(model, HELD_OUT, seed, -1)

    def batches() -> Iterator[Tensor]:
        k = high
        for step in range(10**9):
            if step < last:
                k = high * (low / high) ** (max(step - first, 0) / (last - first))
            elif step == last:
                k = answer(curve)
            if first < step < last and step % EVERY == 0:
                sae.eval()
                curve.append((k, bits_saved_by(sae, held_out)))
                sae.train()
            sae.cfg.k = sae.activation_fn.k = k
            yield draw_batch(model, cfg.batch_size, seed, step % POOL)

    SAETrainer(cfg.to_sae_trainer_config(), sae, batches()).fit()
    return curve, sae


def answer(curve: Curve) -> float:
    """Return the k with the highest smoothed curve."""
    u, values = np.log([k for k, _ in curve]), np.array([bits for _, bits in curve])
    width = SMOOTHED * (u.max() - u.min())
    weights = np.exp(-0.5 * ((u[:, None] - u) / width) ** 2)
    return math.exp(u[np.argmax(weights @ values / weights.sum(1))])


def table(content: dict[str, Any]) -> str:
    """Return the table of the lab notebook: means over seeds."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for run in content["runs"]:
        groups[run["config"], run["entry"], run["until"]].append(run)
    several = len({config for config, _, _ in groups}) > 1
    lines = [
        "| architecture | k falls until | k found | true L0 | explained variance | MCC | F1 |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for (config, entry, until), runs in groups.items():
        label = f"{entry}, {config}" if several else entry
        found = ", ".join(f"{run['k']:.2f}" for run in runs)
        figures = ("explained_variance", "mcc", "f1")
        means = (float(np.mean([run["figures"][name] for run in runs])) for name in figures)
        cells = " | ".join(f"{mean:.3f}" for mean in means)
        true = float(np.mean([run["true_l0"] for run in runs]))
        lines.append(f"| {label} | {until:.0%} | {found} | {true:.2f} | {cells} |")
    return "\n".join(lines)


def main(
    config: Path,
    output: Path,
    entry: Annotated[list[str] | None, typer.Option()] = None,
    end: Annotated[list[float] | None, typer.Option()] = None,
    high: float = 0.0,
    seeds: int = 3,
) -> None:
    """Train each architecture, and add what was found to the output."""
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = read_json(output)["runs"] if output.exists() else []
    for name in entry or ["atm", "atm (both off)", "batchtopk"]:
        run = next(p.run for p in load_comparison(config).planned if p.entry == name)
        assert isinstance(run, SyntheticRun)
        model, most = synthetic_model(run, Path()), high or run.runner.sae.d_in / 4
        for until in end or [0.6]:
            for seed in range(seeds):
                curve, sae = train(run, model, 1.5, most, until, seed)
                figures = evaluate(sae, model, 20_000, seed)
                found.append(
                    {
                        "config": config.stem,
                        "entry": name,
                        "until": until,
                        "high": most,
                        "seed": seed,
                        "k": round(answer(curve), 3),
                        "true_l0": figures["true_l0"],
                        "figures": {key: figures[key] for key in KEPT if key in figures},
                        "curve": [(round(k, 3), round(bits, 2)) for k, bits in curve],
                    }
                )
                print(*(found[-1][key] for key in found[-1] if key != "curve"), flush=True)
                output.write_text(to_json({"runs": found}) + "\n")


if __name__ == "__main__":
    typer.run(main)
