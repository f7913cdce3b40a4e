"""Global random state: saved and restored, and left alone by training and evaluation."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from sae_lens_atm.compare.evaluate_saved import data_of, evaluate_saved
from sae_lens_atm.data.random_state import load_random_state, save_random_state
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run


def test_a_saved_state_is_restored(tmp_path):
    torch.rand(3)
    save_random_state(tmp_path)
    expected = torch.rand(5)
    load_random_state(tmp_path)
    assert torch.equal(torch.rand(5), expected)
    load_random_state(tmp_path / "checkpoint of SAELens")  # has none
    assert not torch.equal(torch.rand(5), expected)


def next_numbers():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


@pytest.fixture(params=["synthetic", "language model"])
def run_file(request):
    name = "synthetic_yaml" if request.param == "synthetic" else "language_model_yaml"
    return request.getfixturevalue(name)


def seeded():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def test_training_and_evaluating_leave_it_alone(run_file):
    seeded()
    expected = next_numbers()
    seeded()
    train(load_run(run_file))
    evaluate_saved(["out"], data_of(str(run_file)))
    assert next_numbers() == expected


def test_runs_do_not_depend_on_it(run_file):
    seeded()
    first = train(load_run(run_file, ["output_path=first"])).sae.state_dict()
    second = train(load_run(run_file, ["output_path=second"])).sae.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_importing_leaves_it_alone():
    code = """
import random
import numpy, torch
torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
import sae_lens_atm, sae_lens_atm.training.run
after = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
assert torch.equal(before[0], after[0])
assert before[1:] == after[1:]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_number_of_threads_changes_rounding_only(synthetic_yaml):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = train(load_run(synthetic_yaml, [f"output_path=threads-{threads}"]))
            found.append(result.sae.state_dict())
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)
