import importlib
import subprocess
import sys
import warnings

import pytest

from sae_lens_atm import saebench
from sae_lens_atm.cli import commands
from tests.cli.command import run

cli_main = importlib.import_module("sae_lens_atm.cli.main")  # the package has a function main

COMMANDS = (
    "train",
    "cache",
    "compare",
    "sweep",
    "report",
    "evaluate",
    "saebench",
    "inspect",
    "push",
    "make-lm",
    "saelens",
)


def test_help_lists_every_command_with_a_sentence():
    output = run("--help").output
    for command in COMMANDS:
        (line,) = [text for text in output.splitlines() if text.startswith(f"│ {command} ")]
        assert len(line.split()) > 4


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_every_command_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output


def test_help_names_every_eval_of_saebench():
    assert ", ".join(saebench.EVALS) in run("saebench", "--help").output


def test_help_and_errors_in_a_file_need_neither_torch_nor_saelens(tmp_path):
    """They take seconds to import."""
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2")
    helps = [["--help"], *([command, "--help"] for command in COMMANDS[:-1])]
    errors = [
        [*command, *mistake]
        for command in (["train"], ["cache"], ["compare"], ["sweep"], ["evaluate", "sae", "--on"])
        for mistake in (
            ["nope"],
            ["missing.yaml"],
            ["bad.yaml"],
            ["twice.yaml"],
            ["demo", "--set", "lr"],
            ["demo", "--set", "lr=["],
        )
    ]
    usage = [[], ["train"], ["nope"], ["train", "demo", "--nope"], ["make-lm", "x", "--set", "lr"]]
    code = f"""
import sys
from sae_lens_atm_cli import main
for expected, arguments in {[(0, each) for each in helps] + [(2, each) for each in errors + usage]}:
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as ended:
        assert ended.code == expected, (arguments, ended.code)
    found = {{"torch", "sae_lens", "transformers"}} & sys.modules.keys()
    assert not found, (arguments, found)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_usage_errors_name_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["anything.py", "train", "--bogus"])
    with pytest.raises(SystemExit):
        cli_main.main()
    assert "Try 'sae-lens-atm train --help' for help" in capsys.readouterr().err


def test_saelens_command_line_knows_atm():
    """In a fresh interpreter: SAELens' own module is run, and parses its own flags."""
    command = [sys.executable, "-m", "sae_lens_atm", "saelens", "--architecture", "atm", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--mask_rate" in shown
    assert "--masked_weight" in shown


def test_warnings_are_one_line(monkeypatch):
    monkeypatch.setattr(cli_main, "app", lambda **_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    cli_main.main()
    assert warnings.formatwarning("slow", UserWarning, "file.py", 3) == "warning: slow\n"


def test_plugins_of_other_packages_are_loaded(monkeypatch):
    loaded = []

    class EntryPoint:
        def load(self):
            return lambda: loaded.append(self)

    monkeypatch.setattr(commands, "entry_points", lambda group: [EntryPoint()] * (group != ""))
    commands.load_plugins()
    assert len(loaded) == 1
