import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_atm.cli.saes import describe
from sae_lens_atm.cli.terminal import console
from tests.cli.command import run
from tests.helpers import make_sae, train


def text_of(sae):
    console = Console(file=io.StringIO(), width=120)
    for table in describe(sae):
        console.print(table)
    return console.file.getvalue()


def test_inspect_what_train_saved(synthetic_yaml):
    run("train", synthetic_yaml, "--set", "n_checkpoints=1")
    saved = run("inspect", "out")
    assert saved.exit_code == 0, saved.output
    assert "trained as" in saved.output
    (checkpoint,) = Path("out/checkpoints").iterdir()
    inspected = run("inspect", checkpoint)
    assert inspected.exit_code == 0, inspected.output
    assert "█" in inspected.output


def test_a_saved_sae_has_quantiles_of_the_importance(tmp_path):
    train(make_sae(), 5).save_inference_model(tmp_path)
    text = text_of(SAE.load_from_disk(tmp_path))
    assert "quantile 0.5" in text
    assert "█" not in text


def test_a_checkpoint_has_a_histogram_of_the_importance(tmp_path):
    train(make_sae(), 5).save_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    bars = [line for line in text_of(sae).splitlines() if " to " in line]
    assert len(bars) == 10
    assert sum(int(line.split()[-1]) for line in bars) == 24
    assert max(line.count("█") for line in bars) == 30


def test_an_sae_without_importance_has_two_tables():
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=24, device="cpu"))
    text = text_of(sae)
    assert "jumprelu" in text
    assert "Importance" not in text


def test_inspect_a_damaged_sae(tmp_path):
    train(make_sae(), 2).save_inference_model(tmp_path / "sae")
    weights = tmp_path / "sae/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    result = run("inspect", "sae")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: cannot load sae: SafetensorError")


@pytest.mark.usefixtures("_offline")
def test_inspect_what_is_not_on_the_hub():
    result = run("inspect", "nobody/nothing:sae")
    assert result.exit_code != 0
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_importance_of_one_latent_is_no_division_by_zero(tmp_path):
    sae = make_sae()
    with torch.no_grad():
        sae.tracker.steps.zero_()
    sae.save_model(tmp_path)
    assert "Importance" in text_of(SAE.load_from_disk(tmp_path))


def test_a_path_is_no_markup(synthetic_yaml):
    trained = run("train", synthetic_yaml, "output_path=out[/b]")
    assert trained.exit_code == 0, trained.output
    assert "saved out[/b] in" in trained.output
    inspected = run("inspect", "out[/b]")
    assert inspected.exit_code == 0, inspected.output
    evaluated = run("evaluate", "out[/b]", "--on", synthetic_yaml)
    assert evaluated.exit_code == 0, evaluated.output
    assert "out[/b]" in evaluated.output


def test_facts_are_no_markup():
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=24, device="cpu"))
    sae.cfg.metadata.model_name = "[/b] :star:"
    with console.capture() as shown:
        for table in describe(sae):
            console.print(table)
    assert "[/b] :star:" in shown.get()


def test_the_importance_comes_before_the_settings(tmp_path):
    train(make_sae(parent_weight=0.0), 5).save_inference_model(tmp_path)
    text = text_of(SAE.load_from_disk(tmp_path))
    assert text.index("\nImportance") < text.index("\nSettings with an effect")
    assert "parent_weight" in text
    assert "parent_tau" not in text
    assert "l1_coefficient" not in text
