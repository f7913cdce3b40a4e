"""The README's code and commands run, with small local models in place of downloads."""

import re
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.loading import pretrained_sae_loaders
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from tests.conftest import CONTEXT
from tests.helpers import make_sae, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 136


def test_every_block_is_of_a_tested_language():
    assert set(re.findall(r"```(\w+)\n", README)) == {"bash", "python", "text"}
    assert len(blocks("python")) == 2


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


def test_schedule_steps_is_the_length_of_the_example():
    source = blocks("python")[0]
    batch = sae_lens.LanguageModelSAERunnerConfig.__dataclass_fields__["train_batch_size_tokens"]
    tokens, steps = (
        int(re.search(rf"{name}=([\d_]+)", source)[1])
        for name in ("training_tokens", "schedule_steps")
    )
    assert abs(tokens / batch.default - steps) < 0.02 * steps


def test_python_example_loads(monkeypatch, tmp_path):
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
    exec(blocks("python")[1], scope)
    x = torch.randn(4, 8)
    assert torch.equal(scope["sae"](x), sae.eval()(x))
    assert scope["importance"].shape == (24,)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_error_shown_is_the_error_given(synthetic_yaml):
    (shown,) = blocks("text")
    arguments = ["train", str(synthetic_yaml), "--set", "sae.mask_rat=1"]
    assert CliRunner().invoke(app, arguments).stderr == shown
