import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread, main_thread

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sae_lens_atm import saebench
from sae_lens_atm.cli.main import app
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.saebench import environment, evals
from sae_lens_atm.saebench.inside.models import (
    hooked_name,
    load_model,
    load_sae,
)
from tests.helpers import make_sae, train

INSIDE = Path(evals.__file__).parent
ABSORPTION = {
    "mean": {
        "mean_absorption_fraction_score": 0.25,
        "mean_full_absorption_score": 0.125,
        "mean_num_split_features": 1.5,
    },
    "probes": {"f1_probe": 0.9, "f1_sparse_sae_1": 0.75},
}
CORE = {
    "sparsity": {"l0": 32.5},
    "reconstruction_quality": {"explained_variance": 0.8, "mse": 1e-6},
    "model_performance_preservation": {"ce_loss_score": 0.95},
}


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def sae_folder(tmp_path):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=24, device="cpu"))
    sae.cfg.metadata = SAEMetadata(model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    sae.save_model(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.fixture
def pip(monkeypatch):
    """Runs no pip: keeps what it was called with, and fails from the nth call on."""
    calls = []
    calls_that_work = [99]

    def call(command, check):
        assert check
        calls.append([str(word) for word in command])
        if len(calls) > calls_that_work[0]:
            raise subprocess.CalledProcessError(7, command)

    monkeypatch.setattr(environment.subprocess, "run", call)
    monkeypatch.setattr(environment.venv, "create", lambda path, **_: path.mkdir())
    call.calls, call.calls_that_work = calls, calls_that_work
    return call


WRITE = """
import json, os, sys, time
def write(results):
    with open("part", "w") as file:
        json.dump(results, file)
    os.replace("part", sys.argv[-1])
"""


def stand_in(folder, program):
    """An environment whose Python runs `program` instead of SAEBench."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{WRITE}\n{program}")
    python.chmod(0o755)
    (folder / environment.REQUIREMENTS).write_text(environment._listed())
    return folder


def answers(found):
    return f"write({{'evals': json.loads({json.dumps(found)!r})}})"


def test_an_environment_is_made_once(tmp_path, pip):
    folder = tmp_path / "cache/env"
    assert not saebench.is_complete(folder)
    saebench.prepare(folder)
    assert saebench.is_complete(folder)
    libraries, bench = pip.calls
    assert libraries[1:4] == bench[1:4] == ["-m", "pip", "install"]
    assert bench[4:] == ["--no-deps", "sae-bench==0.6.0", "sae-probes==0.4.2"]
    assert "sae-lens==" + environment.version("sae-lens") in libraries
    saebench.prepare(folder)
    assert len(pip.calls) == 2
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["env"]


@pytest.mark.parametrize("calls_that_work", [0, 1])
def test_half_an_environment_does_not_count(tmp_path, pip, calls_that_work):
    pip.calls_that_work[0] = calls_that_work
    with pytest.raises(saebench.SAEBenchError, match=r"exit code 7 of .*pip install"):
        saebench.prepare(tmp_path / "env")
    assert not (tmp_path / "env").exists()
    pip.calls_that_work[0] = 99
    saebench.prepare(tmp_path / "env")  # over what was left behind
    assert saebench.is_complete(tmp_path / "env")


def test_torch_is_asked_for_without_its_build(monkeypatch):
    versions = {"torch": "2.6.0+cu124"}
    monkeypatch.setattr(environment, "version", lambda name: versions.get(name, "1.0"))
    assert environment.requirements()[0] == "torch==2.6.0"


def test_other_versions_want_another_cached_environment(monkeypatch):
    before = saebench.default_folder()
    assert saebench.default_folder() == before
    monkeypatch.setattr(environment, "version", lambda _: "0.0.1")
    assert saebench.default_folder() != before


def test_other_folders_are_left_alone(tmp_path, pip):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match=r"is not an environment"):
        saebench.prepare(tmp_path)
    (tmp_path / environment.REQUIREMENTS).write_text("torch==1.0\n")
    with pytest.raises(SettingsError, match="for other versions"):
        saebench.prepare(tmp_path)
    assert not pip.calls
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ({}, {"evals": "core,ravel"}, "^--evals .* 'core,ravel'"),
        ({}, {"evals": "core,core"}, "^--evals .* each once"),
        ({}, {"evals": "absorption,"}, "^--evals .* 'absorption,'"),
        ({}, {"evals": "core", "words": 9}, "^--words 9: only absorption uses it"),
        ({}, {"evals": "core", "tasks": 9}, "^--tasks 9: only sae_probes uses it"),
        ({}, {"evals": "absorption", "text": "a/b"}, "^--dataset a/b: only core uses it"),
        ({}, {"text": "./nothing"}, "^--dataset ./nothing: there is no such folder"),
        ({}, {"model": "/no/such"}, "^--model /no/such: there is no such folder"),
        ({"model_name": None}, {}, "no model_name"),
        ({"hook_name": None}, {}, "no hook_name"),
        ({"hook_name": "blocks.1.hook_mlp_out"}, {}, "hook blocks.1.hook_mlp_out: "),
        ({"hook_name": "model.layers.1.mlp"}, {}, "hook model.layers.1.mlp: "),
    ],
)
def test_what_saebench_cannot_evaluate(tmp_path, sae_folder, metadata, options, message):
    sae = SAE.load_from_disk(sae_folder)
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(tmp_path / "other")
    with pytest.raises(SettingsError, match=message):
        saebench.plan_evals(str(tmp_path / "other"), **options)


def test_a_hook_without_absorption(tmp_path, sae_folder):
    sae = SAE.load_from_disk(sae_folder)
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    sae.save_model(tmp_path / "mlp")
    assert saebench.plan_evals(str(tmp_path / "mlp"), "core, sparse_probing").model == "gpt2"


@pytest.mark.parametrize(
    ("name", "hooked"),
    [
        ("model.layers.12", "blocks.12.hook_resid_post"),
        ("transformer.h.3", "blocks.3.hook_resid_post"),
        ("gpt_neox.layers.4", "blocks.4.hook_resid_post"),
        ("blocks.5.hook_resid_post", "blocks.5.hook_resid_post"),
        ("model.layers.12.mlp", "model.layers.12.mlp"),
    ],
)
def test_names_of_hooks(name, hooked):
    assert hooked_name(name) == hooked


def test_the_layer_that_a_hook_is_renamed_to_is_the_same(gemma_folder):
    tokens = torch.randint(4, 64, (2, 9))
    model = load_model(str(gemma_folder), "cpu", torch.float32)
    name = hooked_name("model.layers.0")
    _, cache = model.run_with_cache(tokens, names_filter=[name])
    theirs = AutoModelForCausalLM.from_pretrained(gemma_folder)(tokens, output_hidden_states=True)
    torch.testing.assert_close(cache[name], theirs.hidden_states[1])
    assert model.cfg.model_name == gemma_folder.name


def test_decoder_rows_are_brought_to_length_one(tmp_path, sae_folder):
    sae = SAE.load_from_disk(sae_folder)
    sae.W_dec.data *= torch.linspace(0.5, 2, 24)[:, None]
    sae.save_model(tmp_path / "long")
    folded = load_sae(tmp_path / "long", "cpu", torch.float32)
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(24))
    x = torch.randn(50, 8)
    torch.testing.assert_close(folded(x), sae(x))


def test_a_checkpoint_goes_in_as_a_stock_sae(tmp_path):
    train(make_sae(), 5).save_model(tmp_path / "checkpoint")
    sae = SAE.load_from_disk(tmp_path / "checkpoint")
    assert sae.cfg.architecture() == "atm"
    evals.as_stock_sae(sae).save_model(tmp_path / "stock")
    stock = SAE.load_from_disk(tmp_path / "stock")
    assert type(stock) is JumpReLUSAE
    x = torch.randn(100, 8)
    assert (sae.encode(x) > 0).any()
    torch.testing.assert_close(stock.encode(x), sae.encode(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words", "tasks"),
    [
        ({}, None, None),
        ({"quick": True}, evals.QUICK_WORDS, evals.QUICK_TASKS),
        ({"words": 9, "tasks": 8}, 9, 8),
        ({"quick": True, "words": 9, "tasks": 8}, 9, 8),
    ],
)
def test_words_and_tasks(sae_folder, options, words, tasks):
    request = saebench.plan_evals(str(sae_folder), ",".join(evals.EVALS), **options)
    assert (request.words, request.tasks) == (words, tasks)


def test_the_tasks_of_sae_probes_run_only_when_asked(sae_folder):
    assert saebench.plan_evals(str(sae_folder)).evals == ["absorption", "core", "sparse_probing"]
    assert saebench.plan_evals(str(sae_folder), "sae_probes").evals == ["sae_probes"]


def test_what_the_process_is_given(tmp_path, sae_folder, text_folder):
    program = """
job = json.load(open(sys.argv[3]))
config = json.load(open(job["sae"] + "/cfg.json"))
seen = [sys.argv[1:], job, config["architecture"], os.environ["PYTHONPATH"]]
write({"evals": {}, "seen": seen})
"""
    env = stand_in(tmp_path / "env", program)
    request = saebench.plan_evals(str(sae_folder), "core", text=os.path.relpath(text_folder))
    argv, job, architecture, path = saebench.run_evals(request, env, lambda _: None)["seen"]
    assert argv == ["-m", "inside.run", "job.json", "results.json"]
    assert (architecture, path) == ("jumprelu", str(INSIDE))
    assert job["model"] == "gpt2"
    assert job["evals"] == ["core"]
    assert (job["words"], job["tasks"]) == (None, None)
    assert job["text"] == str(text_folder)  # the process works in another folder


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("write({'error': 'no such model'})", "no such model"),
    ],
)
def test_a_process_that_fails_is_one_line(tmp_path, sae_folder, program, message):
    env = stand_in(tmp_path / "env", program)
    result = run("saebench", sae_folder, "--env", env)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: SAEBench")
    assert message in line


def test_scores_are_shown_and_kept_with_their_direction(tmp_path, sae_folder):
    found = {
        "absorption": {"eval_result_metrics": ABSORPTION},
        "core": {"eval_result_metrics": CORE},
        "sparse_probing": {"error": "cannot load the dataset x: ConnectionError"},
    }
    env = stand_in(tmp_path / "env", answers(found))
    result = run("saebench", sae_folder, "--env", env, "--json", "found.json")
    assert result.exit_code == 1
    assert result.stderr == "error: sparse_probing: cannot load the dataset x: ConnectionError\n"
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in result.stdout.splitlines()
        if len(cells := line.strip("│").split("│")) == 3
    }
    assert rows == {
        "absorption, fraction ↓": "0.2500",
        "absorption, full ↓": "0.1250",
        "latents per letter": "1.50",
        "F1 of the letter probes": "0.900",
        "F1 of one latent ↑": "0.750",
        "L0": "32.50",
        "explained variance ↑": "0.800",
        "CE loss recovered ↑": "0.950",
    }
    kept = json.loads((tmp_path / "found.json").read_text())
    better = {score["score"]: score["better"] for score in kept["scores"]}
    assert better["mean_full_absorption_score"] == "lower"
    assert better["explained_variance"] == "higher"
    assert better["l0"] is None
    assert kept["saebench"]["evals"] == found


@pytest.mark.parametrize("stop", [True, False])
def test_finished_evals_are_kept_if_a_later_one_is_stopped(tmp_path, sae_folder, stop):
    found = {"absorption": {"eval_result_metrics": ABSORPTION}}
    then = "time.sleep(300)" if stop else "os.kill(os.getpid(), 9)"
    env = stand_in(tmp_path / "env", f"{answers(found)}\n{then}")
    kept = tmp_path / "found.json"
    command = [sys.executable, "-m", "sae_lens_atm", "saebench", str(sae_folder)]
    command += ["--env", str(env), "--json", str(kept)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not kept.exists():
            assert process.poll() is None or kept.exists()
            time.sleep(0.05)
        if stop:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=180)
    assert ("error: stopped" if stop else "killed by SIGKILL") in errors
    assert json.loads(kept.read_text())["saebench"]["evals"] == found


def sleeper(tmp_path):
    """An environment whose Python sleeps, and ends with its parent as SAEBench's process does."""
    return stand_in(
        tmp_path / "env",
        "from inside.parent import end_with_parent\nend_with_parent()\n"
        f"time.sleep(0.5)\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.')\n"
        "time.sleep(300)",
    )


def test_ctrl_c_ends_the_process_too(tmp_path, sae_folder):
    command = [sys.executable, "-m", "sae_lens_atm", "saebench", str(sae_folder)]
    command += ["--env", str(sleeper(tmp_path))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        pid = written(tmp_path / "pid", lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=180)  # a busy machine is slow
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_and_leaves_no_dead_process_behind(tmp_path, sae_folder):
    request = saebench.plan_evals(str(sae_folder), "core")
    pids = []

    def interrupt():
        pids.append(written(tmp_path / "pid", lambda: True))
        signal.pthread_kill(main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt) as stopped:
            saebench.run_evals(request, sleeper(tmp_path), lambda _: None)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    del stopped  # until here it holds the process: collecting that would end it as well


def written(file, still):
    while not (file.exists() and file.read_text().endswith(".")):
        assert still()
        time.sleep(0.05)
    return int(file.read_text()[:-1])


def test_the_process_ends_when_nobody_is_there_any_more():
    program = "import time; from inside.parent import end_with_parent; end_with_parent()"
    environment = {**os.environ, "PYTHONPATH": str(INSIDE)}
    for rest, code in (("; time.sleep(300)", 1), ("; time.sleep(0.1)", 0)):
        process = subprocess.Popen(
            [sys.executable, "-c", program + rest], stdin=subprocess.PIPE, env=environment
        )
        if code:
            process.stdin.close()
        assert process.wait(timeout=60) == code
        process.stdin.close()
