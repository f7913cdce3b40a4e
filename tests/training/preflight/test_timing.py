import pytest
import torch

from sae_lens_atm.training.preflight import timing
from sae_lens_atm.training.preflight.timing import (
    NotTimed,
    duration,
    seconds_per_step,
    sizes_up_to,
    time_checkpoint,
    time_steps,
    time_work,
    timed_trainer,
)
from sae_lens_atm.training.run_file import load_run
from tests.helpers import state_equal


class Clock:
    """Time that passes only in `work`: a constant part, and a part for each unit of size."""

    def __init__(self, constant, each):
        self.now, self.constant, self.each = 0.0, constant, each
        self.sizes = []

    def work(self, size):
        self.sizes.append(size)
        self.now += self.constant + self.each * size

    def __call__(self):
        return self.now


def timed(clock, sizes, limit):
    return time_work(clock.work, sizes, limit, clock)


def test_work_that_fits_is_timed_as_it_is():
    clock = Clock(0, 1)
    result = timed(clock, [1, 8, 64], 1000)
    assert result == (64, 64, 64)
    assert result.note == ""
    assert clock.sizes == [1, 1, 8, 64, 64, 64]  # to warm up, growing, repeated


def test_work_that_does_not_fit_is_scaled_up():
    clock = Clock(2, 1)
    result = timed(clock, [1, 8, 64, 512], 100)
    assert result.seconds == 2 + 512
    assert result.measured == 64
    assert result.note == ", scaled up from 64"
    assert max(clock.sizes) == 64


def test_a_single_size_that_was_timed_is_scaled_in_proportion():
    assert timed(Clock(0, 1), [10, 1000], 50).seconds == 1000


def test_the_limit_holds_unless_the_smallest_size_takes_longer():
    clock = Clock(0, 1)
    timed(clock, [1, 8, 64, 512, 4096], 200)
    assert clock.now < 200
    slow = Clock(500, 0)
    timed(slow, [1, 8, 64], 200)
    assert slow.sizes == [1, 1]


def test_a_measurement_is_the_median_of_three():
    clock = Clock(0, 1)
    jitter = iter([0, 0, 30, 0, 3])  # warm-up, first size, then the last size three times

    def work(size):
        clock.work(size)
        clock.now += next(jitter)

    assert time_work(work, [1, 2], 100, clock).seconds == 5


def test_sizes_grow_by_eight():
    assert sizes_up_to(4096) == [64, 512, 4096]
    assert sizes_up_to(10) == [10]
    assert sizes_up_to(50_000, 256) == [781, 6250, 50_000]


def test_steps_are_timed_in_each_part_of_the_schedule(synthetic_yaml):
    run = load_run(synthetic_yaml, ["sae.mask_end=0.5", "sae.parent_start=0.75"])
    with timed_trainer(run) as trainer:
        parts = time_steps(run, trainer, 2.0)
    assert [steps for _, steps in parts] == [5, 15, 10, 10]
    assert all(result.seconds > 0 and result.size == 64 for result, _ in parts)
    with timed_trainer(run) as trainer:
        assert [steps for _, steps in time_steps(run, trainer, 2.0, first=20)] == [10, 10]


def test_the_mean_step_weighs_the_parts_by_their_steps(synthetic_yaml, monkeypatch):
    results = iter([1.0, 2.0, 4.0])
    monkeypatch.setattr(
        timing,
        "time_work",
        lambda _work, sizes, _limit: timing.Timed(next(results), *sizes[-1:] * 2),
    )
    run = load_run(synthetic_yaml, ["sae.mask_end=1", "sae.parent_start=0.75"])
    # 5 steps before masks, 25 until the pressure starts, 10 with it
    assert seconds_per_step(run) == (5 * 1 + 25 * 2 + 10 * 4) / 40


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_other_architectures_are_timed_too(synthetic_yaml, architecture):
    sae = {"topk": "k: 2, ", "jumprelu": ""}[architecture]
    more = [f"sae={{architecture: {architecture}, d_in: 16, {sae}d_sae: 32}}"]
    assert seconds_per_step(load_run(synthetic_yaml, more), 0.5) > 0


def test_an_architecture_that_needs_a_large_batch_is_timed_with_one(synthetic_yaml):
    sae = "{architecture: archetypal, d_in: 16, k: 2, d_sae: 32, archetypal_points: 200}"
    run = load_run(synthetic_yaml, [f"sae={sae}", "batch_size=256", "training_samples=10_240"])
    assert seconds_per_step(run, 0.5) > 0
    run = load_run(synthetic_yaml, [f"sae={sae}", "batch_size=128", "training_samples=5_120"])
    with pytest.raises(NotTimed, match="archetypal_points must be at most the batch size, 128"):
        seconds_per_step(run, 0.5)


def test_timing_leaves_the_random_state_alone(synthetic_yaml):
    before = torch.get_rng_state()
    seconds_per_step(load_run(synthetic_yaml), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_that_need_too_much_memory_are_not_tried(synthetic_yaml, monkeypatch):
    monkeypatch.setattr(timing, "available_bytes", lambda _: 1000)
    with pytest.raises(NotTimed, match=r"cpu has 1,000 B free"):
        seconds_per_step(load_run(synthetic_yaml))
    monkeypatch.setattr(timing, "available_bytes", lambda _: None)  # unknown
    assert seconds_per_step(load_run(synthetic_yaml), 0.5) > 0


def test_a_checkpoint_is_timed_and_changes_nothing(synthetic_yaml, tmp_path, monkeypatch):
    run = load_run(synthetic_yaml)
    with timed_trainer(run) as trainer:
        before = {name: t.clone() for name, t in trainer.sae.state_dict().items()}
        assert time_checkpoint(trainer, 0) > 0
        assert state_equal(before, trainer.sae.state_dict())
        assert {p.name for p in tmp_path.iterdir()} == {synthetic_yaml.name}
        monkeypatch.setattr(timing, "_LARGEST_CHECKPOINT", 100)
        with pytest.raises(NotTimed, match="a checkpoint has"):
            time_checkpoint(trainer, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "under 1 s"), (42.4, "42 s"), (600, "10 min"), (7200, "2.0 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
