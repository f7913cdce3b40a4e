import pytest
from safetensors.torch import load_file

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.run.batch_pool import Pool, synthetic_model
from sae_lens_atm.compare.run.synthetic import SyntheticData
from sae_lens_atm.compare.run.training import train_one
from sae_lens_atm.errors import Interrupted, NonFiniteBatchError
from sae_lens_atm.files import write_json
from sae_lens_atm.training.hooks import StopFlag
from tests.helpers import state_equal


@pytest.fixture
def train_atm(comparison_yaml):
    """Train the ATM run of a small comparison, until it ends or a step is reached."""

    def train_atm(*overrides, until=None):
        shared = ["seeds=[0]", "l0=[2]", "training_samples=1280"]
        comparison = load_comparison(comparison_yaml, [*shared, *overrides])
        planned = next(p for p in comparison.planned if p.entry == "atm")
        stop = StopFlag()

        def on_step(trainer, _):
            if trainer.n_training_steps + 1 == until:
                stop.request()

        model = synthetic_model(planned.run, comparison.output)
        data = SyntheticData(planned, model, comparison.output)
        train_one(planned, data, comparison.output, 4, on_step, stop)
        return comparison.output / planned.folder

    return train_atm


@pytest.fixture
def spoil(monkeypatch):
    """Replace some of the batches by NaN."""

    def spoil(at):
        redraw = Pool.redraw

        def spoilt(self, model, seed, first=0):
            for i, batch in enumerate(redraw(self, model, seed, first), first):
                yield batch * float("nan") if i in at else batch

        monkeypatch.setattr(Pool, "redraw", spoilt)

    return spoil


def test_the_limit_of_bad_batches_is_the_run_files(train_atm, spoil):
    spoil(range(5, 8))
    with pytest.raises(NonFiniteBatchError, match=r"^3 bad batches in a row at step 5"):
        train_atm("max_bad_batches=3")
    assert train_atm("max_bad_batches=4").is_dir()


SCALES = ["none", "expected_average_only_in", "covariance_whitening"]


@pytest.mark.parametrize("scale", SCALES)
def test_a_run_resumes_from_a_final_checkpoint(train_atm, tmp_path, monkeypatch, scale):
    settings = [f"sae.normalize_activations={scale}", "n_batches_for_norm_estimate=5"]
    expected = weights_of(train_atm(*settings, "output_path=straight"))

    def full_disk(path, content):
        if path.name == "training.json":
            raise OSError(28, "No space left on device")
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("sae_lens_atm.compare.run.training.write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            train_atm("save_final_checkpoint=true", *settings)
    (checkpoint,) = (tmp_path / "out/runs").glob("*/checkpoints/*")
    assert checkpoint.name == "final_1280"
    home = train_atm("save_final_checkpoint=true", *settings)
    assert (home / "training.json").exists()
    assert state_equal(weights_of(home), expected)


def test_a_stopped_run_ends_as_one_that_was_not_stopped(train_atm):
    expected = weights_of(train_atm("output_path=straight"))
    with pytest.raises(Interrupted):
        train_atm("output_path=stopped", until=7)
    found = weights_of(train_atm("output_path=stopped"))
    assert state_equal(expected, found)


@pytest.mark.parametrize(("scale", "most"), [(SCALES[1], 5), (SCALES[1], 1000), (SCALES[2], 20)])
def test_batches_of_the_estimate_are_not_read_again(train_atm, monkeypatch, scale, most):
    """Also if the estimate has ended early, and the run is stopped twice."""
    read, positions = Pool.redraw, []

    def redraw(self, model, seed, first=0):
        positions.append(first)
        return read(self, model, seed, first)

    monkeypatch.setattr(Pool, "redraw", redraw)
    settings = [f"sae.normalize_activations={scale}", f"n_batches_for_norm_estimate={most}"]
    settings += ["batch_size=1024", "training_samples=20480"]
    expected = weights_of(train_atm(*settings, "output_path=straight"))
    for until in (7, 12):
        with pytest.raises(Interrupted):
            train_atm(*settings, "output_path=stopped", until=until)
    found = weights_of(train_atm(*settings, "output_path=stopped"))
    assert state_equal(expected, found)
    *_, first, second, third = positions
    taken = second - 7
    assert (first, third) == (0, taken + 12)
    assert (10 <= taken < 900) if most == 1000 else (taken == most)


def weights_of(home):
    return load_file(home / "sae/sae_weights.safetensors")
