"""Whole error messages. Elsewhere, tests compare the type of an error and its field."""

import pytest

from sae_lens_atm import files
from sae_lens_atm.cli.terminal import BAD_INPUT
from sae_lens_atm.yaml_files import shipped_config
from tests.cli.command import run
from tests.helpers import make_sae, train

NAMES = ", ".join(sorted(path.stem for path in shipped_config("demo").parent.glob("*.yaml")))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "nope"], f"no run file 'nope': give a path or one of {NAMES}"),
        (["train", "nope.yaml"], "cannot read nope.yaml: No such file or directory"),
        (["train", "{run}", "lr"], "--set must be key=value or key.subkey=value, got 'lr'"),
        (["train", "{run}", "lr=["], "--set 'lr=[': the value is not YAML"),
        (["train", "{run}", "lr=fast"], "lr must be a valid number, got 'fast'"),
        (["train", "{run}", "lr=-1"], "lr must be above 0, got -1.0"),
        (["train", "{run}", "batch_size=1.5"], "batch_size must be a valid integer, got 1.5"),
        (
            ["train", "{run}", "runner=cloud"],
            "runner must be one of synthetic, language_model, got 'cloud'",
        ),
        (
            ["train", "{run}", "sae.mask_rat=1"],
            "sae.mask_rat: unknown key, did you mean 'mask_rate'?",
        ),
        (
            ["train", "{run}", "sae.mask_rate=-1"],
            "sae.mask_rate must be 0 or more, and finite, got -1.0",
        ),
        (
            ["train", "{run}", "sae.schedule=interleaved"],
            "sae.schedule is 'interleaved': removed in 0.2, each step trains the full SAE and, "
            "while masks are active, also the masked SAE; masked_weight: 1 trains the masked SAE "
            "alone, as in the paper",
        ),
        (
            ["train", "{run}", "sae.d_in=17"],
            "sae.d_in must be 16, the hidden_dim of the synthetic model, got 17",
        ),
        (
            ["train", "{run}", "lr_scheduler_name=cosine"],
            "lr_scheduler_name must be one of constant, cosineannealing, "
            "cosineannealingwarmrestarts, got 'cosine', did you mean 'cosineannealing'?",
        ),
        (["train", "{run}", "device=tpux"], "device must be a device of torch, got 'tpux'"),
        (
            ["train", "{run}", "output_path={run}/x"],
            "output_path {run}/x cannot be written: {run} is no folder",
        ),
        (
            ["train", "{run}", "--resume", "nowhere"],
            "cannot resume: nowhere does not exist",
        ),
        (
            ["train", "demo"],
            "architectures: this is a comparison, use `sae-lens-atm compare`",
        ),
        (["train", "sweep-sister-a"], "sweep: this is a sweep, use `sae-lens-atm sweep`"),
        (
            ["inspect", "nowhere"],
            "no folder nowhere: give a folder, or REPO:SAE_ID on the Hub",
        ),
        (["inspect", "."], ". holds no cfg.json: it is not a saved SAE"),
        (["push", "nowhere", "me/saes"], "no folder nowhere"),
        (["push", ".", "saes"], "repo id must be NAMESPACE/NAME, got 'saes'"),
        (
            ["push", ".", "me/saes", "--id", "a b"],
            "--id must be folders of letters, digits and _-.=, got 'a b'",
        ),
        (
            ["push", "checkpoint", "me/saes"],
            "checkpoint is a training checkpoint: push the output_path of a finished run, or a "
            "folder written by sae.save_inference_model",
        ),
        (
            ["saebench", "checkpoint"],
            "checkpoint has no model_name in its metadata: set --model",
        ),
        (
            ["saebench", "checkpoint", "--evals", "core,ravel"],
            "--evals must be among absorption, core, sparse_probing, sae_probes, each once, "
            "separated by commas, got 'core,ravel'",
        ),
        (["make-lm", "lm", "--set", "stepz=3"], "stepz: unknown key, did you mean 'steps'?"),
        (
            ["make-lm", "lm", "--set", "steps=0"],
            "steps must be 1 or more, and at most 2**20, got 0",
        ),
        (
            ["make-lm", "checkpoint"],
            "FOLDER must be a new or an empty folder, got 'checkpoint'",
        ),
        (["make-lm", "lm", "--set", "lr=.nan"], "lr must be a finite number, got nan"),
        (["make-lm", "{run}/lm"], "folder {run}/lm cannot be written: {run} is no folder"),
        (
            ["evaluate", "checkpoint", "--on", "{run}", "--json", "nowhere/x.json"],
            "--json nowhere/x.json cannot be written: there is no folder nowhere",
        ),
        (
            ["evaluate", "checkpoint", "--on", "{run}", "--json", "checkpoint"],
            "--json checkpoint cannot be written: it is a folder",
        ),
        (
            ["saebench", "checkpoint", "--json", "nowhere/x.json"],
            "--json nowhere/x.json cannot be written: there is no folder nowhere",
        ),
        (["report", "nope.json"], "cannot read nope.json: No such file or directory"),
        (
            ["evaluate", "nowhere", "--on", "{run}"],
            "no folder nowhere: give a folder, or REPO:SAE_ID on the Hub",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(synthetic_yaml, tmp_path, args, message):
    train(make_sae(), 1).save_model(tmp_path / "checkpoint")
    result = run(*(arg.replace("{run}", str(synthetic_yaml)) for arg in args))
    assert result.stderr == f"error: {message.replace('{run}', str(synthetic_yaml))}\n"
    assert result.exit_code == BAD_INPUT


def test_each_mistake_has_a_line(synthetic_yaml):
    result = run("train", synthetic_yaml, "batch_size=x", "sae.architecture=atm", "lr=y")
    assert result.stderr.splitlines() == [
        "error: batch_size must be a valid integer, got 'x'",
        "error: lr must be a valid number, got 'y'",
    ]


def test_an_unknown_architecture_gets_the_list(synthetic_yaml):
    result = run("train", synthetic_yaml, "sae.architecture=batchtop")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: sae.architecture must be one of ")
    assert line.endswith(", got 'batchtop', did you mean 'batchtopk'?")


def test_a_file_is_no_folder_for_a_report(comparison_yaml):
    run("compare", comparison_yaml, "--quick", "--set", "architectures={atm: {role: candidate}}")
    result = run("report", "out-quick/results.json", "--output", comparison_yaml)
    assert result.exit_code == BAD_INPUT
    assert result.stderr == (
        f"error: --output {comparison_yaml} cannot be written: {comparison_yaml} is no folder\n"
    )


def test_a_read_only_folder_is_found_before_training(monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    result = run("make-lm", "lm", "--set", "steps=1", "--set", "d_model=8")
    assert result.exit_code == BAD_INPUT
    assert result.stderr.startswith("error: folder lm cannot be written: ")
    assert result.stderr.endswith(" is read-only\n")
