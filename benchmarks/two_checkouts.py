"""Train the same SAEs with two checkouts of this project, and compare the results bit by bit.

    git worktree add ../before COMMIT
    python benchmarks/two_checkouts.py ../before .

Each checkout trains every configuration for 250 steps of SAELens' trainer, on one CPU thread, with
dead latents and pressure on children. The script compares the loss of each step and every tensor of
the state dict. "equal" means `torch.equal`; otherwise the largest absolute difference is printed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

STEPS, BATCH, D_IN, D_SAE = 250, 256, 32, 256
_COMMON: dict[str, Any] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "k": 8,
    "schedule_steps": STEPS,
    "mask_warm_up_steps": 10,
    "importance_decay": 0.95,
}
_RELU: dict[str, Any] = {"activation": "relu", "l1_coefficient": 0.1}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "dense kernels": {"kernels": "dense"},
    "float64": {"dtype": "float64"},
    "masks to the end": {"mask_end": 1.0},
    "masks off": {"mask_rate": 0.0},
    "pressure off": {"parent_weight": 0.0},
    "masked_weight .25": {"masked_weight": 0.25},
    "no rescaling by decoder norm": {"rescale_acts_by_decoder_norm": False},
    "ReLU": _RELU,
    "ReLU, layer norm": {**_RELU, "normalize_activations": "layer_norm"},
    "paper": {},
    "paper, float64": {"dtype": "float64"},
}


def train(name: str) -> dict[str, torch.Tensor]:
    from sae_lens import SAETrainer, TrainingSAE
    from sae_lens.config import SAETrainerConfig

    from sae_lens_atm import ATMTrainingSAEConfig

    fields = {**_COMMON, **CONFIGURATIONS[name]}
    if name.startswith("paper"):
        cfg = ATMTrainingSAEConfig.paper(**fields, l1_coefficient=0.1)
    else:
        cfg = ATMTrainingSAEConfig(**fields)
    torch.manual_seed(0)
    sae = TrainingSAE[Any].from_dict(cfg.to_dict())
    sae.b_enc.data[::6] = -3.0
    directions = torch.randn(3 * D_IN, D_IN, dtype=sae.dtype)

    def batches() -> Any:
        while True:
            active = torch.rand(BATCH, 3 * D_IN, dtype=sae.dtype)
            yield active.where(active > 0.9, 0.0) @ directions

    settings = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        lr=3e-3,
        lr_end=3e-4,
        lr_decay_steps=50,
        train_batch_size_samples=BATCH,
        dead_feature_window=20,
        feature_sampling_window=1000,
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=batches())
    losses: list[float] = []
    step = trainer.step

    def recorded(batch: torch.Tensor) -> Any:
        output = step(batch)
        losses.append(float(output.loss.detach()))
        return output

    trainer.step = recorded
    trainer.fit()
    return {"loss": torch.tensor(losses, dtype=torch.float64), **sae.state_dict()}


def main(before: str, after: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, checkout in enumerate((before, after)):
            environment = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve())}
            command = [sys.executable, __file__, "--into", f"{folder}/{number}"]
            subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": "1"})
        results = [torch.load(f"{folder}/{number}") for number in (0, 1)]
    for name in CONFIGURATIONS:
        old, new = results[0][name], results[1][name]
        differing = {
            key: float((old[key].double() - new[key].double()).abs().max())
            for key in old
            if not torch.equal(old[key], new[key])
        }
        same = "equal" if not differing and old.keys() == new.keys() else f"{differing}"
        print(f"{name:30} {same}")


if __name__ == "__main__":
    if sys.argv[1] == "--into":
        torch.set_num_threads(1)
        torch.save({name: train(name) for name in CONFIGURATIONS}, sys.argv[2])
    else:
        main(sys.argv[1], sys.argv[2])
