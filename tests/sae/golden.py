"""Short runs with fixed numbers, and the files that keep what they gave.

    python -m tests.sae.golden        # record the files in tests/golden anew

The files are evidence that a change of the code left training as it was. Record them anew only
where a change of behaviour is intended.
"""

from pathlib import Path

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from safetensors.torch import save_file

from sae_lens_atm import ATMTrainingSAEConfig, uniform_at

FOLDER = Path(__file__).parent.parent / "golden"
STEPS, BATCH, D_IN, D_SAE = 60, 48, 16, 64

_BATCHTOPK = {"k": 4, "aux_loss_coefficient": 1.0}
_RELU = {"activation": "relu", "l1_coefficient": 0.05}
# Every phase is in each run: no mask yet, masks, no mask any more, pressure, dead latents.
_COMMON = {
    "dtype": "float64",
    "importance_decay": 0.9,
    "schedule_steps": STEPS,
    "mask_warm_up_steps": 5,
    "mask_end": 0.6,
    "parent_rows": 16,
    "parent_chance": 0.0,  # recorded before these three existed
    "aux_negative_slope": 0.0,
    "frequency_penalty": 0.0,
}
PRESETS = {
    "default": _BATCHTOPK,
    "dense": {**_BATCHTOPK, "kernels": "dense"},
    "masks-off": {**_BATCHTOPK, "mask_rate": 0.0},
    "pressure-off": {**_BATCHTOPK, "parent_weight": 0.0},
    "relu": {**_RELU, "masked_weight": 0.5},
    "paper": {"l1_coefficient": 0.05},
}


def config(name):
    fields = {**_COMMON, **PRESETS[name]}
    if name == "paper":
        for key in (
            "mask_end",
            "parent_rows",
            "parent_chance",
            "aux_negative_slope",
            "frequency_penalty",
        ):
            del fields[key]
        return ATMTrainingSAEConfig.paper(D_IN, D_SAE, **fields)
    return ATMTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **fields)


def uniform(number, *shape):
    """Numbers in [-1, 1) that are the same with every version of PyTorch."""
    return 2 * uniform_at(torch.tensor(number), 7, 5, shape).double() - 1


def batches():
    """Sparse combinations of 24 directions, an eighth of them active, and some noise."""
    directions = uniform(10**6, 24, D_IN)
    for step in range(10**6):
        active = uniform(10**7 + step, BATCH, 24)
        strength = active.where(active > 0.75, 0.0)
        yield strength @ directions + 0.05 * uniform(10**8 + step, BATCH, D_IN)


def make(cfg):
    """A SAE with fixed weights; a sixth of its latents never fire."""
    sae = TrainingSAE.from_dict(cfg.to_dict())
    decoder = uniform(10**9, D_SAE, D_IN)
    with torch.no_grad():
        sae.W_dec.copy_(decoder / decoder.norm(dim=-1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc[::6] = -3.0
    return sae


def run(cfg):
    """Train for `STEPS` steps; the losses of each step and the state at the end."""
    sae = make(cfg)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            lr=3e-3,
            lr_end=3e-4,
            lr_decay_steps=20,
            train_batch_size_samples=BATCH,
            dead_feature_window=8,
            feature_sampling_window=1000,
        ),
        sae=sae,
        data_provider=batches(),
    )
    losses = {}
    step = trainer.step

    def recorded(batch):
        output = step(batch)
        row = len(losses.setdefault("loss", []))
        for name, value in {"loss": output.loss, **output.losses}.items():
            column = losses.setdefault(name, [])
            column += [0.0] * (row - len(column))  # a loss that has begun only now
            column.append(float(value.detach()))
        return output

    trainer.step = recorded
    trainer.fit()
    columns = {
        f"losses/{name}": torch.tensor(column + [0.0] * (STEPS - len(column)), dtype=torch.float64)
        for name, column in losses.items()
    }
    return columns | {f"state/{name}": tensor.clone() for name, tensor in sae.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for preset in PRESETS:
        save_file(run(config(preset)), FOLDER / f"{preset}.safetensors")
