import re
import warnings

import pytest
import torch

from sae_lens_atm.training import watch
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run


@pytest.fixture
def run(synthetic_yaml, monkeypatch):
    monkeypatch.setattr(watch, "_LOOK_EVERY", 10)
    return load_run(synthetic_yaml, ["run_final_eval=false"])


def test_a_collapse_of_importance_is_told_once(run):
    def collapse(trainer, _):
        if trainer.n_training_steps == 18:
            for signal in trainer.sae.tracker.averages()._fields:
                trainer.sae.tracker.get_buffer(signal).copy_(1e6 * torch.eye(32)[3])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(run, on_step=collapse)
    (told,) = (str(w.message) for w in caught if "collapsed" in str(w.message))
    assert re.fullmatch(r"importance .*: at step 20 it is that of 1\.\d\d latents of 32", told)


def test_ordinary_training_is_no_collapse(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(run)
