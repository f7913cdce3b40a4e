"""The command lines in README and docs are valid, and most of them run, on small data."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from sae_lens_atm.cli.main import app
from tests.helpers import make_sae, train

ROOT = Path(__file__).parent.parent
CLI_PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands


def commands_of(page):
    """Return the arguments of each `sae-lens-atm` line in a page's blocks of Bash."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sae-lens-atm")
    ]


LINES = [
    line for page in ("README.md", "docs/cli.md", "docs/results.md") for line in commands_of(page)
]


def lines_of(*names):
    found = list(dict.fromkeys(tuple(line) for line in LINES if line[0] in names))
    assert {line[0] for line in found} == set(names)
    return found


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_every_line_is_valid(line):
    name, *arguments = line
    COMMANDS[name].make_context(name, arguments)


def test_the_page_has_every_command():
    assert {line[0] for line in LINES} | {"saelens"} == COMMANDS.keys()
    assert "sae-lens-atm saelens" in CLI_PAGE


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_every_option(name):
    for parameter in COMMANDS[name].params:
        for option in parameter.opts:
            if option.startswith("--") and option != "--help":
                assert re.search(rf"`{option}\b", CLI_PAGE), option


@pytest.mark.parametrize("line", lines_of("train"), ids=" ".join)
def test_train(line, language_model_yaml, synthetic_yaml):
    name = line[1]
    small = synthetic_yaml if name == "sister-a" else language_model_yaml
    run(*(small if word == name else word for word in line))


def test_the_shipped_run_file_of_the_readme_passes_its_dry_run():
    run(*next(line for line in lines_of("train") if "--dry-run" in line and "gemma" in line[1]))


def test_compare_report_and_evaluate(comparison_yaml, tmp_path):
    text = comparison_yaml.read_text().replace("output_path: out\n", "")
    (tmp_path / "compare-sister-a.yaml").write_text(text)
    make_sae(d_in=16).save_model(tmp_path / "my-sae")
    lines = [
        line
        for line in lines_of("compare", "report", "evaluate")
        if "compare-sister-a" in " ".join(line)
    ]
    lines.sort(key=lambda line: line[0] != "compare")  # a report needs the results
    for line in lines:
        run(*(f"{word}.yaml" if word == "compare-sister-a" else word for word in line))


@pytest.mark.parametrize("line", lines_of("sweep"), ids=" ".join)
def test_sweep(line):
    short = ["training_samples=4096", "lr_warm_up_steps=0", "lr_decay_steps=0", "sweep.points=2"]
    run(*line, *(part for setting in short for part in ("--set", setting)), "--dry-run")


def test_inspect_and_push(tmp_path):
    train(make_sae(), 5).save_inference_model(tmp_path / "my-sae")
    for line in lines_of("inspect"):
        run(*line)
    for line in lines_of("push"):
        out = run(*line, "--dry-run")
        assert 'SAE.from_pretrained("you/your-saes", "layer_12")' in out


def test_small_language_models(tmp_path):
    for line in lines_of("compare"):
        if "compare-spelling-lm" in line:
            run(*line, "--dry-run")
    small = ["steps=2", "d_model=8", "heads=2", "words_per_letter=6", "dataset_rows=8"]
    for line in lines_of("make-lm"):
        run(*line, *(part for setting in small for part in ("--set", setting)))
    assert (tmp_path / "my-lm/model.safetensors").exists()


def test_wandbs_agent_runs_the_sweep_file(synthetic_yaml, tmp_path):
    """The agent's command, expanded by wandb's functions, is a valid call of `train`."""
    (source,) = re.findall(r"```yaml\n(name: atm on sister A.*?)```", CLI_PAGE, re.DOTALL)
    file = yaml.safe_load(source)
    chosen = {"lr": 0.004, "sae.masked_weight": 0.25}
    assert chosen.keys() == file["parameters"].keys()
    args = create_sweep_command_args({"args": {k: {"value": v} for k, v in chosen.items()}})
    command = []
    for chunk in create_sweep_command(file["command"]):
        macro = chunk.startswith("${") and chunk.endswith("}")
        command += args[chunk[2:-1]] if macro else [chunk]
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin/sae-lens-atm"
    shim.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    shim.chmod(0o755)
    path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "WANDB_RUN_ID": "abc123"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[:3] == ["train", "sister-a", "output_path=runs/wandb/abc123"]
    assert {"lr=0.004", "sae.masked_weight=0.25"} <= set(words)
    words = [str(synthetic_yaml) if word == "sister-a" else word for word in words]
    assert "abc123" in run(*words, "--dry-run")
