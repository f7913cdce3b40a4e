import math
from types import SimpleNamespace

import pytest
import torch
from sae_lens.synthetic.training import SyntheticActivationIterator
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_atm.errors import NonFiniteBatchError
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.training.supervise import Hook, supervise
from tests.helpers import ACTIVATIONS, state_equal
from tests.training.runs import PRESET_SETTINGS, stopped_after
from tests.training.test_supervise import make_trainer, state_of

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
    """Serve some batches of the stream twice: first spoilt, then as they are."""
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


def test_a_run_with_bad_batches_is_the_run_without_them(synthetic_yaml, tmp_path, spoil):
    settings = [*SETTINGS, "n_checkpoints=2", "sae.schedule_steps=40", "sae.parent_start=0"]
    plain = train(load_run(synthetic_yaml, [*settings, "output_path=plain"]))
    assert plain.skipped_batches == 0
    names = iter(BAD.values())
    spoil([0, 7, 30], lambda x: next(names)(x), times=2)
    result = train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"]))
    assert result.skipped_batches == 6
    assert state_equal(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))
    # Checkpoints hold averages, thresholds and counts of dead latents.
    for name in ("896", "1728"):
        folders = [tmp_path / run / "checkpoints" / name for run in ("plain", "spoilt")]
        assert state_equal(*map(weights, folders))
        states = [torch.load(f / "trainer_state.pt", weights_only=True) for f in folders]
        for key in ("n_forward_passes_since_fired", "act_freq_scores"):
            assert torch.equal(states[0][key], states[1][key])
        for key in ("n_training_samples", "n_training_steps", "n_frac_active_samples"):
            assert states[0][key] == states[1][key]


@pytest.mark.parametrize(
    "settings",
    [*PRESET_SETTINGS.values(), ["sae.dtype=bfloat16"]],
    ids=[*PRESET_SETTINGS, "bfloat16"],
)
def test_under_other_settings(synthetic_yaml, tmp_path, spoil, settings):
    settings = [*SETTINGS, *settings]
    train(load_run(synthetic_yaml, [*settings, "output_path=plain"]))
    spoil([9], BAD["one nan"])
    assert train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"])).skipped_batches == 1
    assert state_equal(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))


@pytest.mark.parametrize("how", BAD)
def test_each_kind_of_bad_batch_leaves_no_trace(how):
    trainer = make_trainer(parent_start=0.0, mask_warm_up_steps=0)
    states = []

    class Look(Hook):
        def wrap_step(self, step):
            def step_and_look(batch):
                states.append(state_of(trainer))
                return step(batch)

            return step_and_look

    with supervise(trainer, [Look(), BadBatchGuard(trainer), DeferredUpdates(trainer)]):
        for _ in range(4):
            trainer.step(next(trainer.data_provider))
        good = next(trainer.data_provider)
        trainer.data_provider = iter([good])
        output = trainer.step(BAD[how](good))
    assert output.metrics["skipped_batches"] == 1
    before, after = states[-2:]
    # The step searches for parents again, with the same result.
    searched = ("parent_tracker.parents", "parent_tracker.own_lift")
    assert state_equal(
        *({k: v for k, v in s.items() if k not in searched} for s in (before, after))
    )


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "standard"])
def test_the_same_of_saelens_architectures(synthetic_yaml, tmp_path, spoil, architecture):
    atm = ", k: 2, schedule_steps: 40, mask_warm_up_steps: 5"
    own = ", k: 2" if "topk" in architecture else ""
    content = synthetic_yaml.read_text().replace(atm, own)
    synthetic_yaml.write_text(content.replace("architecture: atm", f"architecture: {architecture}"))
    train(load_run(synthetic_yaml, [*SETTINGS, "output_path=plain"]))
    spoil([9], BAD["one nan"])
    train(load_run(synthetic_yaml, [*SETTINGS, "output_path=spoilt"]))
    assert state_equal(weights(tmp_path / "plain"), weights(tmp_path / "spoilt"))


def test_the_scale_is_estimated_from_good_batches(synthetic_yaml, tmp_path, spoil):
    for name in ("expected_average_only_in", "covariance_whitening"):
        settings = [*SETTINGS, f"sae.normalize_activations={name}", "n_batches_for_norm_estimate=5"]
        train(load_run(synthetic_yaml, [*settings, f"output_path=plain-{name}"]))
    spoil([2, 7], BAD["nan"])
    spoilt = train(load_run(synthetic_yaml, [*settings, "output_path=spoilt"]))
    assert spoilt.skipped_batches == 2
    assert state_equal(
        weights(tmp_path / "plain-covariance_whitening"), weights(tmp_path / "spoilt")
    )


def test_too_many_in_a_row_stop_with_a_checkpoint_of_the_last_good_step(synthetic_yaml, spoil):
    spoil([11], BAD["nan"], times=100)
    match = r"^4 bad batches in a row at step 11: .*; saved out/checkpoints/704$"
    with pytest.raises(NonFiniteBatchError, match=match):
        train(load_run(synthetic_yaml, ["max_bad_batches=4"]))
    state = load_file(newest_checkpoint("out") / "sae_weights.safetensors")
    assert all(t.isfinite().all() for t in state.values())
    assert state["tracker.steps"].item() == 11


@pytest.mark.parametrize("setting", ["lr=1e30", "sae.dtype=float16"])
def test_divergence_is_not_blamed_on_the_data(synthetic_yaml, setting):
    with pytest.raises(NonFiniteBatchError) as caught:
        train(load_run(synthetic_yaml, [*SETTINGS, setting]))
    text = str(caught.value)
    assert "training diverged" in text
    assert ("lr is 1e+30" if "lr" in setting else "dtype is 'float16'") in text
    assert "NaN" not in text


def test_bad_data_are_not_called_divergence(synthetic_yaml, spoil):
    spoil([3], BAD["one nan"], times=100)
    with pytest.raises(NonFiniteBatchError, match="10 of them hold NaN") as caught:
        train(load_run(synthetic_yaml, SETTINGS))
    assert "diverged" not in str(caught.value)


def test_bad_from_the_beginning(synthetic_yaml, spoil):
    spoil([0], BAD["nan"], times=100)
    with pytest.raises(NonFiniteBatchError, match=r"^10 bad batches in a row at step 0: "):
        train(load_run(synthetic_yaml))
    state = load_file(newest_checkpoint("out") / "sae_weights.safetensors")
    assert state["tracker.steps"].item() == 0


def test_the_count_goes_on_over_a_stop(synthetic_yaml, spoil):
    spoil([5, 30], BAD["inf"])
    stopped_after(17, load_run(synthetic_yaml, SETTINGS))
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
    """Counts the values that the host reads. For each it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_guarded_step_reads_one_value_more(activation):
    reads = {}
    for guarded in (False, True):
        trainer = make_trainer(activation=activation, kernels="dense")
        hooks = [BadBatchGuard(trainer), DeferredUpdates(trainer)] if guarded else []
        with supervise(trainer, hooks), HostReads() as mode:
            for _ in range(5):
                trainer.step(torch.ones(32, 8))
        reads[guarded] = mode.count
    assert reads[True] == reads[False] + 5


class Copies(TorchDispatchMode):
    """Counts the values that are copied into other tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_the_guard_copies_no_averages():
    trainer = make_trainer()
    step = BadBatchGuard(trainer).wrap_step(lambda _: SimpleNamespace(metrics={}))
    with Copies() as mode:
        step(torch.ones(32, 8))
    assert mode.count == 2 * 24 + 1  # the trainer's counts, and the threshold


def test_updates_wait_until_the_step_is_accepted():
    trainer, steps = make_trainer(), []

    class Look(Hook):
        def before_update(self):
            steps.append(int(trainer.sae.tracker.steps))

    with supervise(trainer, [Look(), DeferredUpdates(trainer), Look()]):
        trainer.step(torch.ones(32, 8))
    assert steps == [0, 1]
