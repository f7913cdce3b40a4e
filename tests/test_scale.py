"""The counts of benchmarks/scaling.py: bytes exchanged and matrix products of a training step."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, JumpReLUTrainingSAEConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_atm import ATMTrainingSAEConfig
from tests.helpers import load_script

ROOT = Path(__file__).parents[1]
BATCH, D_IN, D_SAE = 512, 288, 2048  # the proportions of Gemma-2-2b with 16k latents


@pytest.fixture(scope="module")
def scaling():
    return load_script("benchmarks/scaling.py")


def test_the_traffic_counted_is_that_of_the_formula(scaling):
    found = json.loads((ROOT / "docs/scale/scaling.json").read_text())
    for shape, (_, *sizes) in scaling.SHAPES.items():
        for name, cfg in scaling.contenders(*sizes).items():
            assert found[f"{shape}, {name}"]["bytes"] == scaling.traffic(cfg)


def products_of_a_step(cfg, step=0):
    """Count the products of a real training step with half of the latents dead."""
    sae = TrainingSAE.from_dict(cfg.to_dict())
    trainer_cfg = SAETrainerConfig(100 * BATCH, BATCH, lr=1e-4, lr_end=1e-5, autocast=True)
    trainer = SAETrainer(trainer_cfg, sae, iter(()))
    if hasattr(sae, "tracker"):
        sae.tracker.steps.fill_(step)
    trainer.n_forward_passes_since_fired[: D_SAE // 2] = 1e9
    with FlopCounterMode(display=False) as operations:
        trainer.step(torch.randn(BATCH, D_IN))
    return operations.get_total_flops() / (2 * BATCH * D_IN * D_SAE)


def test_products_are_those_of_real_steps(scaling):
    shape = {"d_in": D_IN, "d_sae": D_SAE}
    # Of 10,000 steps masks are active until 60%, and the pressure on children from 20%.
    cfg = ATMTrainingSAEConfig(**shape, k=8, parent_rows=128)
    phases = {150: 0.2, 5000: 0.4, 9000: 0.4}
    counted = sum(share * products_of_a_step(cfg, step) for step, share in phases.items())
    assert scaling.products(cfg, BATCH) == pytest.approx(counted, abs=0.1)
    for other in (
        BatchTopKTrainingSAEConfig(**shape, k=8),
        JumpReLUTrainingSAEConfig(**shape),
        ATMTrainingSAEConfig(**shape, k=8, mask_rate=0, parent_weight=0),
    ):
        assert scaling.products(other, BATCH) == pytest.approx(products_of_a_step(other), abs=0.1)
