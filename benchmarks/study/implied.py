"""Count the latent pairs that ATM treats as child and parent, and compare them with the hierarchy.

The script trains ATM and assigns to each latent the feature nearest to its decoder row. It then
counts the pairs (child, parent) at the end of training, and their energy in the pressure on
children. Pairs are sorted by the true relation of the two features.

Two rules are applied to the same SAE. The present rule compares with the parent's own lift
(`implied_parents`). The old rule compares with the parent's mean activation when it fires.

    python benchmarks/study/implied.py configs/compare-sister-a.yaml implied.json
"""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities, temporary_seed
from torch import Tensor

from sae_lens_atm import ATMTrainingSAE
from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.batch_pool import draw_batch, synthetic_model
from sae_lens_atm.data.synthetic import children_of
from sae_lens_atm.files import to_json
from sae_lens_atm.method.parents import implied_parents, lift
from sae_lens_atm.training.run_file import SyntheticRun

NAMED = 0.7  # a latent is assigned to a feature from this cosine on
POOL = 1000  # batches, as in the comparison


def train(run: SyntheticRun, model: SyntheticModel, l0: float, seed: int) -> ATMTrainingSAE:
    """Train ATM as the comparison does."""
    cfg = run.runner
    with temporary_seed(seed):
        sae = TrainingSAE[Any].from_dict({**cfg.sae.to_dict(), "k": l0})
    batches = (draw_batch(model, cfg.batch_size, seed, step % POOL) for step in range(10**9))
    SAETrainer(cfg.to_sae_trainer_config(), sae, islice(batches, cfg.total_training_steps)).fit()
    assert isinstance(sae, ATMTrainingSAE)
    return sae


def ancestors(model: SyntheticModel) -> dict[int, set[int]]:
    """Return the ancestors of every feature in its tree."""
    assert model.hierarchy is not None
    parents = {c: p for p, cs in children_of(model.hierarchy).items() for c in cs}
    result: dict[int, set[int]] = {}
    for feature in range(model.cfg.num_features):
        result[feature], above = set(), parents.get(feature)
        while above is not None:
            result[feature].add(above)
            above = parents.get(above)
    return result


@torch.no_grad()
def readings(sae: ATMTrainingSAE, rows: Tensor) -> dict[str, Tensor]:
    """Return the parents of all latents by each rule."""
    tracker, averages = sae.parent_tracker, sae.tracker.averages()
    assert tracker is not None
    mean_input = tracker.mean_input / tracker.weight
    lifts = lift(tracker.inputs, tracker.magnitude, mean_input, sae.W_dec)
    when_active = averages.magnitude / averages.frequency.clamp(min=1e-12)
    most = tracker.parents.shape[1]
    return {
        name: implied_parents(lifts, scale, sae.importance, rows, sae.cfg.parent_tau, 0, most)
        for name, scale in (("own lift", lifts.diagonal()), ("mean activation", when_active))
    }


@torch.no_grad()
def count(sae: ATMTrainingSAE, model: SyntheticModel, batch: Tensor) -> dict[str, dict[str, float]]:
    """Return the number of pairs and their energy for each rule, by relation of the features."""
    cosine = cosine_similarities(sae.W_dec, model.feature_dict.feature_vectors)
    nearest, feature = cosine.max(1)
    above = ancestors(model)
    lengths = sae.inference_state()["W_dec"].norm(dim=1)
    energy = (sae.eval().encode(batch) * lengths).square().mean(0)
    overlap = cosine_similarities(sae.W_dec, sae.W_dec).clamp(min=0).square()
    counts: dict[str, dict[str, float]] = {}
    for name, parents in readings(sae, torch.arange(len(feature))).items():
        pairs, charged = Counter[str](), Counter[str]()
        for child, slot in (parents >= 0).nonzero().tolist():
            parent = int(parents[child, slot])
            kind = "others"
            if min(nearest[child], nearest[parent]) < NAMED:
                kind = "unclear"
            elif int(feature[parent]) in above[int(feature[child])]:
                kind = "true"
            pairs[kind] += 1
            charged[kind] += float(energy[child] * overlap[child, parent])
        kinds = ("true", "others", "unclear")
        counts[name] = {f"pairs, {k}": pairs[k] for k in kinds} | {
            f"energy, {k}": charged[k] for k in kinds
        }
    return counts


def main(
    config: Path,
    output: Path,
    l0: Annotated[list[float] | None, typer.Option()] = None,
    seeds: int = 3,
) -> None:
    """Train at each L0 with each seed, count, and write the counts."""
    torch.set_num_threads(1)
    run = load_comparison(config).planned[0].run
    assert isinstance(run, SyntheticRun)
    model = synthetic_model(run, Path())
    with temporary_seed(0):
        batch = model.sample(20_000)
    runs = [
        {"l0": k, "seed": seed, "readings": count(train(run, model, k, seed), model, batch)}
        for k in l0 or [4, 8]
        for seed in range(seeds)
    ]
    output.write_text(to_json({"config": config.name, "runs": runs}) + "\n")
    for run_counts in runs:
        print(run_counts)


if __name__ == "__main__":
    typer.run(main)
