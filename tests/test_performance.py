"""The benchmark of training steps, and the page drawn from its figures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import load_script, step_input

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def step_time():
    return load_script("benchmarks/step_time.py")


def test_the_targets_are_compared_with_the_committed_figures():
    found = json.loads((ROOT / "docs/performance/shape-c.json").read_text())
    default = found["steps"]["atm, default schedule"]
    for name, reached in (
        ("step time, default schedule", f"{default['time']:.2f}"),
        ("peak memory, default schedule", f"{default['memory']:.2f}"),
        ("threshold, mask and statistics", f"{found['bookkeeping']:.1%}"),
    ):
        assert re.search(rf"^\| {name} \| ≤ [^|]+ \| {reached} \|$", PAGE, re.MULTILINE), name


def test_every_contender_takes_steps_and_is_timed(step_time):
    shape = step_time.Shape(32, 8, 64, 4)
    named = step_time.contenders(shape)
    assert step_time.BASE in named
    times = step_time.step_times(shape, named, "cpu", repeats=3, warm_up=2)
    assert times.keys() == named.keys()
    assert min(times.values()) > 0
    assert 0 < step_time.bookkeeping_share(shape, "cpu", 3) < 1
    assert set(step_time.floor(shape, "cpu", 3)) == {"product", "adam", "total", "gflops"}


def test_the_phases_match_their_names(step_time):
    """Each phase has a masked pass, or the pressure on children, or both, as its name says."""
    shape = step_time.Shape(64, 8, 64, 4)
    expected = {
        "atm, masks": (True, False),
        "atm, masks and pressure": (True, True),
        "atm, pressure": (False, True),
        "atm, neither": (False, False),
        "atm, masks, dense": (True, False),
        "atm, paper preset": (True, False),
    }
    batches = step_time.make_batches(shape, "cpu")
    for name, (masks, presses) in expected.items():
        contender = step_time.contenders(shape)[name]
        trainer = step_time.make_trainer(contender, shape, "cpu", autocast=False, compiled=False)
        for batch in batches:
            trainer.step(batch)
        losses = trainer.sae.training_forward_pass(step_input(batches[0])).losses
        assert ("masked_mse_loss" in losses) == masks, name
        assert ("parent_loss" in losses) == presses, name


def test_the_default_schedule_is_the_mean_of_its_phases(step_time):
    figures = {"atm, masks": 1.0, "atm, masks and pressure": 2.0, "atm, pressure": 4.0}
    # masks until .6, pressure from .2
    assert step_time.default_schedule(figures) == pytest.approx(0.2 * 1 + 0.4 * 2 + 0.4 * 4)


def test_peak_memory_counts_weights_and_adam(step_time):
    small = step_time.Shape(64, 32, 256, 4)
    large = replace(small, d_in=512, d_sae=8192)  # 4 x 32 MiB of weights and Adam's state
    peaks = {}
    for name, shape in (("small", small), ("large", large)):
        named = {"atm, masks": step_time.contenders(shape)["atm, masks"]}
        peaks[name] = step_time.peak_memory(named, shape, "cpu")["atm, masks"]
    assert peaks["large"] - peaks["small"] > 100


def test_batches_are_reproducible(step_time):
    shape = step_time.Shape(8, 4, 16, 2)
    for a, b in zip(*(step_time.make_batches(shape, "cpu") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_both_ways_of_evaluation_find_the_same_figures(gemma_folder, text_folder, tmp_path):
    evaluation_cost = load_script("benchmarks/evaluation_cost.py")
    path = tmp_path / "found.json"
    hooks = ["model.layers.0", "model.layers.1"]
    evaluation_cost.main(str(gemma_folder), text_folder, hooks, 16, 2, 64, json_path=path)
    found = json.loads(path.read_text())
    assert found["hooks"].keys() == set(hooks)
    for ways in found["hooks"].values():
        for name in ("ce_loss_score", "kl_div_score", "l0"):
            values = [ways[way][name] for way in ("first", "next", "saelens")]
            assert values == pytest.approx([values[0]] * 3, rel=1e-2)
    assert len(evaluation_cost.table(found).splitlines()) == 2 + 2 * 3


def test_the_committed_figures_of_evaluation_agree():
    found = json.loads((ROOT / "docs/performance/evaluation.json").read_text())
    for ways in found["hooks"].values():
        for name in ("ce_loss_score", "kl_div_score", "l0"):
            values = [ways[way][name] for way in ("first", "next", "saelens")]
            assert values == pytest.approx([values[0]] * 3, rel=1e-4)
