"""Which figure is best near the true L0? Figures of SAEs that `find-l0` trained at many L0s.

Each figure needs no labels. The script reads the SAEs of the searches in `runs/l0-NAME-l0`, whose
commands `found_l0.py` prints.

    python benchmarks/study/l0_figures.py runs l0_figures.json
"""

import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import typer
from found_l0 import CLOSE, LABELS, MODELS, ROOT, true_l0s
from sae_lens import SAE
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_atm.compare.find_l0.peak import is_at_edge, peak
from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.batch_pool import synthetic_model
from sae_lens_atm.evaluation.synthetic import bits_saved_by
from sae_lens_atm.files import read_json, to_json
from sae_lens_atm.metrics import decoder_cosine, stability
from sae_lens_atm.training.run_file import SyntheticRun

ENTRY, SAMPLES, SEED = "atm", 20_000, 7
FIGURES = {
    "decoder_cosine": ("c_dec, least", -1),
    "squared_cosine": ("mean squared cosine of decoder rows, least", -1),
    "cosine_and_firing": ("correlation of cosine and excess joint firing, least", -1),
    "stability": ("stability over two seeds, largest", 1),
    "saved_bits": ("saved bits, largest", 1),
}
"""What a figure is called, and whether it is to be large."""


@torch.no_grad()
def figures(sae: SAE[Any], x: Tensor) -> dict[str, float]:
    """Return the figures of one SAE."""
    acts = sae.encode(x)
    fires = (acts > 0).float()
    alive = fires.any(0)
    rows = torch.nn.functional.normalize(sae.W_dec[alive], dim=1)
    cosines, frequency = rows @ rows.T, fires[:, alive].mean(0)
    excess = fires[:, alive].T @ fires[:, alive] / len(x) - frequency[:, None] * frequency
    pairs = tuple(torch.triu_indices(len(rows), len(rows), 1))
    both = torch.stack([cosines[pairs], excess[pairs]])
    return {
        "decoder_cosine": decoder_cosine(sae.W_dec, alive),
        "squared_cosine": float(cosines[pairs].square().mean()),
        "cosine_and_firing": float(torch.corrcoef(both)[0, 1]),
        "saved_bits": bits_saved_by(sae, x, acts),
    }


@torch.no_grad()
def curves(folder: Path, x: Tensor) -> dict[int, dict[str, dict[float, float]]]:
    """Return the mean over seeds of each figure, by number of steps and by L0."""
    values: dict[tuple[int, float], list[dict[str, float]]] = defaultdict(list)
    decoders: dict[tuple[int, float], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    seen: set[tuple[int, float, int]] = set()
    for finished in sorted((folder / "runs").glob(f"{ENTRY}-l0-*/sae/cfg.json")):
        home = finished.parents[1]
        sae = SAE.load_from_disk(home / "sae")
        steps = read_json(home / "training.json")["curve"]["steps"][-1]
        name = re.fullmatch(rf"{ENTRY}-l0-(.*)-seed-(\d+)-.*", home.name)
        assert name is not None
        l0, seed = float(name[1]), int(name[2])
        if (steps, l0, seed) in seen:
            raise ValueError(f"{folder} has two SAEs of {steps} steps, L0 {l0:g}, seed {seed}")
        seen.add((steps, l0, seed))
        values[steps, l0].append(figures(sae, x))
        decoders[steps, l0].append((sae.W_dec.detach(), (sae.encode(x) > 0).any(0)))
    found: dict[int, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for (steps, l0), of_seeds in values.items():
        for name in of_seeds[0]:
            found[steps][name][l0] = sum(one[name] for one in of_seeds) / len(of_seeds)
        scores = [
            stability(a, b, alive_a, alive_b)
            for (a, alive_a), (b, alive_b) in combinations(decoders[steps, l0], 2)
        ]
        if scores:
            found[steps]["stability"][l0] = sum(scores) / len(scores)
    return found


def answer(curve: dict[float, float], sign: int) -> float | None:
    """Return the L0 at which a figure is best, or None at the end of the L0s tried."""
    upwards = {float(l0): sign * value for l0, value in curve.items()}
    return None if is_at_edge(upwards) else round(peak(upwards), 2)


def table(content: dict[str, Any]) -> str:
    """Return a row for each model: the true L0, and where each figure is best."""
    heads = [FIGURES[name][0] for name in FIGURES]
    lines = [f"| | true L0 | {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) + 1) + "|"]
    for name, model in content.items():
        cells: list[str] = []
        for figure, (_, sign) in FIGURES.items():
            l0, true = answer(model["curves"][figure], sign), model["true_l0"]
            close = l0 is not None and max(l0 / true, true / l0) <= CLOSE
            cells.append("at an end" if l0 is None else f"**{l0:.2f}**" if close else f"{l0:.2f}")
        lines.append(f"| {LABELS[name]} | {model['true_l0']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(runs: Path, output: Path) -> None:
    """Measure the SAEs of each search, at the longest training that has the peak of saved bits."""
    content: dict[str, Any] = {}
    for name, (config, overrides) in MODELS.items():
        folder = runs / f"l0-{name}-l0"
        if not folder.exists():
            continue
        run = load_comparison(ROOT / config, overrides).planned[0].run
        assert isinstance(run, SyntheticRun)
        model = synthetic_model(run, runs)
        with torch.no_grad(), temporary_seed(SEED):
            x = model.sample(SAMPLES)
        by_steps = curves(folder, x)
        steps = max(n for n, c in by_steps.items() if answer(c["saved_bits"], 1) is not None)
        content[name] = {
            "true_l0": round(true_l0s(config, overrides)[0], 3),
            "steps": steps,
            "curves": {
                figure: {l0: round(value, 5) for l0, value in sorted(curve.items())}
                for figure, curve in by_steps[steps].items()
            },
        }
        found = {n: answer(c, FIGURES[n][1]) for n, c in by_steps[steps].items()}
        print(name, steps, found, flush=True)
        output.write_text(to_json(content), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
