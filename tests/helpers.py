import importlib.util
import sys
from pathlib import Path

import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput

from sae_lens_atm import ATMTrainingSAEConfig

ACTIVATIONS = ("batchtopk", "relu")
# The fields in which the presets differ.
PRESETS = {
    "default": {},
    "paper": {"activation": "relu", "masked_weight": 1.0, "mask_end": 1.0, "parent_weight": 0.0},
}


def load_script(path):
    """Import a script of the repository."""
    path = Path(__file__).parent.parent / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def make_sae(d_in=8, d_sae=24, k=3, **fields):
    steps = {"mask_warm_up_steps": 2, "schedule_steps": 10, "mask_end": 1.0}
    fields = {**steps, "d_in": d_in, "d_sae": d_sae, **fields}
    cfg = ATMTrainingSAEConfig(k=k, **fields)
    return TrainingSAE.from_dict(cfg.to_dict())


def step_input(x, dead=None, step=0, logging=False):
    """Make SAELens' input of a step. New versions of SAELens add fields, here alone."""
    return TrainStepInput(
        sae_in=x,
        coefficients={"l0": 0.1, "l1": 0.1},
        dead_neuron_mask=dead,
        n_training_steps=step,
        is_logging_step=logging,
    )


def train(sae, steps, batch_size=64, lr=1e-2, data=None):
    optimizer = torch.optim.Adam(sae.parameters(), lr)
    sae.train()
    for step in range(steps):
        # float64 SAEs are for exactness; a bfloat16 one is trained on float32 activations too
        dtype = torch.promote_types(sae.dtype, torch.float32)
        x = torch.randn(batch_size, sae.cfg.d_in, dtype=dtype) if data is None else data(step)
        dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
        output = sae.training_forward_pass(step_input(x, dead, step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sae


def state_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
