"""Sweeps from the command line, of few steps."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.compare import read_results
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.report.summary import ranked
from sae_lens_atm.compare.run.checks import check


@pytest.fixture
def sweep_yaml(comparison_yaml):
    """ATM at two mask rates and TopK, each at two learning rates, for ten steps."""
    content = yaml.safe_load(comparison_yaml.read_text())
    for name in ("jumprelu", "untrained"):
        del content["architectures"][name]
    content |= {"seeds": [0], "l0": [2], "training_samples": 640}
    content["sweep"] = {
        "over": {"lr": [1e-2, 1e-3], "sae": {"mask_rate": [0.5, 2]}},
        "objective": "mcc",
    }
    comparison_yaml.write_text(yaml.safe_dump(content))
    return comparison_yaml


def test_points_that_never_mask_are_announced(sweep_yaml, recwarn):
    late = "architectures.atm.sae={schedule_steps: 10, mask_warm_up_steps: 10, mask_end: 1}"
    some = "sweep.over={sae: {mask_warm_up_steps: [2, 10], mask_rate: [0, 1]}}"
    for overrides in ([], [late], [late, some]):
        check(load_sweep(sweep_yaml, overrides))
    why = (
        "no latent will be masked: masking begins at step 10 (mask_warm_up_steps), and the run "
        "ends after 10 steps"
    )
    assert [str(w.message) for w in recwarn if "will be masked" in str(w.message)] == [
        f"all 4 points with masks, for example atm, lr 0.01, mask_rate 0.5: {why}",
        f"atm, mask_warm_up_steps 10, mask_rate 1: {why}",
    ]


def run(command, *args):
    result = CliRunner().invoke(app, [command, *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_a_sweep_is_ranked_stored_and_extended(sweep_yaml):
    code, out, errors = run("sweep", sweep_yaml, "--jobs", 2)
    assert code == 0, errors
    results = read_results("out/results.json")
    assert len(results.runs) == 6
    assert results.failed == {}
    assert Path("out/sweep.png").stat().st_size > 5000
    means = {row.entry: row.figures["mcc"].mean for row in results.rows if row.matched}
    order = [row.entry for row in ranked(results, 2)]
    assert order[: len(means)] == sorted(means, key=means.get, reverse=True)
    lines = [line for line in out.splitlines() if line.startswith("│")]
    best = results.sweep.points[order[0]]
    assert best.entry in lines[0]
    assert f"{best.values['lr']:.4g}" in lines[0]

    weights = {p: p.stat().st_mtime_ns for p in Path("out").rglob("sae_weights.safetensors")}
    assert len(weights) == 6
    more = "sweep.over={lr: [1.0e-2, 1.0e-3], batch_size: [64, 32], sae: {mask_rate: [0.5, 2]}}"
    code, _, errors = run("sweep", sweep_yaml, "--set", more, "--jobs", 2)
    assert code == 0, errors
    results = read_results("out/results.json")
    assert len(results.runs) == 12
    batch_sizes = [e.settings["trainer"]["batch_size"] for e in results.entries.values()]
    assert sorted(batch_sizes) == [32] * 6 + [64] * 6
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
    assert run("report", "out/results.json")[0] == 0
    sae = Path("out") / results.runs[0].folder / "sae"
    assert run("evaluate", sae, "--on", sweep_yaml)[0] == 0


def test_a_mistake_in_a_sweep_ends_with_exit_code_2(sweep_yaml):
    code, _, errors = run("sweep", sweep_yaml, "--set", "sweep.over.lrr=[1]")
    assert code == 2
    assert all(line.startswith("error: ") for line in errors.splitlines())
