"""The export is compared with values worked out from dense activations."""

import json

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.explore.latents import describe_latents
from sae_lens_atm.explore.neuronpedia import (
    LogitHistograms,
    Source,
    check_export,
    layer_of,
    write_neuronpedia,
)
from sae_lens_atm.explore.promoted import Promoted
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.cli.command import run as run_command
from tests.explore.sample import reading_of

CONTEXTS, SIZE, D_SAE = 30, 10, 140
KEYS = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values"),
    *("neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_l1"),
    *("correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1"),
    *("correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values"),
    *("frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total"),
    *("n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector"),
}
"""The names in a feature of SAEDashboard 0.8.0."""


@pytest.fixture
def acts():
    random = np.random.default_rng(0)
    acts = random.random((CONTEXTS * SIZE, D_SAE)) * (random.random((1, D_SAE)) + 0.5)
    acts[random.random(acts.shape) > 0.3] = 0
    acts[:, 3] = 0
    acts[:, 5] = 0
    acts[17, 5] = 2.0
    return acts.astype(np.float32)


def export(acts, folder, promoted=True, on_phase=lambda _: None):
    reading = reading_of(acts, torch.eye(D_SAE) - 0.1)
    ids = np.arange(CONTEXTS * SIZE, dtype=np.int32).reshape(CONTEXTS, SIZE)
    latents = describe_latents(reading, csr_matrix((1, len(acts)), dtype=np.float32), (1, 1, 1))
    tokens = np.tile(np.arange(8, dtype=np.uint32), (D_SAE, 1))
    logits = np.tile(np.linspace(2, 1, 8, dtype=np.float32), (D_SAE, 1))
    shown = Promoted(tokens, logits, tokens + 8, -logits) if promoted else None
    histograms = LogitHistograms()
    histograms.add(torch.linspace(0, 1, 101).expand(D_SAE, 101))
    texts = {token: f" t{token}" for token in ids.ravel().tolist()}
    source = Source("my-sae", "my-model", "blocks.3.hook_resid_post", "my-text")
    write_neuronpedia(folder, source, reading, latents, shown, histograms, ids, texts, on_phase)
    batches = [json.loads((folder / f"batch-{n}.json").read_text()) for n in range(2)]
    return {f["feature_index"]: f for b in batches for f in b["features"]}, batches


def test_latents_in_files_of_128_and_those_that_never_fire(acts, tmp_path):
    features, batches = export(acts, tmp_path / "out")
    assert [len(batch["features"]) for batch in batches] == [128, D_SAE - 1 - 128]
    assert sorted(features) == [j for j in range(D_SAE) if j != 3]
    assert {name: batches[1][name] for name in ("model_id", "layer", "sae_set")} == {
        "model_id": "my-model",
        "layer": 3,
        "sae_set": "my-sae",
    }
    skipped = json.loads((tmp_path / "out/skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [3]
    assert not (tmp_path / "out/batch-2.json").exists()


def test_the_figures_of_a_latent(acts, tmp_path):
    feature = export(acts, tmp_path)[0][7]
    assert set(feature) == KEYS
    fires = acts[:, 7][acts[:, 7] > 0]
    assert feature["frac_nonzero"] == pytest.approx(len(fires) / len(acts))
    heights = np.histogram(fires, 20, (0, fires.max()))[0]
    assert feature["freq_hist_data_bar_heights"] == heights.tolist()
    middles = feature["freq_hist_data_bar_values"]
    assert middles[0] == pytest.approx(fires.max() / 40, abs=1e-3)
    assert middles[-1] == pytest.approx(fires.max() * 39 / 40, abs=1e-3)
    # Row 7 is 0.9 at 7 and -0.1 elsewhere: L1 norm 0.9 + 0.1 * 139.
    assert feature["neuron_alignment_indices"][0] == 7
    assert feature["neuron_alignment_values"][0] == 0.9
    assert feature["neuron_alignment_l1"][0] == pytest.approx(0.9 / 14.8, abs=1e-3)
    assert feature["pos_str"][:2] == [" t0", " t1"]
    assert feature["neg_values"][0] == -2
    assert sum(feature["logits_hist_data_bar_heights"]) == 101
    assert feature["logits_hist_data_bar_values"][:2] == [0.01, 0.03]
    assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (CONTEXTS, SIZE)


def test_contexts_hold_the_exact_activations(acts, tmp_path):
    feature = export(acts, tmp_path)[0][7]
    contexts = feature["activations"]
    column = acts[:, 7]
    assert len(contexts) == 20 + 5 * 5
    best = np.sort(column.reshape(CONTEXTS, SIZE).max(1))[::-1][:20]
    for context, most in zip(contexts, best, strict=False):
        assert context["values"][context["qualifying_token_index"]] == pytest.approx(most, abs=1e-3)
        assert context["bin_min"] == context["bin_contains"] == -1
        assert context["bin_max"] == pytest.approx(column.max(), abs=1e-3)
    fifths = [(part[0], part[-1]) for part in np.array_split(np.sort(column[column > 0]), 5)]
    for place, context in enumerate(contexts):
        first = int(context["tokens"][0].removeprefix(" t"))
        assert context["tokens"] == [f" t{first + i}" for i in range(SIZE)]  # a whole context
        assert context["values"] == pytest.approx(column[first : first + SIZE].tolist(), abs=6e-4)
        if place < 20:
            continue
        low, high = fifths[(place - 20) // 5]
        value = context["values"][context["qualifying_token_index"]]
        assert (context["bin_min"], context["bin_max"]) == pytest.approx((low, high), abs=1e-3)
        assert low - 1e-3 <= value <= high + 1e-3
        assert context["bin_contains"] == 0.2


def test_a_latent_that_fires_once(acts, tmp_path):
    (context,) = export(acts, tmp_path)[0][5]["activations"]
    assert context["values"] == [0, 0, 0, 0, 0, 0, 0, 2, 0, 0]
    assert context["qualifying_token_index"] == 7


def test_an_export_that_ends_early_leaves_no_folder(acts, tmp_path):
    def stop(phase):
        if phase.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(acts, tmp_path / "out", on_phase=stop)
    assert not (tmp_path / "out").exists()
    assert len(export(acts, tmp_path / "out")[0]) == D_SAE - 1  # the parts are replaced
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_promoted_tokens(acts, tmp_path):
    feature = export(acts, tmp_path, promoted=False)[0][7]
    assert set(feature) == KEYS
    assert feature["pos_str"] == feature["logits_hist_data_bar_heights"] == []


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [("blocks.11.hook_mlp_out", 11), ("model.layers.7", 7), ("hook_embed", 0)],
)
def test_the_layer_of_a_hook(hook_name, layer):
    assert layer_of(hook_name) == layer


def test_what_is_refused(language_model_yaml, synthetic_yaml, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(SettingsError, match=r"must be a new or an empty folder, got .*full"):
        check_export(tmp_path / "full", load_run(language_model_yaml))
    with pytest.raises(SettingsError, match="the data is synthetic"):
        check_export(tmp_path / "new", load_run(synthetic_yaml))


def test_the_command(language_model_yaml, tmp_path):
    train(load_run(language_model_yaml))
    options = ("--on", language_model_yaml, "--tokens", 320, "--neuronpedia", "np")
    result = run_command("explore", "out", *options)
    assert result.exit_code == 0, result.output
    assert "wrote np, in the format of SAEDashboard" in result.output
    batch = json.loads((tmp_path / "np/batch-0.json").read_text())
    assert (batch["layer"], batch["sae_set"]) == (1, "out")
    for feature in batch["features"]:
        assert len(feature["pos_str"]) == 8
        assert max(max(c["values"]) for c in feature["activations"]) > 0
    result = run_command("explore", "out", *options)
    assert result.exit_code == 2
    assert "--neuronpedia must be a new or an empty folder" in result.output
