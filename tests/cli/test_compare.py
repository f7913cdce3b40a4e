import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from sae_lens_atm.cli import compare as cli_compare
from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.report.results import write_results
from sae_lens_atm.errors import Interrupted
from tests.cli.command import console_script, run
from tests.compare.sample import sample

GEMMA = "compare-gemma-2-2b-l12-16k"


def test_compare_report_and_evaluate(comparison_yaml, tmp_path):
    result = run("compare", comparison_yaml, "--quick", "--jobs", "2", "--set", "l0=[2, 3]")
    assert result.exit_code == 0, result.output
    for text in ("[2/9] ", "small, L0 2, one seed", "jumprelu *", "wrote out-quick/report.html"):
        assert text in result.output
    out = tmp_path / "out-quick"
    results = json.loads((out / "results.json").read_text())
    assert results["quick"]
    # drawn again, in another folder
    again = run("report", "out-quick/results.json", "--output", "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again/report.html").read_text().startswith("<!DOCTYPE html>")
    saes = [out / r["folder"] / "sae" for r in results["runs"] if r["l0_target"] == 2][:2]
    evaluated = run("evaluate", *saes, "--on", comparison_yaml, "--json", "figures.json")
    assert evaluated.exit_code == 0, evaluated.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == [str(path) for path in saes]
    assert figures[str(saes[0])]["mcc"] == pytest.approx(results["runs"][0]["figures"]["mcc"], 1e-4)


def test_a_dry_run_prints_runs_and_time(comparison_yaml, tmp_path):
    result = run("compare", comparison_yaml, "--dry-run", "--quick")
    assert result.exit_code == 0, result.output
    for text in ("estimate", "about", "ms a step"):
        assert text in result.output
    assert not (tmp_path / "out-quick").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_plan_can_be_made_without_the_gpu():
    result = run("compare", GEMMA, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "none: device is 'cuda'" in result.output
    refused = run("compare", GEMMA, "--set", "output_path=out")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: device is 'cuda'")
    assert not Path("out").exists()


def test_a_failed_run_is_printed_and_the_exit_code_is_1(comparison_yaml, tmp_path):
    planned = load_comparison(comparison_yaml, quick=True).planned
    bad = next(p for p in planned if p.entry == "topk")
    (tmp_path / "out-quick/runs").mkdir(parents=True)
    (tmp_path / "out-quick" / bad.folder).write_text("in the way")
    result = run("compare", comparison_yaml, "--quick")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: topk, L0 2, seed 0: FileExistsError")
    assert "atm" in result.output  # the other results are shown and written
    assert (tmp_path / "out-quick/results.json").exists()


def test_an_interrupted_comparison_keeps_earlier_results(comparison_yaml, tmp_path, monkeypatch):
    def stopped(*_args, **_kwargs):
        raise Interrupted(None, signal.SIGINT)

    monkeypatch.setattr(cli_compare, "compare", stopped)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text("of an earlier call")
    result = run("compare", comparison_yaml)
    assert result.exit_code == 130
    assert "resume with the same command" in result.stderr
    assert (tmp_path / "out/results.json").read_text() == "of an earlier call"


def test_a_signal_stops_a_real_comparison(comparison_yaml, tmp_path):
    command = [*console_script(tmp_path), "compare", str(comparison_yaml)]
    more = ["--set", "training_samples=19200", "--set", "seeds=[0]", "--set", "l0=[2]"]
    with subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while not process.stdout.readline().startswith(b"[1/"):  # the first job has ended
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors.decode()
    assert errors.decode().splitlines()[-1].endswith("resume with the same command")


def test_names_and_paths_are_no_markup(tmp_path):
    """Names with square brackets once failed after all training."""
    odd = "x[/b][red]y :star:"
    results = sample().model_copy(update={"name": odd})
    results.entries[odd] = results.entries.pop("atm")
    for holder in [*results.runs, *results.rows]:
        holder.entry = holder.entry.replace("atm", odd) if holder.entry == "atm" else holder.entry
    for test in results.tests:
        test.candidate = odd
    write_results(results, tmp_path)
    result = run("report", "results.json", "--output", "out[/b]")
    assert result.exit_code == 0, result.output
    assert f"{odd}, L0 4" in result.output
    assert f"│ {odd} " in result.output
    assert "wrote out[/b]/report.html" in result.output
