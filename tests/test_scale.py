"""The formulas of benchmarks/scaling.py, compared with training steps."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_atm import ATMTrainingSAEConfig
from tests.helpers import load_script

ROOT = Path(__file__).parents[1]
BATCH, D_IN, D_SAE = 512, 288, 2048


def test_the_traffic_counted_is_that_of_the_formula():
    scaling = load_script("benchmarks/scaling.py")
    found = json.loads((ROOT / "docs/scale/scaling.json").read_text())
    for shape, (_, *sizes) in scaling.SHAPES.items():
        for name, cfg in scaling.contenders(*sizes).items():
            assert found[f"{shape}, {name}"]["bytes"] == scaling.traffic(cfg)


def products_of_a_step(cfg, step=0):
    """Products of a training step, half of the latents being dead."""
    sae = TrainingSAE.from_dict(cfg.to_dict())
    settings = SAETrainerConfig(100 * BATCH, BATCH, lr=1e-4, lr_end=1e-5, autocast=True)
    trainer = SAETrainer(settings, sae, iter(()))
    x = torch.randn(BATCH, D_IN)
    trainer.step(x)
    if hasattr(sae, "tracker"):
        sae.tracker.steps.fill_(step)
    trainer.n_forward_passes_since_fired[: D_SAE // 2] = 1e9
    with FlopCounterMode(display=False) as operations:
        trainer.step(x)
    return operations.get_total_flops() / (2 * BATCH * D_IN * D_SAE)


def test_products_are_those_of_real_steps():
    scaling = load_script("benchmarks/scaling.py")
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "k": 8}
    atm = ATMTrainingSAEConfig(**sizes, parent_rows=128)
    # of 10,000 steps: 100 without masks, masks to 60%, pressure on children from 20%
    phases = {150: 0.2, 5000: 0.4, 9000: 0.4}
    counted = sum(share * products_of_a_step(atm, step) for step, share in phases.items())
    assert scaling.products(atm, BATCH) == pytest.approx(counted, abs=0.1)
    for cfg in (
        BatchTopKTrainingSAEConfig(**sizes),
        JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE),
        ATMTrainingSAEConfig(**sizes, mask_rate=0, parent_weight=0),
    ):
        assert scaling.products(cfg, BATCH) == pytest.approx(products_of_a_step(cfg), abs=0.1)
