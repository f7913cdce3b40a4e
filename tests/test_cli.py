import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from sae_lens_atm.cli import app
from sae_lens_atm.settings import shipped_config
from tests.helpers import make_sae, train

cli = CliRunner()


def run(*args):
    return cli.invoke(app, [str(arg) for arg in args])


def test_demo_quick(tmp_path):
    result = run("demo", "--quick", "--output", "demo")
    assert result.exit_code == 0, result.output
    out = tmp_path / "demo"
    results = json.loads((out / "results.json").read_text())
    assert results["schema_version"] == 1
    assert results["figures"].keys() == {"atm", "topk"}
    for figures in results["figures"].values():
        assert {"absorption_fraction", "explained_variance", "l0"} <= figures.keys()
    assert len(results["history"]["steps"]) > 10
    for name in ("atm", "topk"):
        assert SAE.load_from_disk(out / name).cfg.architecture() in ("jumprelu", "topk")
    assert (out / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert "One seed is an illustration" in result.output


def test_train_prints_plan_progress_and_figures(synthetic_yaml):
    result = run("train", synthetic_yaml)
    assert result.exit_code == 0, result.output
    for text in ("step 40/40", "masked", "L0", "absorption_full", "saved out"):
        assert text in result.output


def test_dry_run_writes_nothing(synthetic_yaml, tmp_path):
    result = run("train", synthetic_yaml, "--dry-run")
    assert result.exit_code == 0
    assert "40 of 64" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [p.stem for p in shipped_config("demo").parent.glob("*.yaml")])
def test_dry_run_of_every_shipped_config(name):
    result = run("train", name, "--dry-run")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["train", "nope"], "error: no run file 'nope'"),
        (["train", "nope.yaml"], "error: cannot read nope.yaml"),
        (["train", "{yaml}", "--set", "sae.architecture=amt"], "error: sae.architecture is 'amt'"),
        (["train", "{yaml}", "--set", "sae.schedul=dual"], "did you mean 'schedule'?"),
        (["train", "{yaml}", "--set", "lr=fast"], "error: lr is 'fast'"),
        (["train", "{yaml}", "--set", "sae.d_in=17"], "error: sae.d_in is 17: allowed is 16"),
        (["train", "{yaml}", "--set", "output_path={yaml}/x"], "is not writable"),
        (
            ["train", "{yaml}", "--resume", "nowhere"],
            "error: cannot resume: nowhere does not exist",
        ),
        (["inspect", "nowhere"], "error: no folder nowhere"),
        (["inspect", "."], "holds no cfg.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(synthetic_yaml, args, line):
    result = run(*(arg.replace("{yaml}", str(synthetic_yaml)) for arg in args))
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_inspect_what_train_saved(synthetic_yaml):
    run("train", synthetic_yaml, "--set", "n_checkpoints=1")
    saved = run("inspect", "out")
    assert saved.exit_code == 0
    assert "trained as" in saved.output
    assert "quantile 0.5" in saved.output
    (checkpoint,) = Path("out/checkpoints").iterdir()
    raw = run("inspect", checkpoint)
    assert raw.exit_code == 0
    assert "█" in raw.output  # the scores themselves are there, so there is a histogram


def test_inspect_a_damaged_sae(tmp_path):
    train(make_sae(), 2).save_inference_model(tmp_path / "sae")
    weights = tmp_path / "sae/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    result = run("inspect", "sae")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "SafetensorError" in result.stderr


def test_inspect_does_not_know_the_hub_by_magic():
    result = run("inspect", "nobody/nothing:sae")
    assert result.exit_code != 0
    assert len(result.stderr.strip().splitlines()) == 1


def test_saelens_command_line_knows_atm():
    """SAELens' flags are parsed, and the first thing that fails is the model that is not there."""
    command = [sys.executable, "-m", "sae_lens_atm", "saelens", "--architecture", "atm"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--mask_rate" in shown
    assert "--masked_probability" in shown
    command += ["--d_in", "8", "--d_sae", "16", "--k", "2", "--model_name", "no-such-model"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "no-such-model" in failed.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_real_process_leaves_a_checkpoint_that_resumes(
    synthetic_yaml, tmp_path, number, code
):
    command = [sys.executable, "-m", "sae_lens_atm", "train", str(synthetic_yaml)]
    command += ["--set", "training_samples=640000", "--set", "run_final_eval=false"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not process.stdout.readline().startswith(b"step"):  # training is under way
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors.decode()
    assert "--resume" in errors.decode().splitlines()[-1]
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    done = int(checkpoint.name)
    assert done > 0
    result = run(
        "train", synthetic_yaml, "--resume", "out", "--set", f"training_samples={done + 640}"
    )
    assert result.exit_code == 0, result.output
    assert "resuming from" in result.output


def test_help_names_the_commands():
    result = run("--help")
    for command in ("train", "demo", "inspect", "saelens"):
        assert command in result.output


def test_module_and_console_command_are_the_same():
    result = subprocess.run(
        [sys.executable, "-m", "sae_lens_atm", "--help"], capture_output=True, text=True, check=True
    )
    assert "inspect" in result.stdout
