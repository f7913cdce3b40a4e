"""An upper bound for SAEs with a linear encoder: the true dictionary with a trained encoder.

The decoder of a BatchTopK SAE is set to the synthetic model's features and frozen. Encoder, biases
and threshold are trained as in the comparison: same batches, learning rate and steps. Such an SAE
cannot absorb. The absorption that the metric still measures comes from features that are not
orthogonal.

    python benchmarks/study/ceiling.py configs/compare-sister-a.yaml ceiling.json
"""

from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.util import temporary_seed

from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.batch_pool import batch_seed, draw_batch, synthetic_model
from sae_lens_atm.evaluation.synthetic import evaluate_closely
from sae_lens_atm.files import check_writable_file, to_json
from sae_lens_atm.training.run_file import SyntheticRun


def train_encoder(run: SyntheticRun, l0: float, seed: int) -> dict[str, float]:
    """Train the encoder, and return the figures of the SAE."""
    cfg = run.runner
    model = synthetic_model(run, Path())
    features = torch.nn.functional.normalize(model.feature_dict.feature_vectors.detach(), dim=1)
    with temporary_seed(seed):
        sae = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=cfg.sae.d_in, d_sae=len(features), k=l0)
        )
    sae.W_dec.data = features.clone()
    sae.W_enc.data = features.T.contiguous().clone()
    sae.W_dec.requires_grad_(False)
    batches = (draw_batch(model, cfg.batch_size, seed, step % 1000) for step in range(10**9))
    SAETrainer(cfg.to_sae_trainer_config(), sae, islice(batches, cfg.total_training_steps)).fit()
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder)
    return evaluate_closely(saved, model, cfg.eval_samples, batch_seed(seed, -2)).figures


def with_true_activations(run: SyntheticRun, l0: float) -> float:
    """Return the explained variance of the true features and their true activations.

    Only the largest `l0` per sample on average are used: there is no encoder that could err.
    """
    model = synthetic_model(run, Path())
    with torch.no_grad(), temporary_seed(batch_seed(0, -2)):
        x, activations = model.sample_with_features(run.runner.eval_samples)
    features = model.feature_dict.feature_vectors.detach()
    lengths = activations * features.norm(dim=1)
    smallest = lengths.flatten().topk(round(l0 * len(x))).values[-1]
    parts = torch.where(lengths >= smallest, activations, 0) @ features
    return 1 - float((x - parts).var(dim=0).sum() / x.var(dim=0).sum())


def main(
    config: Path,
    output: Path,
    l0: float = 4,
    seeds: Annotated[int, typer.Option(min=2)] = 3,
) -> None:
    """Train and evaluate each seed; write the figures, their means and standard deviations."""
    check_writable_file("OUTPUT", output)
    torch.set_num_threads(1)
    run = load_comparison(config).planned[0].run
    assert isinstance(run, SyntheticRun)
    runs = [train_encoder(run, l0, seed) for seed in range(seeds)]
    spread = {name: [r[name] for r in runs] for name in runs[0]}
    content = {
        "config": config.name,
        "l0": l0,
        "explained_variance_true_activations": with_true_activations(run, l0),
        "runs": runs,
        "mean": {name: mean(values) for name, values in spread.items()},
        "deviation": {name: stdev(values) for name, values in spread.items()},
    }
    output.write_text(to_json(content) + "\n")
    for name in ("l0", "explained_variance", "mcc", "f1", "absorption_full", "absorption_fraction"):
        print(f"{name:22} {content['mean'][name]:.4f} ± {content['deviation'][name]:.4f}")


if __name__ == "__main__":
    typer.run(main)
