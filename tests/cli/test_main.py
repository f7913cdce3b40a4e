import importlib
import subprocess
import sys
import warnings

import pytest

from tests.cli.command import run

cli_main = importlib.import_module("sae_lens_atm.cli.main")  # the package has a function main

COMMANDS = (
    "train",
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

    monkeypatch.setattr(cli_main, "entry_points", lambda group: [EntryPoint()] * (group != ""))
    cli_main.load_plugins()
    assert len(loaded) == 1
