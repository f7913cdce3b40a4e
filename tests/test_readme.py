"""The README's code runs, with tiny local models where a reader would download one."""

import json
import re
import shlex
from pathlib import Path

import pytest
import sae_lens
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.loading import pretrained_sae_loaders
from typer.testing import CliRunner

from sae_lens_atm.cli import app
from tests.conftest import CONTEXT
from tests.helpers import make_sae, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_block_is_of_a_kind_that_is_tested():
    assert set(re.findall(r"```(\w+)\n", README)) == {"bash", "python", "text"}
    assert len(blocks("python")) == 3


def test_python_example_trains(hooked_model, token_dataset, monkeypatch, tmp_path):
    class TinyRunner(LanguageModelSAETrainingRunner):
        def __init__(self, cfg):
            assert cfg.model_name == "gpt2"
            super().__init__(cfg, override_model=hooked_model, override_dataset=token_dataset)

    monkeypatch.setattr(sae_lens, "LanguageModelSAETrainingRunner", TinyRunner)
    source = blocks("python")[0]
    smaller = {
        "d_in=768": "d_in=16",
        "d_sae=16384": "d_sae=64",
        "k=32": "k=4",
        "blocks.8": "blocks.1",
        "context_size=1024": f"context_size={CONTEXT}, train_batch_size_tokens=64",
        "training_tokens=100_000_000": "training_tokens=1280",
    }
    for large, small in smaller.items():
        assert large in source
        source = source.replace(large, small)
    scope = {}
    exec(source, scope)
    assert scope["sae"].tracker.steps.item() == 20
    assert SAE.load_from_disk(tmp_path / "my-sae").cfg.architecture() == "jumprelu"


def test_python_examples_load(monkeypatch, tmp_path, capsys):
    sae = train(make_sae(), 5)
    sae.save_inference_model(tmp_path / "hub/layer_12")
    sae.save_model(tmp_path / "checkpoints/100000")

    def download(repo_id, filename, **_):
        assert repo_id == "you/your-saes"
        path = tmp_path / "hub" / filename
        if not path.exists():
            raise pretrained_sae_loaders.EntryNotFoundError(filename)
        return str(path)

    class NotFound(Exception):
        pass

    monkeypatch.setattr(pretrained_sae_loaders, "EntryNotFoundError", NotFound)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    scope = {}
    _, from_hub, from_checkpoint = blocks("python")
    exec(from_hub, scope)
    x = torch.randn(4, 8)
    assert torch.equal(scope["sae"](x), sae.eval()(x))
    exec(from_checkpoint, scope)
    assert "values=" in capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_command_lines_run(language_model_yaml):
    """On the tiny Gemma-2: `train NAME` gets its run file, everything else is as written."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("sae-lens-atm")]
    assert len(commands) == 3
    for command in commands:
        arguments = [
            str(language_model_yaml) if word == "gemma-2-2b-l12-16k" else word for word in command
        ]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        # the same line on the real run file gets as far as it can without its weights
        if "inspect" not in command:
            real = CliRunner().invoke(app, [*command, "--dry-run"])
            if "output_path=runs/gemma" not in command:
                assert real.exit_code == 0, real.output


def test_the_error_shown_is_the_error_given(synthetic_yaml):
    (shown,) = blocks("text")
    arguments = ["train", str(synthetic_yaml), "--set", "sae.schedul=dual"]
    assert CliRunner().invoke(app, arguments).stderr == shown


def test_figures_are_those_of_the_committed_results():
    results = json.loads((ROOT / "docs/demo/results.json").read_text())
    rows = re.findall(r"^\| `(\w+)` \| ([\d.-]+) \| ([\d.-]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 6
    for name, atm, topk in rows:
        for column, shown in (("atm", atm), ("topk", topk)):
            digits = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(
                results["figures"][column][name], abs=0.5001 * 10.0**-digits
            ), name


def test_what_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
