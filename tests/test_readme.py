"""The README's code runs, with tiny local models where a reader would download one."""

import re
import shlex
from pathlib import Path

import sae_lens
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.loading import pretrained_sae_loaders
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.compare import read_results
from sae_lens_atm.compare.report.tables import markdown
from tests.conftest import CONTEXT
from tests.helpers import make_sae, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_block_is_of_a_kind_that_is_tested():
    assert set(re.findall(r"```(\w+)\n", README)) == {"bash", "python", "text"}
    assert len(blocks("python")) == 4


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
    _, _, from_hub, from_checkpoint = blocks("python")
    exec(from_hub, scope)
    x = torch.randn(4, 8)
    assert torch.equal(scope["sae"](x), sae.eval()(x))
    exec(from_checkpoint, scope)
    assert "values=" in capsys.readouterr().out


def test_python_example_measures(capsys):
    """With an SAE of three latents that detects a parent and its two children ideally."""

    class Ideal:
        W_dec = torch.eye(3, 4)

        def encode(self, x):
            return x[:, :3]

    features = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    scope = {
        "sae": Ideal(),
        "feature_vectors": torch.eye(3, 4),
        "x": torch.nn.functional.pad(features, (0, 1)),
        "true_features": features,
        "decoders_of_other_seeds": [torch.eye(3, 4), torch.eye(3, 4)[[2, 0, 1]]],
    }
    exec(blocks("python")[1], scope)
    assert capsys.readouterr().out.split() == ["0.0", "1.0"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def command_lines():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sae-lens-atm")]


def test_train_command_lines_run(language_model_yaml):
    """On the tiny Gemma-2: `train NAME` gets its run file, everything else is as written."""
    commands = [words for words in command_lines() if words[0] in ("train", "inspect")]
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


def test_compare_command_lines_run(comparison_yaml, tmp_path):
    """On the small comparison, in the folders of the real one."""
    others = ("train", "inspect", "push", "make-lm", "sweep")
    commands = [
        words
        for words in command_lines()
        if words[0] not in others and "compare-spelling-lm" not in words
    ]
    assert [words[0] for words in commands] == ["compare", "compare", "report", "evaluate"]
    text = comparison_yaml.read_text().replace("output_path: out\n", "")
    (tmp_path / "compare-sister-a.yaml").write_text(text)
    make_sae(d_in=16).save_model(tmp_path / "my-sae")
    for command in commands:
        arguments = [f"{w}.yaml" if w == "compare-sister-a" else w for w in command]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output


def test_language_model_command_lines_run(tmp_path):
    """The comparison is planned, the model a small one."""
    lines = command_lines()
    (compared,) = [words for words in lines if "compare-spelling-lm" in words]
    result = CliRunner().invoke(app, [*compared, "--dry-run"])
    assert result.exit_code == 0, result.output
    (made,) = [words for words in lines if words[0] == "make-lm"]
    small = ["steps=2", "d_model=8", "heads=2", "words_per_letter=6", "dataset_rows=8"]
    settings = [part for setting in small for part in ("--set", setting)]
    result = CliRunner().invoke(app, [*made, *settings])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "my-lm" / "model.safetensors").exists()


def test_sweep_command_lines_are_planned(tmp_path):
    drawn, on_ray, as_wandbs = (words for words in command_lines() if words[0] == "sweep")
    for command in (drawn, on_ray):
        result = CliRunner().invoke(app, [*command, "--set", "training_samples=4096", "--dry-run"])
        assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, as_wandbs).exit_code == 0
    assert {path.name for path in (tmp_path / "my-sweep").iterdir()} == {"run.yaml", "sweep.yaml"}


def test_push_command_line_runs(tmp_path):
    train(make_sae(), 5).save_inference_model(tmp_path / "my-sae")
    (command,) = [words for words in command_lines() if words[0] == "push"]
    result = CliRunner().invoke(app, [*command, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert 'SAE.from_pretrained("you/your-saes", "layer_12")' in result.output


def test_the_error_shown_is_the_error_given(synthetic_yaml):
    (shown,) = blocks("text")
    arguments = ["train", str(synthetic_yaml), "--set", "sae.schedul=dual"]
    assert CliRunner().invoke(app, arguments).stderr == shown


def test_tables_are_those_of_the_committed_results():
    """Whole, as `report` writes them."""
    pages = {"README.md": ["demo"], "docs/results.md": ["sister-a", "sister-b"]}
    for page, names in pages.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in names:
            results = read_results(ROOT / f"docs/{name}/results.json")
            assert results.failed == {}
            assert not results.quick
            for table in markdown(results).split("\n\n"):
                assert table.strip() in text, (page, name)


def test_what_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", results):
        assert (ROOT / "docs" / target).exists(), target
