import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.errors import CheckpointError, SettingsError
from sae_lens_atm.files import MANIFEST_FILENAME, what_is_wrong
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.training.checkpoints import newest_checkpoint, save_atomically
from sae_lens_atm.training.preflight.checks import plan
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run

SETTINGS = ["run_final_eval=false", "n_checkpoints=4"]
NAMES = ["1088", "1600", "2112", "576"]


@pytest.fixture
def run(synthetic_yaml):
    return load_run(synthetic_yaml, SETTINGS)


def names(folder="out/checkpoints"):
    return sorted(path.name for path in Path(folder).iterdir())


class Pen:
    """Writes checkpoints as a trainer does, without training."""

    data_provider = None

    def save_checkpoint(self, name, base_path=None, wandb_aliases=None):  # noqa: ARG002
        folder = base_path / name
        folder.mkdir(parents=True)
        for file in ("cfg.json", "sae_weights.safetensors", "trainer_state.pt"):
            (folder / file).write_text(f"{file} of {name}")


def test_a_manifest_tells_every_change(run, tmp_path):
    train(run)
    folder = tmp_path / "out/checkpoints/576"
    assert what_is_wrong(folder) is None
    listed = json.loads((folder / MANIFEST_FILENAME).read_text())["files"]
    assert {*listed, MANIFEST_FILENAME} == set(names(folder))
    for name in listed:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert what_is_wrong(folder) == f"{name} is not what was written"
        (folder / name).write_bytes(content + b"x")
        assert what_is_wrong(folder) == f"{name} has {len(content) + 1} bytes, not {len(content)}"
        (folder / name).unlink()
        assert what_is_wrong(folder) == f"{name} is missing"
        (folder / name).write_bytes(content)
    for text in ("[]", "{}", '{"files": []}', '{"files": {"cfg.json": 3}}', "\0"):
        (folder / MANIFEST_FILENAME).write_text(text)
        assert what_is_wrong(folder) is not None
    (folder / MANIFEST_FILENAME).unlink()  # as SAELens writes them
    assert what_is_wrong(folder) is None


@pytest.mark.parametrize(("keep", "left"), [(None, NAMES), (1, ["2112"]), (2, ["1600", "2112"])])
def test_the_newest_are_kept(run, keep, left):
    train(run, keep=keep)
    assert names() == left


def test_only_what_is_older_is_removed_and_only_checkpoints(tmp_path):
    pen = Pen()
    save_atomically(pen, keep=2)
    for samples in (100, 200, 900):
        pen.save_checkpoint(str(samples), tmp_path)
    (tmp_path / "50").mkdir()
    shutil.copytree(tmp_path / "200", tmp_path / "mine")
    pen.save_checkpoint("300", tmp_path)  # after going on from 200
    assert names(tmp_path) == ["200", "300", "50", "900", "mine"]


def test_nothing_is_removed_when_the_new_one_cannot_be_written(tmp_path):
    pen = Pen()
    save_atomically(pen, keep=1)
    pen.save_checkpoint("100", tmp_path)
    broken = Pen()

    def full_disk(name, base_path, **_):
        (base_path / name).mkdir()
        raise OSError(28, "No space left on device")

    broken.save_checkpoint = full_disk
    save_atomically(broken, keep=1)
    with pytest.raises(OSError, match="No space"):
        broken.save_checkpoint("200", tmp_path)
    assert names(tmp_path) == ["100"]


def test_dying_between_two_renames_loses_nothing(run, tmp_path):
    train(run)
    folder = tmp_path / "out/checkpoints"
    (folder / "2112").rename(folder / ".2112.replaced")
    assert newest_checkpoint("out").name == "2112"
    assert names() == NAMES


def test_what_a_dead_process_left_is_cleared_away(tmp_path):
    for name in (".100.partial", ".100.replaced", ".70.removed", ".90.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    pen = Pen()
    save_atomically(pen)
    (tmp_path / "100").mkdir()
    pen.save_checkpoint("100", tmp_path)
    assert names(tmp_path) == ["100"]
    assert what_is_wrong(tmp_path / "100") is None
    assert (tmp_path / "100/cfg.json").exists()


def test_the_older_one_where_the_newest_is_damaged(run, tmp_path):
    train(run)
    weights = tmp_path / "out/checkpoints/2112/sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    (tmp_path / "out/cfg.json").unlink()
    with pytest.warns(UserWarning, match=r"2112 is no whole checkpoint, skipped: sae_weights"):
        assert newest_checkpoint("out").name == "1600"
    with pytest.raises(CheckpointError, match=r"2112 is damaged \(sae_weights.* is not what"):
        train(run, resume="out/checkpoints/2112")
    with pytest.warns(UserWarning, match="skipped"):
        assert train(run, resume="out").sae.tracker.steps.item() == 40


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize("name", ["trainer_state.pt", "random_state.pt"])
@pytest.mark.parametrize("write", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_a_pickle_is_never_executed(run, tmp_path, monkeypatch, name, write):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch < 2.6 does
    train(run)
    (tmp_path / "out/cfg.json").unlink()
    folder = tmp_path / "out/checkpoints/576"
    (folder / MANIFEST_FILENAME).unlink()
    write({"optimizer": Evil()}, folder / name)
    with pytest.raises(CheckpointError, match="is damaged"):
        train(run, resume=folder)
    assert not (tmp_path / "owned").exists()


def test_weights_that_are_no_numbers(run, tmp_path):
    train(run)
    (tmp_path / "out/cfg.json").unlink()
    folder = tmp_path / "out/checkpoints/576"
    (folder / MANIFEST_FILENAME).unlink()
    weights = folder / "sae_weights.safetensors"
    state = load_file(weights)
    state["tracker.magnitude"][3] = float("nan")
    save_file(state, weights)
    with pytest.raises(CheckpointError, match=r"tracker.magnitude in .*576 holds NaN or Inf"):
        plan(run, folder)


def test_a_scale_that_is_no_number(run, tmp_path):
    train(run)
    (tmp_path / "out/cfg.json").unlink()
    folder = tmp_path / "out/checkpoints/576"
    (folder / MANIFEST_FILENAME).unlink()
    for text in ("[]", "{}", '{"scaling_factor": "x"}', '{"scaling_factor": NaN}', ""):
        (folder / "activation_scaler.json").write_text(text)
        with pytest.raises(CheckpointError, match="576 is damaged"):
            plan(run, folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state, _: state["W_dec"].fill_(float("nan")),
        lambda state, _: state["b_enc"].fill_(float("inf")),
        lambda state, _: state.update(W_dec=state["W_dec"][:5].clone()),
        lambda state, _: state.pop("W_enc"),
        lambda state, _: state.update(more=torch.ones(2)),
        lambda _, cfg: cfg.update(d_sae=7),
        lambda _, cfg: cfg.update(d_in="x"),
        lambda _, cfg: cfg.update(architecture="gated"),
        lambda _, cfg: cfg.update(architecture="nonsense"),
        lambda _, cfg: cfg.pop("architecture"),
        lambda _, cfg: cfg.update(dtype="float17"),
    ],
)
def test_a_saved_sae_that_is_not_one(run, synthetic_yaml, tmp_path, spoil):
    train(run)
    folder = tmp_path / "out"
    state = load_file(folder / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    spoil(state, cfg)
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match="cannot load out: "):
        load_sae("out")
    for command in (["inspect", "out"], ["evaluate", "out", "--on", str(synthetic_yaml)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_infinite_threshold_is_a_latent_that_never_fires(run, tmp_path):
    train(run)
    weights = tmp_path / "out/sae_weights.safetensors"
    state = load_file(weights)
    state["threshold"][0] = float("inf")
    save_file(state, weights)
    assert load_sae("out").encode(torch.randn(64, 16))[:, 0].sum() == 0
