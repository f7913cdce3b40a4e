import math
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from sae_lens_atm.cli.main import app
from sae_lens_atm.compare import load_comparison, read_results
from sae_lens_atm.compare.evaluate_saved import data_of
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.plan.sweep_points import Range, sweep_points
from sae_lens_atm.compare.report.summary import ranked
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight.checks import plan
from sae_lens_atm.training.run_file import load_run, shipped_config

SWEEP = """
sweep:
  over:
    lr: [1.0e-2, 1.0e-3]
    sae: {mask_rate: [0.5, 2]}
  objective: mcc
"""


@pytest.fixture
def sweep_yaml(comparison_yaml):
    """ATM and TopK, and what they are swept over."""
    content = yaml.safe_load(comparison_yaml.read_text())
    for name in ("jumprelu", "untrained"):
        del content["architectures"][name]
    content |= {"seeds": [0], "l0": [2]}
    comparison_yaml.write_text(yaml.safe_dump(content) + SWEEP)
    return comparison_yaml


def in_words(command, *args):
    result = CliRunner().invoke(app, [command, *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


# --- the points ----------------------------------------------------------------------------------


def test_a_grid_is_every_combination_once():
    axes = {"a": [1, 2, 2], "b": ["x", "y"], "c": [None]}
    found = [tuple(point.values()) for point in sweep_points(axes, None, 0)]
    assert found == list(product([1, 2], ["x", "y"], [None]))


def test_more_points_or_fields_leave_the_others_as_they_are():
    axes = {"a": Range(low=0.0, high=1.0), "b": ["x", "y"], "c": Range(low=1, high=10**6)}
    few, many = sweep_points(axes, 5, 3), sweep_points(axes, 9, 3)
    assert many[:5] == few
    assert len(many) == 9
    assert sweep_points(axes, 5, 4) != few
    alone = sweep_points({"c": axes["c"]}, 5, 3)
    assert [point["c"] for point in alone] == [point["c"] for point in few]


@given(st.integers(1, 1000), st.integers(1, 1000), st.booleans(), st.booleans())
def test_what_is_drawn_is_in_its_range(low, width, log, whole):
    ends = (low, low + width) if whole else (low / 7, (low + width) / 7)
    axis = Range(low=ends[0], high=ends[1], log=log)
    for point in sweep_points({"x": axis}, 20, 0):
        assert ends[0] <= point["x"] <= ends[1]
        assert isinstance(point["x"], int) == whole


def test_draws_are_even_or_even_in_their_logarithm():
    def drawn(**kwargs):
        return [point["x"] for point in sweep_points({"x": Range(**kwargs)}, 4000, 0)]

    # standard errors: 0.5 and 0.01
    assert fmean(drawn(low=0.0, high=100.0)) == pytest.approx(50, abs=2)
    assert fmean(map(math.log10, drawn(low=1e-2, high=1.0, log=True))) == pytest.approx(
        -1, abs=0.05
    )
    for log in (False, True):
        axis = {"x": Range(low=2, high=5, log=log)}
        assert {point["x"] for point in sweep_points(axis, 200, 0)} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 2, "high": 1}, "low is 2: allowed is less than high, 1"),
        ({"low": 0, "high": 1, "log": True}, "low is 0: allowed is more than 0 with log"),
        ({"low": math.nan, "high": 1}, "finite"),
        ({"low": 1}, "high"),
    ],
)
def test_a_range_that_is_none(values, message):
    with pytest.raises(ValidationError, match=message):
        Range(**values)


# --- the file ------------------------------------------------------------------------------------


def test_each_architecture_is_swept_over_the_fields_that_it_has(sweep_yaml):
    comparison = load_sweep(sweep_yaml)
    found = {
        p.entry: (p.run.runner.lr, getattr(p.run.runner.sae, "mask_rate", None))
        for p in comparison.planned
    }
    assert found == {
        "atm, lr 0.01, mask_rate 0.5": (0.01, 0.5),
        "atm, lr 0.01, mask_rate 2": (0.01, 2),
        "atm, lr 0.001, mask_rate 0.5": (0.001, 0.5),
        "atm, lr 0.001, mask_rate 2": (0.001, 2),
        "topk, lr 0.01": (0.01, None),
        "topk, lr 0.001": (0.001, None),
    }
    points = comparison.sweep.points
    assert points["topk, lr 0.01"].entry == "topk"
    assert points["atm, lr 0.001, mask_rate 2"].values == {"lr": 0.001, "sae.mask_rate": 2}
    assert all(p.run.runner.sae.k == 2 for p in comparison.planned)


def test_what_a_comparison_shares_can_be_swept_too(sweep_yaml):
    comparison = load_sweep(
        sweep_yaml, ["sweep.over={batch_size: [32, 64], training_samples: [640]}"]
    )
    shapes = {
        (p.run.runner.batch_size, p.run.runner.total_training_steps) for p in comparison.planned
    }
    assert shapes == {(32, 20), (64, 10)}
    assert len({p.data_key for p in comparison.planned}) == 2


def test_points_that_look_alike_are_told_apart(sweep_yaml):
    comparison = load_sweep(
        sweep_yaml, ["sweep={points: 5, over: {lr: {low: 0.0100001, high: 0.0100002}}}"]
    )
    atm = [p for p in comparison.planned if p.entry.startswith("atm")]
    assert len({p.entry for p in atm}) == len({p.run.runner.lr for p in atm}) == 5


def test_a_run_file_is_swept_at_its_own_l0_and_seed(synthetic_yaml):
    comparison = load_sweep(synthetic_yaml, ["sweep.over.lr=[1.0e-2, 1.0e-3]"])
    assert [(p.entry, p.l0, p.seed) for p in comparison.planned] == [
        ("atm, lr 0.01", 2, 3),
        ("atm, lr 0.001", 2, 3),
    ]
    assert {p.run.runner.sae.k for p in comparison.planned} == {2}
    more = load_sweep(synthetic_yaml, ["sweep.over.lr=[1e-2]", "seeds=[5, 6]", "l0=[3]"])
    assert [(p.entry, p.l0, p.seed) for p in more.planned] == [
        ("atm, lr 0.01", 3, 5),
        ("atm, lr 0.01", 3, 6),
    ]


def test_fields_of_the_forward_pass_make_groups_of_their_own(language_model_comparison_yaml):
    comparison = load_sweep(
        language_model_comparison_yaml,
        ["sweep={over: {train_batch_size_tokens: [32, 64], lr: [1.0e-3, 1.0e-2]}}", "seeds=[0]"],
    )
    groups = {
        p.group: {
            q.run.runner.train_batch_size_tokens for q in comparison.planned if q.group == p.group
        }
        for p in comparison.planned
    }
    assert groups == {
        "seed 0, train_batch_size_tokens 32": {32},
        "seed 0, train_batch_size_tokens 64": {64},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=3"], "sweep: missing, a mapping with `over`"),
        (["sweep={}"], "sweep.over: missing"),
        (["sweep.over={}"], "sweep.over is {}"),
        (["sweep.pionts=3"], "sweep.pionts: unknown key, did you mean 'points'?"),
        (["sweep.points=0"], "sweep.points is 0"),
        (["sweep.objective=l0"], "sweep.objective is 'l0': allowed is one of explained_variance"),
        (["sweep.objective=mccc"], "did you mean 'mcc'?"),
        (["sweep.over.lr=0.1"], "sweep.over.lr is 0.1: allowed is a list of values, or low"),
        (["sweep.over.lr=[]"], "sweep.over.lr is []"),
        (["sweep.over.lr={low: 2, high: 1}"], "sweep.over.lr: low is 2: allowed is less"),
        (["sweep.over.lr={low: a, high: 1}"], "sweep.over.lr.low"),
        (["sweep.over.lr={low: 1, high: 2}"], "sweep.points: missing, and sweep.over.lr is"),
        (["sweep.over.seed=[1, 2]"], "sweep.over.seed: the same for all points"),
        (["sweep.over.l0=[1, 2]"], "sweep.over.l0: the same for all points"),
        (["sweep.over.sae.k=[1, 2]"], "sweep.over.sae.k: that is the L0, which `l0` has a list of"),
        (["sweep.over.sae.mask_rat=[1, 2]"], "sweep.over.sae.mask_rat: no architecture here has"),
        (["sweep.over.lrr=[1]"], "lrr: unknown key, did you mean 'lr'?"),
        (["sweep.over.lr=[x]"], "lr is 'x'"),
        (["architectures=3"], "architectures is 3"),
        (["architectures.atm=3"], "architectures.atm is 3: allowed is a mapping"),
        (["sweep.objective=stability"], "sweep.objective is 'stability': allowed is"),
        (["sweep.objective=ce_loss_score"], "sweep.objective is 'ce_loss_score': allowed is"),
        (["sweep.objective=f1", "not_ranked=[f1]"], "sweep.objective is 'f1': allowed is what"),
        (["sweep.over.eval_samples=[9]"], "sweep.over.eval_samples: the same for all points"),
        (["sweep.over.hook_name=[a]"], "sweep.over.hook_name: the same for all points"),
        (["architectures={a: {architecture: [atm]}}"], "architecture"),
        (["sweep.over.lr=[2026-13-45]"], "the value is not YAML"),
    ],
)  # fmt: skip
def test_mistakes(sweep_yaml, overrides, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_sweep(sweep_yaml, overrides)


def test_a_sweep_is_neither_a_comparison_nor_a_run(sweep_yaml, synthetic_yaml):
    with pytest.raises(SettingsError, match="sweep: this is for `sae-lens-atm sweep`"):
        load_comparison(sweep_yaml)
    with pytest.raises(SettingsError, match="sweep: this is for `sae-lens-atm sweep`"):
        load_run(synthetic_yaml, ["sweep.over.lr=[1]"])
    with pytest.raises(SettingsError, match="sweep: missing"):
        load_sweep(synthetic_yaml)


@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_one(quick):
    comparison = load_sweep(shipped_config("sweep-sister-a"), quick=quick)
    assert {p.settings.architecture for p in comparison.planned} == {"atm", "batchtopk"}
    assert comparison.sweep.objective == "absorption_fraction"


# --- carried out ---------------------------------------------------------------------------------


def test_a_sweep_from_the_command_line_is_kept_and_goes_on(sweep_yaml):
    code, out, _ = in_words("sweep", sweep_yaml)
    assert code == 0
    results = read_results("out/results.json")
    assert len(results.runs) == 6
    assert results.failed == {}
    assert Path("out/sweep.png").stat().st_size > 5000
    # best first, whoever it is
    means = {row.entry: row.figures["mcc"].mean for row in results.rows if row.matched}
    order = [row.entry for row in ranked(results, 2)]
    assert order[: len(means)] == sorted(means, key=means.get, reverse=True)
    lines = [line for line in out.splitlines() if line.startswith("│")]
    first = results.sweep.points[order[0]]
    assert first.entry in lines[0]
    assert f"{first.values['lr']:.4g}" in lines[0]

    weights = {p: p.stat().st_mtime_ns for p in Path("out").rglob("sae_weights.safetensors")}
    assert len(weights) == 6
    code, out, _ = in_words("sweep", sweep_yaml, "--set", "sweep.over.lr=[1.0e-2, 1.0e-3, 1.0e-4]")
    assert code == 0
    assert len(read_results("out/results.json").runs) == 9
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
    assert in_words("report", "out/results.json")[0] == 0
    assert in_words("sweep", sweep_yaml, "--dry-run")[0] == 0


def test_sweep_points_other_batches_run_side_by_side(sweep_yaml):
    over = "sweep.over={batch_size: [32, 64], training_samples: [640, 1280]}"
    code, _, errors = in_words("sweep", sweep_yaml, "--set", over, "--jobs", 2)
    assert code == 0, errors
    results = read_results("out/results.json")
    assert len(results.runs) == 8
    settings = [entry.settings["trainer"] for entry in results.entries.values()]
    trained = {(values["batch_size"], values["training_samples"]) for values in settings}
    assert trained == set(product([32, 64], [640, 1280]))
    sae = Path("out") / results.runs[0].folder / "sae"
    assert in_words("evaluate", sae, "--on", sweep_yaml)[0] == 0


def test_a_pool_is_shared_by_runs_of_any_length(sweep_yaml):
    over = "sweep.over={training_samples: [1280, 2560], batch_size: [32, 64]}"
    comparison = load_sweep(sweep_yaml, ["pool_batches=10", over])
    assert len({planned.data_key for planned in comparison.planned}) == 2


def test_paths_are_whole_for_processes_elsewhere(sweep_yaml, tmp_path):
    assert load_sweep(sweep_yaml).output == Path("out")
    found = load_sweep(sweep_yaml, absolute_paths=True)
    assert found.output == tmp_path / "out"
    assert found.content["output_path"] == "out"


def test_many_fields_make_no_endless_names(sweep_yaml):
    decays = ["adam_beta1", "adam_beta2", "sae.importance_decay"]
    others = ["lr", "lr_end", "sae.magnitude_weight", "sae.frequency_weight", "sae.mask_rate"]
    settings = [f"sweep.over.{name}=[0.5]" for name in decays + others]
    comparison = load_sweep(sweep_yaml, settings)
    assert max(len(planned.entry) for planned in comparison.planned) > 130
    assert max(len(planned.name) for planned in comparison.planned) < 130


def test_a_run_file_s_sweep_is_data_too(synthetic_yaml):
    more = "sweep: {over: {lr: [0.01]}}\nl0: [3]\n"
    synthetic_yaml.write_text(synthetic_yaml.read_text() + more)
    run = data_of(str(synthetic_yaml)).run
    assert (run.seed, run.runner.sae.k) == (3, 3)


def test_many_points_are_told_by_the_best_ten(sweep_yaml):
    rates = [i / 10 for i in range(13)]
    settings = [f"sweep.over={{sae: {{mask_rate: {rates}}}}}", "training_samples=320"]
    code, out, _ = in_words("sweep", sweep_yaml, *(a for s in settings for a in ("--set", s)))
    assert code == 0
    assert "best 10 of 14" in out
    assert sum(line.startswith("│") for line in out.splitlines()) == 10


def test_mistakes_end_with_two(sweep_yaml):
    code, _, errors = in_words("sweep", sweep_yaml, "--set", "sweep.over.lrr=[1]")
    assert code == 2
    assert all(line.startswith("error: ") for line in errors.splitlines())


# --- as wandb's ----------------------------------------------------------------------------------


def as_wandb(path, *settings):
    return in_words("sweep", path, *(a for s in settings for a in ("--set", s)), "--wandb", "files")


def test_wandbs_agent_trains_what_the_file_says(synthetic_yaml):
    lr, rest = "{low: 1.0e-3, high: 1.0e-2, log: true}", "sae: {mask_rate: [0.5]}"
    over = f"sweep={{points: 3, over: {{lr: {lr}, {rest}, batch_size: [32, 64]}}}}"
    code, out, _ = as_wandb(synthetic_yaml, over)
    assert code == 0
    assert "wrote files/sweep.yaml" in out
    file = yaml.safe_load(Path("files/sweep.yaml").read_text())
    assert (file["method"], file["run_cap"]) == ("random", 3)
    assert file["parameters"] == {
        "lr": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-2},
        "sae.mask_rate": {"values": [0.5]},
        "batch_size": {"values": [32, 64]},
    }
    # What the agent makes of it, by its own functions.
    chosen = {"lr": 0.004, "sae.mask_rate": 0.5, "batch_size": 32}
    args = create_sweep_command_args({"args": {k: {"value": v} for k, v in chosen.items()}})
    command = []
    for chunk in create_sweep_command(file["command"]):
        macro = chunk.startswith("${") and chunk.endswith("}")
        command += args[chunk[2:-1]] if macro else [chunk]
    environment = {
        **os.environ,
        "WANDB_RUN_ID": "abc123",
        "WANDB_MODE": "offline",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trained = yaml.safe_load(Path("out/abc123/runner_cfg.json").read_text())
    assert (trained["lr"], trained["batch_size"], trained["seed"]) == (0.004, 32, 3)
    assert (trained["sae"]["mask_rate"], trained["sae"]["k"]) == (0.5, 2)
    assert list(Path("wandb").glob("offline-run-*-abc123"))


def test_wandb_is_told_of_one_architecture_at_a_set_l0(sweep_yaml):
    code, _, errors = as_wandb(sweep_yaml)
    assert (code, errors) == (2, "error: --wandb: allowed is a sweep of one architecture\n")
    controlled = "architectures={standard: {sae: {l1_coefficient: 0.1}}}"
    code, _, errors = as_wandb(sweep_yaml, controlled, "sweep.over={lr: [0.1]}")
    assert code == 2
    assert "l1 of 'standard' is controlled to the L0" in errors


def test_several_seeds_and_l0s_are_wandbs_to_vary(sweep_yaml):
    one = "architectures={atm: {sae: {mask_warm_up_steps: 5}, run: {lr: 2.0e-3}}}"
    settings = [one, "sweep.over={batch_size: [32]}", "seeds=[4, 5]", "l0=[2, 3]"]
    assert as_wandb(sweep_yaml, *settings)[0] == 0
    run = load_run("files/run.yaml")
    assert (run.runner.lr, run.runner.sae.mask_warm_up_steps, run.runner.sae.d_sae) == (2e-3, 5, 32)
    assert run.runner.logger.log_to_wandb
    assert plan(run)
    file = yaml.safe_load(Path("files/sweep.yaml").read_text())
    assert file["method"] == "grid"
    assert file["parameters"] == {
        "sae.k": {"values": [2, 3]},
        "seed": {"values": [4, 5]},
        "batch_size": {"values": [32]},
    }
