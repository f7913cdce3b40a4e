"""Where the error of SAEs lies: its share along the directions in which the inputs vary most.

python benchmarks/study/error_directions.py runs/gemma-3-270m runs/activations-gemma-3-270m-l3 \
    batchtopk=RUN/sae "F=RUN/sae" --write

The last contexts of a cache are read, without special tokens. Training has read them too.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import load_from_disk
from sae_lens import SAE
from torch import Tensor
from transformers import AutoTokenizer

RESULTS = Path(__file__).parent / "results/error-directions.json"
STRONG = 64
"""Number of principal directions that count as strong."""


def read_activations(model: Path, cache: Path, contexts: int) -> Tensor:
    """Return activations of the last contexts, ``(tokens, d_in)``, without special tokens."""
    dataset: Any = load_from_disk(str(cache)).with_format("torch")
    rows: Any = dataset[len(dataset) - contexts :]
    (name,) = (column for column in dataset.column_names if column != "token_ids")
    special = torch.tensor(AutoTokenizer.from_pretrained(model).all_special_ids)
    keep = ~torch.isin(rows["token_ids"], special)
    return rows[name][keep].float()


@torch.no_grad()
def measure(sae: SAE[Any], x: Tensor) -> dict[str, float]:
    """Return the unexplained variance along strong and other directions, and firing frequencies."""
    centred = x - x.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh
    acts = sae.encode(x)
    error = ((x - sae.decode(acts)) @ directions.T).square().sum(0) / centred.square().sum()
    frequency = (acts > 0).double().mean(0)
    strong_part = (sae.W_dec @ directions[:STRONG].T).square().sum(1)
    energy = acts.double().square().mean(0) * strong_part
    return {
        "explained_variance": 1 - error.sum().item(),
        "unexplained_strong": error[:STRONG].sum().item(),
        "unexplained_other": error[STRONG:].sum().item(),
        "frequency_of_strong": ((energy * frequency).sum() / energy.sum()).item(),
        "l0": (acts > 0).double().sum(1).mean().item(),
    }


def table(stored: dict[str, Any]) -> str:
    """Return the table of stored figures."""
    labels = {
        "explained_variance": "explained variance",
        "unexplained_strong": f"unexplained, {stored['strong']} strongest directions",
        "unexplained_other": "other directions",
        "frequency_of_strong": "firing frequency of the latents along the strongest",
    }
    lines = [f"| | {' | '.join(labels.values())} |", "|---" + "|--:" * len(labels) + "|"]
    for sae, row in stored["saes"].items():
        lines.append(f"| {sae} | {' | '.join(f'{row[name]:.3f}' for name in labels)} |")
    return "\n".join(lines)


def main(
    model: Path,
    cache: Path,
    saes: Annotated[list[str], typer.Argument(help="NAME=FOLDER")],
    contexts: int = 60,
    write: bool = False,
) -> None:
    """Print the figures of saved SAEs; with --write, store them."""
    x = read_activations(model, cache, contexts)
    folders = dict(sae.split("=", 1) for sae in saes)
    found = {name: measure(SAE.load_from_disk(path), x) for name, path in folders.items()}
    rounded = {sae: {k: round(v, 5) for k, v in row.items()} for sae, row in found.items()}
    text = json.dumps({"tokens": len(x), "strong": STRONG, "saes": rounded}, indent=1)
    print(text)
    if write:
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
