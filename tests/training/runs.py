"""Runs that are stopped, resumed and compared."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run import train
from tests.helpers import PRESETS, state_equal

PRESET_SETTINGS = {
    name: [f"sae.{field}={value}" for field, value in fields.items()]
    for name, fields in PRESETS.items()
}
"""The two presets, as settings of a run file."""


def stop_after(steps, stop, how=None):
    """Make an `on_step` that requests a stop after some steps."""

    def on_step(trainer, _):
        if trainer.n_training_steps + 1 == steps:
            (how or stop.request)()

    return on_step


def stopped_after(steps, run, resume=None):
    """Train some steps, and return the checkpoint that the stop leaves."""
    stop = StopFlag()
    with pytest.raises(Interrupted) as caught:
        train(run, resume, stop_after(steps, stop), stop)
    return caught.value.checkpoint


def trained_files(folder):
    """All tensors of a finished run."""
    return {
        **load_file(Path(folder) / "sae_weights.safetensors"),
        **load_file(Path(folder) / "sparsity.safetensors"),
    }


def resumes_bit_for_bit(load, at=(17,), straight=None):
    """Check that a run that is stopped and resumed ends as one that is not.

    Args:
        load: returns the run, given its output folder.
        at: numbers of steps after which the run is stopped.
        straight: folder of the finished run without stops, if there is one.
    """
    if straight is None:
        straight = "straight"
        train(load(straight))
    resume = None
    for steps in at:
        stopped_after(steps, load("stopped"), resume)
        torch.manual_seed(12345)  # as in a new process
        resume = "stopped"
    train(load("stopped"), resume=resume)
    assert state_equal(trained_files(straight), trained_files("stopped"))
