import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.compare import load_comparison
from sae_lens_atm.training.run_file import shipped_config
from tests.helpers import make_sae, train

cli = CliRunner()
SHIPPED = sorted(p.stem for p in shipped_config("demo").parent.glob("*.yaml"))
COMPARISONS = ("demo", "compare-sister-a", "compare-sister-b", "compare-spelling-lm")
ON_GPU = ("compare-gemma-2-2b-l12-16k",)


def run(*args):
    return cli.invoke(app, [str(arg) for arg in args])


def test_compare_report_and_evaluate(comparison_yaml, tmp_path):
    result = run("compare", comparison_yaml, "--quick", "--jobs", "2", "--set", "l0=[2, 3]")
    assert result.exit_code == 0, result.output
    for text in (
        "[2/9] ",
        "small, L0 2, one seed",
        "atm",
        "jumprelu *",
        "wrote out-quick/report.html",
    ):
        assert text in result.output
    out = tmp_path / "out-quick"
    results = json.loads((out / "results.json").read_text())
    assert results["quick"]
    # drawn again, elsewhere
    again = run("report", "out-quick/results.json", "--output", "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again/report.html").read_text().startswith("<!DOCTYPE html>")
    saes = [out / r["folder"] / "sae" for r in results["runs"] if r["l0_target"] == 2][:2]
    found = run("evaluate", *saes, "--on", comparison_yaml, "--json", "found.json")
    assert found.exit_code == 0, found.output
    figures = json.loads((tmp_path / "found.json").read_text())
    assert list(figures) == [str(path) for path in saes]
    assert figures[str(saes[0])]["mcc"] == pytest.approx(results["runs"][0]["figures"]["mcc"], 1e-4)


def test_compare_dry_run_prints_runs_and_time(comparison_yaml, tmp_path):
    result = run("compare", comparison_yaml, "--dry-run")
    assert result.exit_code == 0, result.output
    for text in ("16, 12 of them to train", "estimate", "about", "ms a step"):
        assert text in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMPARISONS)
def test_dry_run_of_every_shipped_comparison(name):
    result = run("compare", name, "--quick", "--dry-run", "--set", "output_path=out")
    assert result.exit_code == 0, result.output
    assert not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to plan for")
def test_a_plan_can_be_made_without_the_gpu():
    result = run("compare", ON_GPU[0], "--dry-run")
    assert result.exit_code == 0, result.output
    assert "none: device is 'cuda': this machine has no CUDA device" in result.output
    refused = run("compare", ON_GPU[0], "--set", "output_path=out")
    assert refused.exit_code == 2
    assert refused.stderr == "error: device is 'cuda': this machine has no CUDA device\n"
    assert not Path("out").exists()


def test_a_failed_run_is_told_and_the_exit_code_is_1(comparison_yaml, tmp_path):
    planned = load_comparison(comparison_yaml, quick=True).planned
    bad = next(p for p in planned if p.entry == "topk")
    (tmp_path / "out-quick/runs").mkdir(parents=True)
    (tmp_path / "out-quick" / bad.folder).write_text("in the way")
    result = run("compare", comparison_yaml, "--quick")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: topk, L0 2, seed 0: FileExistsError")
    assert "atm" in result.output  # what was found is shown and kept
    assert (tmp_path / "out-quick/results.json").exists()


def test_a_signal_stops_a_comparison_which_then_goes_on(comparison_yaml):
    command = [sys.executable, "-m", "sae_lens_atm", "compare", str(comparison_yaml)]
    command += ["--set", "training_samples=38400", "--set", "seeds=[0]", "--set", "l0=[2]"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not process.stdout.readline().startswith(b"[1/"):  # the first run is under way
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors.decode()
    assert errors.decode().splitlines()[-1].endswith("go on with the same command")
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote out/report.html" in again.stdout


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


@pytest.mark.parametrize(
    "name", [name for name in SHIPPED if name not in (*COMPARISONS, *ON_GPU, "sweep-sister-a")]
)
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
        (["train", "demo"], "error: architectures: this is a comparison"),
        (["compare", "{yaml}"], "error: architectures: missing"),
        (["compare", "nope"], "error: no run file 'nope'"),
        (["compare", "demo", "--set", "l0=[0]"], "error: l0 is 0"),
        (["compare", "demo", "--set", "output_path={yaml}/x"], "is not writable"),
        (["report", "nope.json"], "error: cannot read nope.json"),
        (["report", "{yaml}"], "is not JSON"),
        (["evaluate", "nowhere", "--on", "{yaml}"], "error: no folder nowhere"),
        (["evaluate", ".", "--on", "nope"], "error: no run file 'nope'"),
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
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "cannot load sae: SafetensorError" in result.stderr


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
    for command in ("train", "compare", "report", "evaluate", "inspect", "push", "saelens"):
        assert command in result.output


def test_module_and_console_command_are_the_same():
    result = subprocess.run(
        [sys.executable, "-m", "sae_lens_atm", "--help"], capture_output=True, text=True, check=True
    )
    assert "inspect" in result.stdout


def test_make_lm_makes_a_model_and_says_what_it_knows(tmp_path):
    small = {"words_per_letter": 6, "layers": 2, "d_model": 8, "heads": 2, "steps": 3}
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    result = run("make-lm", "lm", "--seed", "3", *settings, "--set", "dataset_rows=16")
    assert result.exit_code == 0, result.output
    assert "hook transformer.h.0, d_in 8" in result.output
    assert "letter probes on held-out words: mean F1 0." in result.output
    assert json.loads((tmp_path / "lm/spelling-lm.json").read_text())["seed"] == 3
    again = run("make-lm", "lm", "--seed", "4", *settings)
    assert again.exit_code == 2
    assert "lm is not empty: allowed is a new folder" in again.output


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "stepz=3": "stepz: unknown key, did you mean 'steps'?",
        "steps=0": "steps is 0: allowed is 1 or more",
    }.items(),
)
def test_make_lm_refuses_mistakes(override, message):
    result = run("make-lm", "lm", "--set", override)
    assert result.exit_code == 2
    assert message in result.output
