import signal
from pathlib import Path

import pytest
import typer

from sae_lens_atm.cli import terminal
from sae_lens_atm.cli.terminal import clear_errors, config_path, exit_with
from sae_lens_atm.errors import (
    CheckpointError,
    HubError,
    Interrupted,
    NonFiniteBatchError,
    RankLostError,
    SAEBenchError,
    SaveError,
    SettingsError,
)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SettingsError("lr must be above 0"), 2, "lr must be above 0"),
        (CheckpointError("cannot resume"), 2, "cannot resume"),
        (NonFiniteBatchError("bad batches"), 1, "bad batches"),
        (RankLostError("a process"), 1, "a process"),
        (HubError("refused"), 1, "refused"),
        (SAEBenchError("failed"), 1, "failed"),
        (SaveError("cannot save out"), 1, "cannot save out"),
        (KeyboardInterrupt(), 130, "stopped"),
        (
            Interrupted(Path("out/1"), signal.SIGTERM),
            143,
            "stopped by SIGTERM, saved out/1; resume with --resume out/1",
        ),
        (
            Interrupted(None, signal.SIGINT),
            130,
            "stopped by SIGINT; resume with the same command",
        ),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "ZeroDivisionError: by zero (set SAE_LENS_ATM_DEBUG=1 for the traceback)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_a_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(typer.Exit) as ended, clear_errors():
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("SAE_LENS_ATM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError), clear_errors():
        raise ZeroDivisionError


def test_one_process_of_a_machine_prints(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "is_main_of_node", lambda: False)
    with pytest.raises(typer.Exit):
        exit_with("refused", 2)
    assert capsys.readouterr().err == ""
    with pytest.raises(typer.Exit):
        exit_with("two\nlines", 1, on_every_rank=True)
    assert capsys.readouterr().err == "error: two\nerror: lines\n"


def test_a_file_is_found_before_a_shipped_one(tmp_path):
    assert config_path("demo").parent.name == "configs"
    (tmp_path / "demo").write_text("")
    assert config_path("demo") == Path("demo")
    assert config_path("other.yaml") == Path("other.yaml")


def test_a_path_is_no_name_of_a_shipped_file(tmp_path):
    (tmp_path / "runs/demo").mkdir(parents=True)
    for path in ("/no/such/demo", "runs/demo"):
        with pytest.raises(SettingsError, match=f"no run file '{path}': give a path or one of"):
            config_path(path)
