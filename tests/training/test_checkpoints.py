import json
import os
import pickle
import re
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lens_atm.errors import CheckpointError, Interrupted
from sae_lens_atm.files import MANIFEST_FILENAME, manifest_mismatch
from sae_lens_atm.training.checkpointer import Checkpointer
from sae_lens_atm.training.checkpoints import (
    MAY_CHANGE_ON_RESUME,
    check_resumable,
    newest_checkpoint,
)
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run import train
from tests.helpers import load_script, state_equal
from tests.training.runs import RUN, synthetic_run, trained_files

ROOT = Path(__file__).parents[2]
NAMES = ["1088", "1600", "2112", "576"]


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run with four checkpoints and without a result."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    train(synthetic_run(folder, n_checkpoints=4))
    (folder / "cfg.json").unlink()
    return folder


@pytest.fixture
def out(unfinished, tmp_path):
    """A copy of it, which a test may damage."""
    return shutil.copytree(unfinished, tmp_path / "out")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- writing -------------------------------------------------------------------------------------


def saver(write=None, **settings):
    """A `save_checkpoint` that writes aside and renames, without a trainer."""

    def write_files(name, base, _aliases):
        (base / name).mkdir(parents=True)
        for file in ("cfg.json", "sae_weights.safetensors", "trainer_state.pt"):
            (base / name / file).write_text(f"{file} of {name}")

    trainer = SimpleNamespace(data_provider=None)
    save = Checkpointer(trainer, **settings).wrap_save(write or write_files)
    return lambda name, base: save(name, base, None)


@pytest.mark.parametrize(("keep", "left"), [(None, NAMES), (1, ["2112"]), (2, ["1600", "2112"])])
def test_the_newest_are_kept(tmp_path, keep, left):
    save = saver(keep=keep)
    for name in sorted(NAMES, key=int):
        save(name, tmp_path)
    assert names(tmp_path) == left


def test_only_older_checkpoints_are_removed(tmp_path):
    save = saver(keep=2)
    for samples in (100, 200, 900):
        save(str(samples), tmp_path)
    (tmp_path / "50").mkdir()
    shutil.copytree(tmp_path / "200", tmp_path / "mine")
    save("300", tmp_path)  # by a run that was resumed from 200
    assert names(tmp_path) == ["200", "300", "50", "900", "mine"]


def test_nothing_is_removed_if_the_new_one_cannot_be_written(tmp_path):
    saver(keep=1)("100", tmp_path)

    def full_disk(name, base, _aliases):
        (base / name).mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        saver(full_disk, keep=1)("200", tmp_path)
    assert names(tmp_path) == ["100"]


def test_a_process_that_does_not_write_leaves_no_files(tmp_path):
    saver(writes=False)("100", tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_a_process_that_died_are_removed(tmp_path):
    for name in (".100.partial", ".100.replaced", ".70.removed", ".90.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / "100").mkdir()
    saver()("100", tmp_path)
    assert names(tmp_path) == ["100"]
    assert manifest_mismatch(tmp_path / "100") is None
    assert (tmp_path / "100/cfg.json").exists()


def test_a_checkpoint_holds_the_configuration_of_the_run(out):
    stored = json.loads((out / "checkpoints/576/runner_cfg.json").read_text())
    assert (stored["batch_size"], stored["lr"], stored["seed"]) == (64, 1e-3, 3)
    assert stored["hierarchy_model"]["roots"] == 4


# --- finding -------------------------------------------------------------------------------------


def test_the_newest_checkpoint_has_the_most_samples(out):
    os.utime(out / "checkpoints/576")
    assert newest_checkpoint(out).name == "2112"
    assert newest_checkpoint(out / "checkpoints/576").name == "576"


def test_dying_between_two_renames_loses_nothing(out):
    folder = out / "checkpoints"
    (folder / "2112").rename(folder / ".2112.replaced")
    assert newest_checkpoint(out).name == "2112"
    assert names(folder) == NAMES


def test_a_damaged_checkpoint_is_skipped_or_refused(out):
    weights = out / "checkpoints/2112/sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="2112: sae_weights.safetensors does not match"):
        assert newest_checkpoint(out).name == "1600"
    with pytest.raises(CheckpointError, match="2112 is damaged"):
        newest_checkpoint(out / "checkpoints/2112")


def test_an_incomplete_checkpoint_is_skipped_or_refused(out):
    folder = out / "checkpoints"
    (folder / "2112").rename(folder / ".2112.partial")
    with pytest.warns(UserWarning, match="2112.partial: it is incomplete"):
        assert newest_checkpoint(out).name == "1600"
    for name in ("576", "1088", "1600"):
        (folder / name / "trainer_state.pt").unlink()
    with (
        pytest.raises(CheckpointError, match="no complete checkpoint"),
        pytest.warns(UserWarning, match="1600: trainer_state.pt is missing"),
    ):
        newest_checkpoint(out)
    with pytest.raises(CheckpointError, match="576 is damaged"):
        newest_checkpoint(folder / "576")


def test_where_there_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        newest_checkpoint("nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path)
    (tmp_path / "cfg.json").touch()
    with pytest.raises(CheckpointError, match="a finished SAE"):
        newest_checkpoint(tmp_path)


# --- checking ------------------------------------------------------------------------------------


def message(checkpoint, **settings):
    with pytest.raises(CheckpointError) as caught:
        check_resumable(checkpoint, synthetic_run("x", **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 32},
        {"seed": 4},
        {"lr": 3e-3},
        {"lr_decay_steps": 0},
        {"training_samples": 5120},
        {"hierarchy_model": {"hidden_dim": 16, "roots": 4, "lone_features": 4, "depth": 2}},
        {"hierarchy_model": {**RUN["hierarchy_model"], "coverage": 0.9}},
        {"adam_beta2": 0.9},
        {"dead_feature_window": 10},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_configuration_of_the_run_is_refused(unfinished, changed):
    (name,) = changed
    text = message(unfinished / "checkpoints/576", **changed)
    assert text.startswith(f"cannot resume: {name} is ")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"sae.d_sae": 48}, "d_sae is 48 in this run and 32 in"),
        ({"sae.activation": "relu"}, "activation is 'relu' in this run and 'batchtopk' in"),
        ({"sae.k": 3}, "k is 3.0 in this run and 2.0 in"),
        ({"sae.mask_rate": 9}, "mask_rate is 9.0 in this run and 1.0 in"),
    ],
)
def test_another_sae_is_refused(unfinished, changed, expected):
    assert expected in message(unfinished / "checkpoints/576", **changed)


def test_place_logging_saving_and_evaluation_may_change(unfinished):
    run = synthetic_run(
        "elsewhere",
        checkpoint_path="aside",
        n_checkpoints=1,
        save_final_checkpoint=True,
        run_final_eval=True,
        eval_samples=10,
        eval_frequency=3,
        save_synthetic_model=True,
        max_bad_batches=3,
        logger={"log_to_wandb": True},
    )
    check_resumable(unfinished / "checkpoints/576", run)
    run.runner.device = run.runner.sae.device = "cuda"
    check_resumable(unfinished / "checkpoints/576", run)


def test_a_checkpoint_without_configuration_still_has_a_batch_size(out):
    checkpoint = out / "checkpoints/576"
    (checkpoint / "runner_cfg.json").unlink()
    check_resumable(checkpoint, synthetic_run("x", lr=0.5))
    assert "batch size is 32" in message(checkpoint, batch_size=32)


@pytest.mark.parametrize(
    ("field", "value"),
    [("schedule", "interleaved"), ("k_start", 4.0), ("activation", "jumprelu"), ("unheard_of", 1)],
)
def test_removed_and_unknown_settings_are_refused(out, field, value):
    checkpoint = out / "checkpoints/576"
    rewrite(checkpoint / "cfg.json", lambda cfg: cfg.update({field: value}))
    assert field in message(checkpoint)


def test_removed_settings_with_the_remaining_value_are_dropped(out):
    checkpoint = out / "checkpoints/576"
    kept = {"schedule": "dual", "k_start": 1.0, "jumprelu_bandwidth": 0.05}
    rewrite(checkpoint / "cfg.json", lambda cfg: cfg.update(kept))
    check_resumable(checkpoint, synthetic_run("x"))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize("name", ["trainer_state.pt", "random_state.pt"])
@pytest.mark.parametrize("write", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_a_pickle_is_never_executed(out, tmp_path, monkeypatch, name, write):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch < 2.6 does
    folder = out / "checkpoints/576"
    (folder / MANIFEST_FILENAME).unlink()
    write({"optimizer": Evil()}, folder / name)
    with pytest.raises(CheckpointError, match="is damaged"):
        train(synthetic_run(out), resume=folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["trainer_state.pt", "random_state.pt"])
def test_nobody_is_advised_to_execute_a_pickle(out, name):
    torch.save({"optimizer": Evil()}, out / "checkpoints/576" / name)
    text = message(out / "checkpoints/576")
    assert f"is damaged (ValueError: {name} holds other objects" in text
    assert "weights_only" not in text


@pytest.mark.parametrize(
    "state",
    [{"cuda": []}, [1], {"cpu": 3}, {"cpu": torch.zeros(3)}, {"cpu": torch.zeros(3).byte()}],
    ids=["no cpu", "list", "number", "float", "short"],
)
def test_a_foreign_random_state_is_damage(out, state):
    folder = out / "checkpoints/576"
    (folder / MANIFEST_FILENAME).unlink()
    torch.save(state, folder / "random_state.pt")
    assert "is damaged" in message(folder)


@pytest.mark.parametrize("content", [b"null", b"[1]", b'{"training_samples": "many"}'])
def test_a_foreign_configuration_is_damage(out, content):
    folder = out / "checkpoints/576"
    (folder / MANIFEST_FILENAME).unlink()
    (folder / "runner_cfg.json").write_bytes(content)
    assert "is damaged" in message(folder)


@pytest.mark.parametrize("name", ["trainer_state.pt", "random_state.pt", "cfg.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100], ids=["half", "empty", "other"])
def test_a_file_that_cannot_be_read_is_refused(out, name, content):
    path = out / "checkpoints/576" / name
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2] if content is None else content)
    assert "is damaged" in message(path.parent)


def test_weights_that_do_not_fit_are_refused(out):
    path = out / "checkpoints/576/sae_weights.safetensors"
    state = load_file(path)
    state["tracker.magnitude"][3] = float("nan")
    save_file(state, path)
    assert "tracker.magnitude" in message(path.parent)
    save_file({**state, "W_dec": state["W_dec"][:5].clone()}, path)
    assert "shape (5, 16), expected (32, 16)" in message(path.parent)


@pytest.mark.parametrize("text", ["[]", "{}", '{"scaling_factor": "x"}', '{"scaling_factor": NaN}'])
def test_a_scale_that_is_no_number_is_refused(out, text):
    (out / "checkpoints/576/activation_scaler.json").write_text(text)
    assert "is damaged" in message(out / "checkpoints/576")


# --- resuming ------------------------------------------------------------------------------------


def test_each_file_of_a_checkpoint_is_hashed_once(out, monkeypatch):
    hashed, crc32 = [], zlib.crc32

    def counting(data, *start):
        hashed.append(len(data))
        return crc32(data, *start)

    monkeypatch.setattr(zlib, "crc32", counting)
    stop = StopFlag()
    stop.request()
    with pytest.raises(Interrupted):
        train(synthetic_run(out), resume=out, stop=stop)
    listed = json.loads((out / "checkpoints/2112" / MANIFEST_FILENAME).read_text())["files"]
    assert sum(hashed) == sum(entry["bytes"] for entry in listed.values())


@pytest.mark.parametrize("scale", ["none", "expected_average_only_in", "covariance_whitening"])
def test_a_final_checkpoint_is_not_trained_or_rescaled_again(tmp_path, scale):
    fields = {"sae.normalize_activations": scale, "n_batches_for_norm_estimate": 5}
    run = synthetic_run("out", save_final_checkpoint=True, **fields)
    train(run)
    expected = trained_files("out"), (tmp_path / "out/cfg.json").read_text()
    for name in ("cfg.json", "sae_weights.safetensors"):  # as if the run had died before saving
        (tmp_path / "out" / name).unlink()
    train(run, resume="out/checkpoints/final_2560")
    assert state_equal(trained_files("out"), expected[0])
    assert (tmp_path / "out/cfg.json").read_text() == expected[1]


def run_of_0_1(**fields):
    """The run of which version 0.1 wrote a checkpoint after 17 of 40 steps."""
    return synthetic_run(
        "out",
        hierarchy_model={"hidden_dim": 8, "roots": 2, "lone_features": 2, "depth": 1},
        training_samples=1280,
        batch_size=32,
        lr=1e-2,
        sae={
            "architecture": "atm",
            "d_in": 8,
            "d_sae": 16,
            "k": 2,
            "dtype": "float64",
            "mask_warm_up_steps": 2,
            "parent_start": 0.1,
            "schedule_steps": 40,
            **fields,
        },
    )


def test_a_checkpoint_of_version_0_1_resumes():
    """With the rule for parents and the auxiliary loss of its time."""
    folder = Path(__file__).parent / "checkpoint_of_0_1"
    with pytest.raises(CheckpointError, match=r"parent_chance is 3\.0 in this run and 0\.0 in"):
        train(run_of_0_1(), resume=folder)
    old = {"parent_chance": 0.0, "aux_negative_slope": 0.0, "frequency_penalty": 0.0}
    with pytest.raises(CheckpointError, match=r"per_sample_end is 0\.5 in this run and 0\.0 in"):
        train(run_of_0_1(**old, per_sample_end=0.5), resume=folder)
    sae = train(run_of_0_1(**old), resume=folder).sae
    assert sae.tracker.steps.item() == 40
    assert (sae.parent_tracker.parents >= 0).any()
    # What 0.1 itself made of it. Machines differ in rounding.
    saved = load_file("out/sae_weights.safetensors")
    for name, tensor in load_file(folder / "resumed.safetensors").items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6)


# --- runs that are killed again and again --------------------------------------------------------


@pytest.fixture(scope="module")
def soak():
    return load_script("benchmarks/soak.py")


def test_the_page_has_the_counts(soak):
    found = json.loads((ROOT / "docs/reliability/soak.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert f"<!-- counts -->\n{soak.report(found)}<!-- end -->" in page


def test_a_short_soak(soak, tmp_path):
    soak.main(runs=1, damages=4, json_path=tmp_path / "soak.json", report_path=None)
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (found["runs"], found["identical"], found["states_lost"]) == (1, 1, 0)
    assert sum(found["damages"]["tried"].values()) == found["damages"]["noticed"] == 4


def test_the_page_lists_what_may_change_on_resume():
    section = (ROOT / "docs/cli.md").read_text().partition("may change on resume")[2]
    table = section.partition("\n\n")[0]
    listed = set(re.findall(r"`([a-z_.]+)`", table))
    allowed = {*MAY_CHANGE_ON_RESUME, "max_bad_batches", "sae.device"}
    assert listed == allowed - {"resume_from_checkpoint"}  # which --resume replaces
