"""Which latents the pressure chooses as parents, and how their lifts differ.

The script trains ATM without `parent_chance`, as the comparison does. Pairs of child and parent at
the end of training are sorted by the true relation of their features, as in `implied.py`. *Unclear*
pairs are those whose parent is near no feature.

    python benchmarks/study/chance.py configs/compare-sister-a.yaml chance.json
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from implied import NAMED, ancestors, train
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities

from sae_lens_atm import ATMTrainingSAE
from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.batch_pool import synthetic_model
from sae_lens_atm.files import to_json
from sae_lens_atm.method.parents import lift
from sae_lens_atm.training.run_file import SyntheticRun

KINDS = {
    "true": "true parents",
    "other tree": "features of other trees",
    "unclear": "unclear parents",
}
QUANTILES = (0.1, 0.5, 0.9)


@torch.no_grad()
def describe(sae: ATMTrainingSAE, model: SyntheticModel) -> dict[str, dict[str, Any]]:
    """Return the number of pairs of each kind, and quantiles of their ratios and cosines.

    The ratio is ``L_ji / L_ii``. The cosine is that of the child's typical input, less the mean
    input, with the parent's direction.
    """
    nearest, feature = cosine_similarities(sae.W_dec, model.feature_dict.feature_vectors).max(1)
    above, tracker = ancestors(model), sae.parent_tracker
    assert tracker is not None
    mean = tracker.mean_input / tracker.weight
    lifts = lift(tracker.inputs, tracker.magnitude, mean, sae.W_dec)
    typical = tracker.inputs / tracker.magnitude.clamp(min=1e-12)[:, None] - mean
    ratio, cosine = lifts / lifts.diagonal(), lifts / typical.norm(dim=1, keepdim=True)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for child, place in (tracker.parents >= 0).nonzero().tolist():
        parent = int(tracker.parents[child, place])
        c, p = int(feature[child]), int(feature[parent])
        if nearest[child] < NAMED:
            kind = "unclear child"
        elif nearest[parent] < NAMED:
            kind = "unclear"
        elif p in above[c]:
            kind = "true"
        else:
            same = c == p or ({c} | above[c]) & ({p} | above[p])
            kind = "same tree" if same else "other tree"
        found[kind].append((float(ratio[child, parent]), float(cosine[child, parent])))
    levels = torch.tensor(QUANTILES)
    return {
        kind: {
            "pairs": len(pairs),
            **dict(
                zip(
                    ("ratio", "cosine"),
                    torch.tensor(pairs).quantile(levels, 0).T.tolist(),
                    strict=True,
                )
            ),
        }
        for kind, pairs in found.items()
    }


def table(content: dict[str, Any]) -> str:
    """Return the table of the lab notebook."""
    heads = [f"L0 {run['l0']:g}: pairs | ratio | cosine" for run in content["runs"]]
    lines = [f"| parents | {' | '.join(heads)} |", "|---|" + "--:|--:|--:|" * len(heads)]
    for kind, name in KINDS.items():
        cells: list[str] = []
        for run in content["runs"]:
            one = run["kinds"].get(kind)
            cells += ["0", "", ""] if one is None else [str(one["pairs"]), *_spreads(one)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spreads(one: dict[str, Any]) -> list[str]:
    quantiles = (one[name] for name in ("ratio", "cosine"))
    return [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in quantiles]


def main(
    config: Path,
    output: Path,
    l0: Annotated[list[float] | None, typer.Option()] = None,
    seed: int = 0,
) -> None:
    """Train at each L0, describe the pairs, and write what was found."""
    torch.set_num_threads(1)
    run = load_comparison(config, ["sae.parent_chance=0"]).planned[0].run
    assert isinstance(run, SyntheticRun)
    model = synthetic_model(run, Path())
    runs = [
        {"l0": k, "seed": seed, "kinds": describe(train(run, model, k, seed), model)}
        for k in l0 or [4, 12]
    ]
    output.write_text(to_json({"config": config.name, "runs": runs}) + "\n")
    print(table({"runs": runs}))


if __name__ == "__main__":
    typer.run(main)
