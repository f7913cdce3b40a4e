"""Measure time and memory of the absorption metric for a 16k SAE, on random activations.

    python benchmarks/absorption_scale.py

Each parent has three children. Each latent detects one feature with a recall of .9. The latents of
half of the children absorb their parents.
"""

import json
import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from sae_lens_atm.metrics import Absorption


def main(
    latents: int = 16_384,
    parents: int = 2000,
    samples: int = 100_000,
    d_in: int = 768,
    active: Annotated[
        int, typer.Option(help="Approximate number of active features a sample.")
    ] = 32,
    batch: int = 1024,
    threads: int = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the result.")] = None,
) -> None:
    """Measure time and memory of the absorption metric."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    children = {p: [parents + 3 * p + i for i in range(3)] for p in range(parents)}
    child_of = torch.arange(parents * 3) // 3
    n_features = latents
    vectors = torch.nn.functional.normalize(
        torch.randn(n_features, d_in, generator=generator), dim=1
    )
    decoder = vectors.clone()
    decoder[parents : 4 * parents : 2] += 0.5 * vectors[child_of[::2]]  # half absorb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    metric = Absorption(decoder, vectors, children)
    spent, made = time.perf_counter() - start, 0.0
    for first in range(0, samples, batch):
        begin = time.perf_counter()
        size = min(batch, samples - first)
        features = torch.zeros(size, n_features)
        loose = torch.randint(0, n_features, (size, active // 2), generator=generator)
        features.scatter_(1, loose, 1.0 + torch.rand(loose.shape, generator=generator))
        chosen = torch.randint(0, 3 * parents, (size, active // 4), generator=generator)
        features.scatter_(1, parents + chosen, 1.5)
        features.scatter_(1, child_of[chosen], 1.5)  # a parent beside each
        acts = features * (torch.rand(features.shape, generator=generator) < 0.9)
        absorbing = acts[:, parents : 4 * parents] > 0
        absorbing[:, 1::2] = False
        acts[:, :parents] *= ~absorbing.view(size, parents, 3).any(-1)
        made += time.perf_counter() - begin
        begin = time.perf_counter()
        metric.update(acts, features)
        spent += time.perf_counter() - begin
    begin = time.perf_counter()
    scores = metric.compute()
    spent += time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "latents": latents,
        "parents": parents,
        "samples": samples,
        "threads": threads,
        "seconds": round(spent, 1),
        "peak_gib": round(peak / 2**20, 2),
        "peak_gib_before": round(before / 2**20, 2),
        "absorption_full": scores.full,
        "absorption_fraction": scores.fraction,
    }
    print(json.dumps(found, indent=1))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
