import math

import pytest
import torch
from sae_lens import TrainingSAE

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.evaluate_saved import data_of, evaluate_saved
from sae_lens_atm.compare.plan.any_file import runs_in
from sae_lens_atm.compare.run.batch_pool import batch_seed, synthetic_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.training.cached_run import cache_activations
from tests.helpers import make_sae


def test_saved_saes_are_evaluated_as_a_comparison_does(comparison_yaml, tmp_path):
    torch.manual_seed(0)
    saes = {str(tmp_path / name): make_sae(d_in=16, d_sae=32) for name in ("a", "b")}
    for folder, sae in saes.items():
        sae.save_inference_model(folder)
    run = load_comparison(comparison_yaml).planned[0].run
    model = synthetic_model(run, tmp_path)
    figures = evaluate_saved(list(saes), data_of(str(comparison_yaml)))
    assert figures.keys() == saes.keys()
    for folder, found in figures.items():
        measured = found.figures
        sae = TrainingSAE.load_from_disk(folder)
        expected = evaluate(sae, model, 500, batch_seed(0, -2), 64)
        assert measured.keys() == expected.keys()
        for name, value in measured.items():
            assert value == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name
    first, second = figures.values()
    assert first.figures["mse"] != second.figures["mse"]
    assert not math.isnan(first.figures["mcc"])
    assert first.as_json() == first.figures


def test_a_saved_sae_on_a_language_model(language_model_comparison_yaml, tmp_path):
    data = data_of(str(language_model_comparison_yaml), ["seeds=[0]"])
    TrainingSAE.from_dict(data.run.runner.sae.to_dict()).save_inference_model(tmp_path / "sae")
    found = evaluate_saved([str(tmp_path / "sae")], data)[str(tmp_path / "sae")]
    assert {"l0", "ce_loss_score", "explained_variance"} <= found.figures.keys()
    assert not found.intervals


def test_a_complete_cache_gives_the_tokens_and_more_activations(
    language_model_comparison_yaml, tmp_path
):
    path = str(language_model_comparison_yaml)
    data = data_of(path, ["seeds=[0]"])
    TrainingSAE.from_dict(data.run.runner.sae.to_dict()).save_inference_model(tmp_path / "sae")
    cached = data_of(path, ["seeds=[0]", "activations={cache: cached, dtype: float32}"])
    without, incomplete = (
        evaluate_saved([str(tmp_path / "sae")], each)[str(tmp_path / "sae")].figures
        for each in (data, cached)
    )
    assert incomplete == pytest.approx(without, nan_ok=True)
    cache_activations(cached.run, lambda _done, _all: None)
    figures = evaluate_saved([str(tmp_path / "sae")], cached)[str(tmp_path / "sae")].figures
    assert figures["dead_window"] > figures["evaluated_samples"]
    for name in without.keys() - {"dead_latents", "dead_window"}:
        assert figures[name] == pytest.approx(without[name], rel=1e-4, nan_ok=True), name


def test_an_sae_of_another_width_is_an_error(synthetic_yaml, tmp_path):
    make_sae(d_in=8).save_model(tmp_path / "narrow")
    with pytest.raises(SettingsError, match=r"d_in of .*narrow must be 16, as in the file, got 8"):
        evaluate_saved([str(tmp_path / "narrow")], data_of(str(synthetic_yaml)))


def test_data_of_a_comparison_of_trees_whose_l0_is_to_be_found(comparison_yaml):
    trees = "architectures={tree_sae: {sae: {tree_widths: [8, 24]}}}"
    assert data_of(str(comparison_yaml), [trees, "l0=found"]).run.runner.sae.d_sae == 32
    assert runs_in(str(comparison_yaml), [trees, "l0=found"])


def test_no_samples_are_refused(synthetic_yaml, tmp_path):
    make_sae(d_in=16, d_sae=32).save_inference_model(tmp_path / "sae")
    with pytest.raises(SettingsError, match=r"^eval_samples must be more than 0, got 0"):
        evaluate_saved([str(tmp_path / "sae")], data_of(str(synthetic_yaml), ["eval_samples=0"]))


def test_a_run_file_whose_k_is_still_to_be_found(synthetic_yaml):
    run = data_of(str(synthetic_yaml), ["sae.k=found"]).run
    assert run.runner.sae.d_in == 16
    (run,) = runs_in(str(synthetic_yaml), ["sae.k=found"])
    assert run.runner.output_path == "out"


def test_the_data_of_a_run_file_with_a_sweep(synthetic_yaml):
    more = "sweep: {over: {lr: [0.01]}}\nl0: [3]\n"
    synthetic_yaml.write_text(synthetic_yaml.read_text() + more)
    run = data_of(str(synthetic_yaml)).run
    assert (run.seed, run.runner.sae.k) == (3, 3)
