"""Runs that are stopped, resumed and compared."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import parse_run
from sae_lens_atm.yaml_files import apply_overrides
from tests.conftest import CONTEXT
from tests.helpers import PRESETS, state_equal

PRESET_SETTINGS = {
    name: [f"sae.{field}={value}" for field, value in fields.items()]
    for name, fields in PRESETS.items()
}
"""The two presets, as settings of a run file."""


RUN = {
    "runner": "synthetic",
    "seed": 3,
    "hierarchy_model": {"hidden_dim": 16, "roots": 4, "lone_features": 4, "depth": 1},
    "sae": {
        "architecture": "atm",
        "d_in": 16,
        "d_sae": 32,
        "k": 2,
        "schedule_steps": 40,
        "mask_warm_up_steps": 5,
    },
    "training_samples": 2560,
    "batch_size": 64,
    "lr": 1e-3,
    "lr_warm_up_steps": 5,
    "lr_decay_steps": 10,
    "run_final_eval": False,
}


def synthetic_run(output, **settings):
    """A run of 40 steps on a small hierarchy, with other values for some settings.

    Names of fields of the SAE start with "sae.".
    """
    sae = {name[4:]: value for name, value in settings.items() if name.startswith("sae.")}
    run = {name: value for name, value in settings.items() if not name.startswith("sae.")}
    content = {**RUN, **run, "output_path": str(output)}
    return parse_run({**content, "sae": {**content["sae"], **sae}})


def language_model_run(output, model, dataset, overrides=()):
    """A run of 40 steps on a tiny model, with SAELens' ordinary activation buffer.

    The buffer holds 16 rows of 16 tokens and takes in 4 rows at once. The batch of 48 divides
    neither.
    """
    content = {
        "runner": "language_model",
        "seed": 1,
        "model_name": str(model),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.1",
        "dataset_path": str(dataset),
        "is_dataset_tokenized": False,
        "streaming": False,
        "context_size": CONTEXT,
        "training_tokens": 1920,
        "train_batch_size_tokens": 48,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "activations_mixing_fraction": 0.5,
        "n_eval_batches": 1,
        "sae": {
            "architecture": "atm",
            "d_in": 16,
            "d_sae": 64,
            "k": 4,
            "schedule_steps": 40,
            "mask_warm_up_steps": 5,
        },
        "output_path": str(output),
    }
    return parse_run(apply_overrides(content, overrides))


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
