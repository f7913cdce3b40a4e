import re

import pytest

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.explore import explore
from sae_lens_atm.explore.packing import unpack
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.cli.command import run as run_command


@pytest.fixture
def trained(language_model_yaml):
    train(load_run(language_model_yaml))
    return "out"


def saved(path):
    html = path.read_text(encoding="utf-8")
    (packed,) = re.findall(r'id="data">([^<]*)<', html)
    return html, unpack(packed)


def test_an_sae_of_a_language_model(trained, language_model_yaml, tmp_path):
    phases = []
    path = explore(
        trained, load_run(language_model_yaml), tmp_path / "page.html", 320, on_phase=phases.append
    )
    html, data = saved(path)
    (sae,) = data["saes"]
    assert len(sae["latents"]["frequency"]) == 64
    assert data["rows"] == 320
    assert {*data["strings"]} <= {"<bos>", "<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(60))}
    assert sae["promoted"]["tokens"].shape == (64, 8)
    assert "<h1>out</h1>" in html
    whats = list(dict.fromkeys(phase.what for phase in phases))
    assert whats[:2] == ["loading the language model", "reading tokens"]


def test_an_sae_in_memory(language_model_yaml, tmp_path, trained):
    from sae_lens_atm.hub.loading import load_sae

    run = load_run(language_model_yaml)
    one = explore(load_sae(trained), run, tmp_path / "one.html", 160)
    other = explore(trained, run, tmp_path / "other.html", 160)
    (in_memory,), (on_disk,) = saved(one)[1]["saes"], saved(other)[1]["saes"]
    assert in_memory["latents"]["mean"].tolist() == on_disk["latents"]["mean"].tolist()


def test_another_hook_is_refused_before_the_model_is_read(trained, language_model_yaml, tmp_path):
    run = load_run(language_model_yaml, ["hook_name=model.layers.0"])
    phases = []
    with pytest.raises(SettingsError, match=r"hook_name of out must be model\.layers\.0"):
        explore(trained, run, tmp_path / "page.html", on_phase=phases.append)
    assert phases == []


def test_the_command(trained, language_model_yaml, tmp_path):
    result = run_command("explore", trained, "--on", language_model_yaml, "--tokens", 160)
    assert result.exit_code == 0, result.output
    assert "reading tokens: 160 tokens" in result.output
    assert "wrote explore.html" in result.output
    assert (tmp_path / "explore.html").exists()
    other = "hook_name=model.layers.0"
    result = run_command("explore", trained, "--on", language_model_yaml, "--set", other)
    assert result.exit_code == 2
    assert "error: hook_name of out must be" in result.output


def test_an_sae_of_synthetic_data(synthetic_yaml, tmp_path):
    run = load_run(synthetic_yaml)
    train(run)
    html, data = saved(explore("out", run, tmp_path / "page.html", 3000))
    (sae,) = data["saes"]
    assert data["rows"] == 3000
    assert "0.2" in data["strings"]
    assert sae["latents"]["near"].shape == (32, 8)
    assert "synthetic, 20 features" in html
    shown = {*sae["examples"]["windows"]["places"].tolist()}
    assert shown <= {*data["contexts"]["rows"].tolist()}


def test_two_saes(trained, language_model_yaml, tmp_path):
    run = load_run(language_model_yaml)
    html, data = saved(explore(trained, run, tmp_path / "page.html", 320, beside=trained))
    assert data["names"] == ["out (A)", "out (B)"]
    one, _ = data["saes"]
    fires = one["latents"]["frequency"] > 0
    assert one["matches"]["latent"][fires].tolist() == fires.nonzero()[0].tolist()
    assert "<h1>out (A) beside out (B)</h1>" in html
