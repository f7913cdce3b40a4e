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


@pytest.mark.parametrize("scale", ["none", "expected_average_only_in", "covariance_whitening"])
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


def weights_of(home):
    return load_file(home / "sae/sae_weights.safetensors")
