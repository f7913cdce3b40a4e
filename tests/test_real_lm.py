"""A real model, SmolLM2-135M, of which three layers are kept: from the cache to SAEBench.

The weights come from a Python package. Without it, or without `gguf` and `accelerate`, these tests
are skipped.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, JumpReLUSAE, SAETransformerBridge

from sae_lens_atm.data.spelling.text import docstrings
from sae_lens_atm.errors import SAEBenchError
from sae_lens_atm.saebench import environment
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.cli.command import run
from tests.helpers import load_script, state_equal
from tests.training.runs import stopped_after

CONTEXT, TOKENS = 64, 8192
SETTINGS = f"""
runner: language_model
model_class_name: AutoModelForCausalLM
hook_name: model.layers.1
is_dataset_tokenized: false
streaming: false
context_size: {CONTEXT}
exclude_special_tokens: true
activations: {{cache: cached, tokens: {TOKENS}}}
training_tokens: {16 * TOKENS}
train_batch_size_tokens: 512
store_batch_size_prompts: 8
n_batches_in_buffer: 64
n_eval_batches: 2
lr: 3e-3
lr_warm_up_steps: 5
lr_decay_steps: 10
seed: 0
sae: {{architecture: atm, d_in: 576, d_sae: 1024, k: 16, mask_warm_up_steps: 10,
       normalize_activations: expected_average_only_in}}
output_path: out
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        load_script("benchmarks/real_lm.py").make_model("smollm2-135m", folder, layers=3)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package of the model cannot be had: {error}")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    """A folder with text, and a run file for it."""
    folder = tmp_path_factory.mktemp("real")
    text = [text for text in docstrings() if len(text) > 200][:400]
    Dataset.from_dict({"text": text}).save_to_disk(folder / "text")
    more = f"model_name: {model_folder}\ndataset_path: {folder / 'text'}\n"
    (folder / "run.yaml").write_text(SETTINGS + more)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def trained(place):
    """Cached by the command, stopped in the middle, resumed by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cached = run("cache", "run.yaml")
        assert cached.exit_code == 0, cached.output
        assert "128 of 128 contexts" in cached.output
        stopped_after(100, load_run("run.yaml"))
        resumed = run("train", "run.yaml", "--resume", "out")
        assert resumed.exit_code == 0, resumed.output
        assert "ce_loss_score" in resumed.output
    return place / "out"


@pytest.mark.usefixtures("here")
def test_a_resumed_run_equals_a_straight_one(trained):
    train(load_run("run.yaml", ["output_path=straight"]))
    first, second = (SAE.load_from_disk(folder).state_dict() for folder in (trained, "straight"))
    assert state_equal(first, second)


@pytest.mark.usefixtures("here")
def test_the_sae_explains_the_model(trained):
    found = run("evaluate", trained, "--on", "run.yaml", "--json", "figures.json")
    assert found.exit_code == 0, found.output
    (figures,) = json.loads(Path("figures.json").read_text()).values()
    assert 0.5 < figures["explained_variance"] < 1
    assert figures["ce_loss_score"] > 0.5
    assert figures["l0"] == pytest.approx(16, rel=0.3)


def test_saelens_loads_it_and_splices_it_into_the_model(trained, model_folder):
    sae = SAE.load_from_disk(trained)
    assert type(sae) is JumpReLUSAE
    model = SAETransformerBridge.boot_transformers(str(model_folder), device="cpu")
    sae.cfg.metadata.hook_name = "blocks.1.hook_out"
    tokens = model.to_tokens("The quick brown fox jumps over the lazy dog.")
    plain = model(tokens)
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, plain, atol=1e-3, rtol=1e-3)
    spliced = model.run_with_saes(tokens, saes=[sae], use_error_term=False)
    assert not torch.allclose(spliced, plain, atol=1e-1)


@pytest.mark.usefixtures("here")
def test_core_of_saebench(trained):
    try:
        environment.prepare(environment.default_folder())
    except SAEBenchError as error:
        pytest.skip(f"SAEBench cannot be had: {error}")
    result = run(
        *("saebench", trained, "--evals", "core", "--quick"),
        *("--dataset", "text", "--json", "saebench.json"),
    )
    assert result.exit_code == 0, result.output
    assert "explained_variance" in Path("saebench.json").read_text()
