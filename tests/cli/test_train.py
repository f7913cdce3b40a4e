import io
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import typer
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lens_atm import ATMTrainingSAE
from sae_lens_atm.cli import train as cli_train
from sae_lens_atm.cli.train import estimate_table, resume_hint
from sae_lens_atm.errors import SaveError
from sae_lens_atm.files import locked, read_json
from sae_lens_atm.training.preflight import estimate
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.preflight.timing import AFTER, BEFORE, TRAINING, Entry
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.yaml_files import read_yaml, shipped_config
from tests.cli.command import console_script, run
from tests.helpers import state_equal

RUN_FILES = sorted(
    path.stem
    for path in shipped_config("demo").parent.glob("*.yaml")
    if not {"architectures", "sweep"} & read_yaml(path).keys()
)


def text_of(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_train_prints_facts_progress_and_figures(synthetic_yaml):
    result = run("train", synthetic_yaml)
    assert result.exit_code == 0, result.output
    for text in ("40, each with 64", "step 40/40", "masked", "L0", "absorption_full", "saved out"):
        assert text in result.output


def test_keys_can_be_set_with_and_without_an_option(synthetic_yaml):
    result = run("train", synthetic_yaml, "training_samples=640", "--set", "n_checkpoints=2")
    assert result.exit_code == 0, result.output
    assert "10, each with 64" in result.output
    assert len(list(Path("out/checkpoints").iterdir())) == 2


def test_only_the_newest_checkpoints_are_kept(synthetic_yaml):
    run("train", synthetic_yaml, "--set", "n_checkpoints=3", "--keep", "1")
    assert len(list(Path("out/checkpoints").iterdir())) == 1


def test_a_run_is_checked_once(synthetic_yaml, monkeypatch):
    """And its checkpoint is searched and hashed once."""
    calls = []

    def counted(name):
        function = getattr(cli_train, name)
        monkeypatch.setattr(cli_train, name, lambda *args: calls.append(name) or function(*args))

    counted("newest_checkpoint")
    counted("check_run")
    run("train", synthetic_yaml, "--set", "n_checkpoints=1")
    Path("out/cfg.json").unlink()
    result = run("train", synthetic_yaml, "--set", "n_checkpoints=1", "--resume", "out")
    assert result.exit_code == 0, result.output
    assert calls == ["check_run", "newest_checkpoint", "check_run"]


def test_dry_run_prints_phases_and_writes_nothing(synthetic_yaml, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 1.0)
    result = run("train", synthetic_yaml, "--dry-run")
    assert result.exit_code == 0, result.output
    for text in (
        "40, each with 64",
        BEFORE,
        TRAINING,
        AFTER,
        "SAE: 40 steps, each with 64",
        "total",
    ):
        assert text in result.output
    assert "timing: training steps of the SAE" in result.output  # a line each, in a log
    assert {path.name for path in tmp_path.iterdir()} == {synthetic_yaml.name}


def test_ctrl_c_ends_a_dry_run(synthetic_yaml, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(estimate, "time_steps", interrupted)
    result = run("train", synthetic_yaml, "--dry-run")
    assert (result.exit_code, result.stderr) == (130, "error: stopped\n")


def test_the_table_names_what_was_not_timed():
    entries = [
        Entry(BEFORE, "load the model", 2.0),
        Entry(BEFORE, "fill the buffer", 40.0),
        Entry(TRAINING, "steps", 7200.0),
        Entry(AFTER, "evaluation", None, "gpt2 is not on this machine"),
    ]
    text = text_of(estimate_table(entries, "cuda"))
    assert "(cuda)" in text
    rows = [line.split("│")[1:4] for line in text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [BEFORE, "load the model", "2 s"],
        ["", "fill the buffer", "40 s"],
        [TRAINING, "steps", "2.0 h"],
        [AFTER, "evaluation: gpt2 is not on this machine", "not timed"],
        ["total", "without what was not timed", "2.0 h"],
    ]
    text = text_of(estimate_table(entries[-1:], "cpu"))
    assert "threads: " in text
    assert "total" not in text


@pytest.mark.parametrize("name", RUN_FILES)
def test_every_shipped_run_file_passes_its_checks(name):
    path = shipped_config(name)
    # A cache that a file names is made with `cache` first.
    no_cache = ["activations=null"] if "activations:" in Path(path).read_text() else []
    assert check_run(load_run(path, ["output_path=out", *no_cache]), dry=True)


def test_ctrl_c_in_a_real_process_leaves_a_checkpoint_that_resumes(synthetic_yaml, tmp_path):
    command = [*console_script(tmp_path), "train", str(synthetic_yaml)]
    command += ["--set", "training_samples=64000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not process.stdout.readline().startswith(b"step"):  # training has begun
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    _, _, hint = errors.decode().splitlines()[-1].partition("; resume with: ")
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    assert 0 < int(checkpoint.name) < 64000
    program, *arguments = shlex.split(hint)
    assert (program, arguments[-2:]) == ("sae-lens-atm", ["--resume", "out"])
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "resuming from" in result.output


@pytest.fixture
def finished(synthetic_yaml):
    """A run in another folder than its file says. Returns the arguments of its command."""
    command = ["train", synthetic_yaml, "n_checkpoints=2", "run_final_eval=false"]
    assert run(*command, "--set", "output_path=t1").exit_code == 0
    return command


@pytest.mark.parametrize("where", ["t1", "t1/checkpoints", "t1/checkpoints/1728"])
def test_a_run_is_resumed_in_its_own_folder(finished, where):
    expected = load_file("t1/sae_weights.safetensors")
    Path("t1/cfg.json").unlink()
    Path("t1/sae_weights.safetensors").unlink()
    result = run(*finished, "--resume", where)
    assert result.exit_code == 0, result.output
    assert state_equal(load_file("t1/sae_weights.safetensors"), expected)
    assert not Path("out").exists()


def test_a_checkpoint_path_elsewhere_is_kept(synthetic_yaml):
    command = ["train", synthetic_yaml, "n_checkpoints=1", "run_final_eval=false"]
    run(*command, "output_path=t1", "checkpoint_path=aside")
    Path("t1/cfg.json").unlink()
    result = run(*command, "--resume", "aside")
    assert result.exit_code == 0, result.output
    assert Path("t1/cfg.json").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("where", ["t1", "t1/checkpoints/896"])
def test_a_finished_run_is_not_trained_again(finished, where):
    before = {path: path.stat().st_mtime_ns for path in Path("t1").rglob("*.*")}
    result = run(*finished, "--resume", where)
    assert result.exit_code == 0, result.output
    assert "t1 is already finished. --extend N" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in Path("t1").rglob("*.*")}
    assert not Path("out").exists()
    for changed in ("lr=0.1", "sae.k=3", "training_samples=5120"):
        result = run(*finished, changed, "--resume", where)
        assert result.exit_code == 2
        assert f"cannot resume: {changed.split('=')[0].removeprefix('sae.')} is " in result.stderr


def test_a_finished_run_is_extended_in_its_folder(finished):
    command = [*finished, "--resume", "t1", "--extend", "640"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "step 50/50" in result.output
    assert read_json(Path("t1/runner_cfg.json"))["training_samples"] == 3200
    assert "already finished" in run(*command).output
    assert "already finished" in run(*finished, "--resume", "t1").output
    assert run(*finished, "--extend", "640").exit_code == 2


@pytest.mark.parametrize("steps", [20, 40], ids=["first checkpoint", "result"])
def test_a_full_disk_is_one_line_with_the_command_that_resumes(synthetic_yaml, monkeypatch, steps):
    name = "save_inference_model" if steps == 40 else "save_model"
    saved = getattr(ATMTrainingSAE, name)

    def full_disk(self, path):
        if self.tracker.steps.item() >= steps:
            raise SafetensorError("I/O error: IoError(Os { code: 28, kind: StorageFull })")
        return saved(self, path)

    command = ["train", synthetic_yaml, "output_path=t 1", "n_checkpoints=2"]
    with monkeypatch.context() as patch:
        patch.setattr(ATMTrainingSAE, name, full_disk)
        result = run(*command)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: cannot save t 1")
    assert "No space left" in line
    _, _, hint = line.partition("resume with: ")
    result = run(*shlex.split(hint)[1:])
    assert result.exit_code == 0, result.output


def test_a_full_disk_before_the_first_checkpoint(synthetic_yaml, monkeypatch):
    def full_disk(_self, _path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ATMTrainingSAE, "save_model", full_disk)
    result = run("train", synthetic_yaml, "n_checkpoints=1")
    (line,) = result.stderr.splitlines()
    assert "then train again, as there is no checkpoint, with: sae-lens-atm train" in line


def test_two_runs_cannot_share_a_folder_of_checkpoints(synthetic_yaml, tmp_path):
    with locked(tmp_path / "aside"):
        result = run("train", synthetic_yaml, "output_path=t1", "checkpoint_path=aside")
    assert result.exit_code == 2, result.output
    assert "checkpoint_path is " in result.stderr
    assert "another process is writing there" in result.stderr


def test_a_full_disk_after_a_resume_names_the_checkpoint(synthetic_yaml, capsys):
    arguments = ["train", str(synthetic_yaml), "output_path=new"]
    lost = load_run(synthetic_yaml, ["output_path=new"])
    for checkpoint, end in (
        (Path("t1/checkpoints/896"), "then resume with: {} --resume t1/checkpoints/896"),
        (None, "then train again, as there is no checkpoint, with: {}"),
    ):
        with pytest.raises(typer.Exit), resume_hint(lost, arguments, checkpoint):
            raise SaveError("cannot save new: No space left on the disk")
        command = shlex.join(["sae-lens-atm", *arguments])
        assert capsys.readouterr().err.endswith(f"free some space, {end.format(command)}\n")
