import math
from contextlib import nullcontext

import pytest
import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.synthetic.training import SyntheticActivationIterator
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_atm.errors import Interrupted, NonFiniteBatchError
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.guard import Guard
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.training.watch import StopFlag
from tests.helpers import ACTIVATIONS, SCHEDULES, make_sae

SETTINGS = ["run_final_eval=false"]
BAD = {
    "nan": lambda x: x.index_fill(1, torch.tensor([2]), float("nan")),
    "one nan": lambda x: torch.cat([x[:3], x[3:4] * float("nan"), x[4:]]),
    "inf": lambda x: torch.cat([x[:-1], x[-1:] / 0]),
    "the loss overflows": lambda x: x * 1e30,
    "a few values overflow it": lambda x: torch.cat([x[:1] * 1e25, x[1:]]),
    "gradients overflow": lambda x: x * 1e18,
}


@pytest.fixture
def spoil(monkeypatch):
    """Serve batches of the stream twice: first spoilt, then as they are."""
    batches = SyntheticActivationIterator.next_batch

    def spoil(at, how, times=1):
        served = {"good": 0, "bad": 0, "held": None}

        def next_batch(self):
            if served["held"] is None:
                served["held"] = batches(self)
                served["good"] += 1
            place = served["good"] - 1
            if place in at and served["bad"] < times * (1 + at.index(place)):
                served["bad"] += 1
                return how(served["held"])
            good, served["held"] = served["held"], None
            return good

        monkeypatch.setattr(SyntheticActivationIterator, "next_batch", next_batch)

    return spoil


def weights(folder):
    return load_file(folder / "sae_weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("how", BAD)
def test_a_run_with_bad_batches_is_the_run_without_them(synthetic_yaml, tmp_path, spoil, how):
    settings = [*SETTINGS, "n_checkpoints=2", "sae.schedule_steps=40", "sae.parent_start=0"]
    plain = train(load_run(synthetic_yaml, [*settings, "output_path=plain"]))
    assert plain.skipped_batches == 0
    spoil([0, 7, 30], BAD[how], times=2)
    result = train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"]))
    assert result.skipped_batches == 6
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))
    # checkpoints hold the averages, thresholds and dead counts; Adam's moments are in the weights
    for name in ("896", "1728"):
        folders = [tmp_path / run / "checkpoints" / name for run in ("plain", "spoilt")]
        assert same(*map(weights, folders))
        states = [torch.load(f / "trainer_state.pt", weights_only=True) for f in folders]
        for key in ("n_forward_passes_since_fired", "act_freq_scores"):
            assert torch.equal(states[0][key], states[1][key])
        for key in ("n_training_samples", "n_training_steps", "n_frac_active_samples"):
            assert states[0][key] == states[1][key]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_of_every_activation_and_schedule(
    synthetic_yaml, tmp_path, spoil, activation, schedule
):
    settings = [*SETTINGS, f"sae.activation={activation}", f"sae.schedule={schedule}"]
    train(load_run(synthetic_yaml, [*settings, "output_path=plain"]))
    spoil([9], BAD["one nan"])
    train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"]))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_same_in_other_precisions(synthetic_yaml, tmp_path, spoil, dtype):
    settings = [*SETTINGS, f"sae.dtype={dtype}"]
    train(load_run(synthetic_yaml, [*settings, "output_path=plain"]))
    spoil([9], BAD["one nan"])
    assert train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"])).skipped_batches == 1
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "gated", "standard"])
def test_the_same_of_saelens_architectures(synthetic_yaml, tmp_path, spoil, architecture):
    atm = ", k: 2, schedule_steps: 40, mask_warm_up_steps: 5"
    own = ", k: 2" if "topk" in architecture else ""
    content = synthetic_yaml.read_text().replace(atm, own)
    synthetic_yaml.write_text(content.replace("architecture: atm", f"architecture: {architecture}"))
    train(load_run(synthetic_yaml, [*SETTINGS, "output_path=plain"]))
    spoil([9], BAD["one nan"])
    train(load_run(synthetic_yaml, [*SETTINGS, "output_path=spoilt"]))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))


def test_the_scale_is_estimated_from_good_batches(synthetic_yaml, tmp_path, spoil):
    for name in ("expected_average_only_in", "covariance_whitening"):
        settings = [*SETTINGS, f"sae.normalize_activations={name}", "n_batches_for_norm_estimate=5"]
        train(load_run(synthetic_yaml, [*settings, f"output_path=plain-{name}"]))
    spoil([2, 7], BAD["nan"])
    spoilt = train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"]))
    assert spoilt.skipped_batches == 2
    assert same(weights(tmp_path / "plain-covariance_whitening"), weights(tmp_path / "spoilt"))


def test_too_many_in_a_row_stop_with_a_checkpoint_of_the_last_good_step(synthetic_yaml, spoil):
    spoil([11], BAD["nan"], times=100)
    match = r"4 batches in a row at step 11 hold NaN or Inf values.*; saved out/checkpoints/704"
    with pytest.raises(NonFiniteBatchError, match=match):
        train(load_run(synthetic_yaml, ["max_bad_batches=4"]))
    state = load_file(newest_checkpoint("out") / "sae_weights.safetensors")
    assert all(t.isfinite().all() for t in state.values())
    assert state["tracker.steps"].item() == 11


def test_bad_from_the_beginning(synthetic_yaml, spoil):
    spoil([0], BAD["nan"], times=100)
    with pytest.raises(NonFiniteBatchError, match="10 batches in a row at step 0"):
        train(load_run(synthetic_yaml))
    state = load_file(newest_checkpoint("out") / "sae_weights.safetensors")
    assert state["tracker.steps"].item() == 0


def test_the_count_goes_on_over_a_stop(synthetic_yaml, spoil):
    spoil([5, 30], BAD["inf"])
    stop = StopFlag()

    def on_step(trainer, output):
        assert output.metrics["skipped_batches"] == (trainer.n_training_steps >= 5)
        if trainer.n_training_steps == 16:
            stop.request()

    with pytest.raises(Interrupted):
        train(load_run(synthetic_yaml, SETTINGS), on_step=on_step, stop=stop)
    assert train(load_run(synthetic_yaml, SETTINGS), resume="out").skipped_batches == 2


@pytest.mark.parametrize(
    "how",
    [
        lambda x: torch.zeros_like(x),
        lambda x: torch.ones_like(x) * 3,
        lambda x: x[:1].expand_as(x).clone(),
        lambda x: torch.cat([torch.zeros_like(x[:, :8]), x[:, 8:]], 1),
        lambda x: x * 1e8,
        lambda x: x * 1e-25,
    ],
    ids=["zero", "constant", "one input", "dead inputs", "enormous", "tiny"],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strange_but_finite_activations_are_trained_on(
    synthetic_yaml, monkeypatch, activation, how
):
    batches = SyntheticActivationIterator.next_batch
    monkeypatch.setattr(SyntheticActivationIterator, "next_batch", lambda self: how(batches(self)))
    settings = [*SETTINGS, f"sae.activation={activation}", "sae.parent_start=0"]
    result = train(load_run(synthetic_yaml, settings))
    assert result.skipped_batches == 0
    assert all(t.isfinite().all() for t in result.sae.state_dict().values())
    assert math.isfinite(result.sae.importance.sum())


class HostReads(TorchDispatchMode):
    """Counts values that the host reads, for each of which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_guarded_step_reads_one_value_more(activation):
    reads = {}
    for guarded in (False, True):
        sae = make_sae(activation=activation, kernels="dense")
        cfg = SAETrainerConfig(10_000, 64, lr=1e-3, lr_end=1e-4)
        trainer = SAETrainer(cfg, sae, iter(()))
        guard = Guard(trainer, 10)
        with guard.watching() if guarded else nullcontext(), HostReads() as mode:
            for _ in range(5):
                x = torch.ones(64, 8)
                guard.step(trainer.step, x) if guarded else trainer.step(x)
        reads[guarded] = mode.count
    assert reads[True] == reads[False] + 5


def test_the_sae_is_left_as_saelens_made_it(synthetic_yaml):
    sae = train(load_run(synthetic_yaml, SETTINGS)).sae
    assert "training_forward_pass" not in vars(sae)
    assert not any(p._post_accumulate_grad_hooks for p in sae.parameters())
