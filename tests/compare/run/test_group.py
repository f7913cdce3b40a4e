"""SAEs of a comparison that share the activations of a language model."""

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.run import group
from sae_lens_atm.compare.run.group import SharedBatches, estimate_scales
from sae_lens_atm.compare.run.language_model import train_group
from sae_lens_atm.errors import Interrupted, NonFiniteBatchError
from sae_lens_atm.evaluation import language_model
from sae_lens_atm.training.before_first_step import ESTIMATING, FILLING
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.supervise import supervise
from tests.helpers import state_equal
from tests.training.test_supervise import make_trainer

SCALED = ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=3"]


@pytest.fixture
def spoil(monkeypatch):
    """Put bad batches before some of the batches of a group."""

    def spoil(before, how, times=1):
        def spoilt(batches):
            for i, batch in enumerate(batches):
                for _ in range(times if i in before else 0):
                    yield {hook: how(acts) for hook, acts in batch.items()}
                yield batch

        monkeypatch.setattr(group, "SharedBatches", lambda batches: SharedBatches(spoilt(batches)))

    return spoil


def train_one_group(path, *overrides, stop_in=None, stop_after=None, steps=None):
    """Train a group and return its weights, or stop it in a phase or after some steps.

    The number of each step of the first SAE is appended to `steps`.
    """
    comparison = load_comparison(path, ["seeds=[0]", *overrides])
    stop, phases = StopFlag(), []

    def on_phase(phase):
        phases.append(phase.what)
        if stop_in is not None and phase.what.startswith(stop_in) and phase.done > 0:
            stop.request()

    def on_step(trainer, _):
        if steps is not None:
            steps.append(trainer.n_training_steps)
        if trainer.n_training_steps == stop_after:
            stop.request()

    train_group(comparison.planned, comparison.output, 4, on_step, stop, on_phase)
    weights = comparison.output.glob("runs/*/sae/sae_weights.safetensors")
    return {p.parent.parent.name: load_file(p) for p in weights}


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        (lambda x: x / 0, []),
        (lambda x: x * 1e30, []),  # finite, but the loss overflows
        (lambda x: x / 0, SCALED),
    ],
    ids=["inf", "overflow", "while the scale is estimated"],
)
def test_all_saes_of_a_group_skip_bad_batches(
    language_model_comparison_yaml, spoil, how, overrides
):
    plain = train_one_group(language_model_comparison_yaml, *overrides, "output_path=plain")
    spoil([0, 7], how, times=2)
    spoilt = train_one_group(language_model_comparison_yaml, *overrides, "output_path=spoilt")
    assert len(plain) == 4
    assert plain.keys() == spoilt.keys()
    for name, state in plain.items():
        assert state_equal(state, spoilt[name]), name


@pytest.mark.parametrize("phase", [FILLING, ESTIMATING])
def test_a_group_that_is_stopped_before_its_first_step_saves_nothing(
    language_model_comparison_yaml, phase
):
    path = language_model_comparison_yaml
    settings = [*SCALED, "n_batches_in_buffer=16", "activations_mixing_fraction=0.5"]
    with pytest.raises(Interrupted):
        train_one_group(path, *settings, "output_path=stopped", stop_in=phase)
    assert not list(Path("stopped").rglob("*.safetensors"))
    straight = train_one_group(path, *settings, "output_path=straight")
    found = train_one_group(path, *settings, "output_path=stopped")
    assert straight.keys() == found.keys()
    for name, state in straight.items():
        assert state_equal(state, found[name]), name


def test_a_group_that_died_between_two_renames_is_resumed(language_model_comparison_yaml):
    with pytest.raises(Interrupted):
        train_one_group(language_model_comparison_yaml, stop_after=9)
    (stopped,) = Path("out").rglob("groups/*/stopped")
    stopped.rename(stopped.with_name(".stopped.replaced"))
    steps = []
    train_one_group(language_model_comparison_yaml, steps=steps)
    assert min(steps) == 10


def without_entry(path, name):
    """Remove an entry from a comparison file, and return its line."""
    lines = path.read_text().splitlines(keepends=True)
    (line,) = (text for text in lines if text.strip().startswith(f"{name}:"))
    path.write_text("".join(text for text in lines if text != line))
    return line


def test_a_stopped_group_resumes_with_an_entry_less_or_more(language_model_comparison_yaml):
    path = language_model_comparison_yaml
    straight = train_one_group(path, "output_path=straight")
    line = without_entry(path, "gated")
    with pytest.raises(Interrupted):
        train_one_group(path, stop_after=9)  # without gated
    rest = path.read_text()
    without_entry(path, "batchtopk")
    steps = []
    with pytest.raises(Interrupted):
        train_one_group(path, stop_after=12, steps=steps)  # without both
    assert steps == [10, 11, 12]
    path.write_text(rest.rstrip("\n") + "\n" + line)  # all
    steps = []
    found = train_one_group(path, steps=steps)
    assert steps[0] == 13  # atm
    assert steps.count(10) == 2  # batchtopk goes on after step 9, gated begins at 1
    assert found.keys() == straight.keys()
    (gated,) = (name for name in straight if name.startswith("gated"))
    assert state_equal(straight[gated], found[gated])
    assert not list(Path("out").glob("groups/*"))


def test_a_damaged_state_is_passed_over(language_model_comparison_yaml):
    with pytest.raises(Interrupted):
        train_one_group(language_model_comparison_yaml, stop_after=9)
    (state,) = Path("out").glob("groups/*/stopped/atm*/trainer_state.pt")
    state.write_bytes(b"no state")
    steps = []
    train_one_group(language_model_comparison_yaml, steps=steps)
    assert steps[0] == 10  # the others
    assert 1 in steps


def test_an_evaluation_is_stopped_and_done_later(language_model_comparison_yaml, monkeypatch):
    monkeypatch.setattr(language_model, "TOKENS", 32)
    with pytest.raises(Interrupted):
        train_one_group(language_model_comparison_yaml, stop_in="evaluating batchtopk")
    figures = {path.parent.name for path in Path("out").rglob("figures.json")}
    assert {name.split("-")[0] for name in figures} == {"atm"}
    train_one_group(language_model_comparison_yaml)
    assert len(list(Path("out").rglob("figures.json"))) == 4


def test_all_saes_of_a_group_have_one_scale_from_few_batches():
    """The estimate ends when it is accurate, and stores no more batches than it took."""
    batch, taken = 3 * torch.randn(32, 8), []

    def batches():
        while True:
            taken.append(batch)
            yield {"x": batch}

    scaled = "expected_average_only_in"
    trainers = {
        n: make_trainer(normalize_activations=s)
        for n, s in zip("abc", [scaled, scaled, "none"], strict=True)
    }
    group = SimpleNamespace(
        data_provider=batches(),
        cfg=SimpleNamespace(n_batches_for_norm_estimate=1000),
        hook_names=dict.fromkeys("abc", "x"),
        trainers=trainers,
    )
    with ExitStack() as supervisions:
        for trainer in trainers.values():
            supervisions.enter_context(supervise(trainer, []))
        estimate_scales(group)
    expected = pytest.approx(8**0.5 / batch.norm(dim=1).mean().item())
    scales = [trainer.activation_scaler.scaling_factor for trainer in trainers.values()]
    assert scales == [expected, expected, None]
    assert len(taken) == 10


def test_too_many_bad_batches_stop_a_group(language_model_comparison_yaml, spoil):
    spoil([3], lambda x: x / 0, times=4)
    with pytest.raises(
        NonFiniteBatchError, match=r"^atm, L0 4, seed 0: 4 bad batches in a row at step 3"
    ):
        train_one_group(language_model_comparison_yaml, "max_bad_batches=4")


def test_saes_that_reject_a_batch_get_the_same_replacement():
    batches = SharedBatches({"x": torch.tensor(i)} for i in range(100))
    one, other = batches.of("x"), batches.of("x")
    assert next(batches)["x"] == 0
    assert list(islice(one, 2)) == [1, 2]
    assert next(other) == 1
    assert next(batches)["x"] == 3  # the next step
    assert [next(other), next(one), next(other)] == [4, 4, 5]
