import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig, eval_sae_on_synthetic_data
from sae_lens.util import temporary_seed

from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model
from sae_lens_atm.evaluation import synthetic
from sae_lens_atm.evaluation.synthetic import (
    code_figure,
    decoder_of_activations,
    evaluate,
    evaluate_closely,
    is_signed,
)
from sae_lens_atm.metrics import (
    HierarchyScore,
    NthDecoderProjection,
    decoder_cosine,
    description_length,
    saved_bits,
)
from tests.helpers import make_sae, train

SAMPLES, BATCH = 700, 256


@pytest.fixture(scope="module")
def model():
    return build_hierarchy_model(
        HierarchyModelConfig(hidden_dim=8, roots=3, lone_features=2, depth=1)
    )


@pytest.fixture
def sae(model):
    return train(make_sae(), 20, data=lambda _: model.sample(64)).eval()


def test_samples_are_drawn_and_encoded_once(model, sae, monkeypatch):
    drawn, encoded = [], []
    sample, encode = type(model.activation_generator).sample, type(sae).encode
    monkeypatch.setattr(
        type(model.activation_generator),
        "sample",
        lambda self, n: drawn.append(n) or sample(self, n),
    )
    monkeypatch.setattr(
        type(sae), "encode", lambda self, x: encoded.append(len(x)) or encode(self, x)
    )
    evaluate(sae, model, SAMPLES, 0, BATCH)
    assert drawn == [256, 256, 188]
    assert encoded == [256, 256, 256, 188]  # the first is noise, see `is_signed`


def test_figures_are_those_of_saelens(model, sae):
    figures = evaluate(sae, model, SAMPLES, 5, BATCH)
    with temporary_seed(5):
        theirs = eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, SAMPLES, BATCH
        )
    expected = {
        "l0": theirs.sae_l0,
        "true_l0": theirs.true_l0,
        "explained_variance": theirs.explained_variance,
        "mcc": theirs.mcc,
        "uniqueness": theirs.uniqueness,
        "shrinkage": theirs.shrinkage,
        "dead_latents": theirs.dead_latents,
        "f1": theirs.classification.f1_score,
        "precision": theirs.classification.precision,
        "recall": theirs.classification.recall,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_errors_by_hand(model, sae):
    figures = evaluate(sae, model, SAMPLES, 5, SAMPLES)
    with temporary_seed(5), torch.no_grad():
        x, _ = model.sample_with_features(SAMPLES)
        x_hat = sae(x)
    assert figures["mse"] == pytest.approx((x - x_hat).square().sum(-1).mean().item(), rel=1e-5)
    cosine = torch.cosine_similarity(x, x_hat, dim=-1).mean().item()
    assert figures["cosine"] == pytest.approx(cosine, rel=1e-5)


def test_figures_of_the_decoder(model, sae):
    result = evaluate_closely(sae, model, SAMPLES, 5, BATCH)
    with temporary_seed(5), torch.no_grad():
        x, _ = model.sample_with_features(BATCH)
    projection = NthDecoderProjection(sae.W_dec, sae.b_dec)
    projection.update(x)
    assert result.figures["decoder_projection"] == projection.compute(result.alive)
    assert result.figures["decoder_cosine"] == decoder_cosine(sae.W_dec, result.alive)
    bits = description_length(sae.encode(x), x, sae.decode)
    assert result.figures["description_length"] == pytest.approx(bits)
    assert result.figures["saved_bits"] == pytest.approx(
        saved_bits(x, sae.encode(x), decoder_of_activations(sae), sae.b_dec), rel=1e-5
    )


def test_the_hierarchy_score_is_that_of_all_batches(model, sae, monkeypatch):
    assert "hierarchy_score" not in evaluate(sae, model, SAMPLES, 5, BATCH)
    monkeypatch.setattr(synthetic, "FEWEST_SAMPLES", SAMPLES)
    figures = evaluate(sae, model, SAMPLES, 5, BATCH)
    score = HierarchyScore(sae.W_dec)
    with temporary_seed(5), torch.no_grad():
        for samples in (256, 256, 188):
            x, _ = model.sample_with_features(samples)
            score.update(x, sae.encode(x))
    assert score.pairs()
    assert figures["hierarchy_score"] == score.compute()


def test_the_description_length_of_an_sae_that_normalises_its_input():
    cfg = {
        "architecture": "standard",
        "d_in": 8,
        "d_sae": 16,
        "normalize_activations": "layer_norm",
    }
    one = SAE.from_dict(cfg)
    x = torch.randn(100, 8)
    assert code_figure(one, x) > 0


def test_only_the_seed_matters(model, sae):
    before = torch.get_rng_state()
    a, b, c = (evaluate(sae, model, SAMPLES, seed, BATCH) for seed in (1, 1, 2))
    assert a == b
    assert a["mse"] != c["mse"]
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_and_parents(model, sae):
    result = evaluate_closely(sae, model, SAMPLES, 0, BATCH)
    assert int((~result.alive).sum()) == result.figures["dead_latents"]
    assert result.figures["evaluated_samples"] == SAMPLES
    assert len(result.parent_probability) == 3
    assert all(0 < probability < 1 for probability in result.parent_probability)
    assert result.figures["absorption_full"] == result.absorption.full
    assert not result.signed


def test_a_model_without_hierarchy_has_no_absorption(sae):
    flat = SyntheticModel(SyntheticModelConfig(num_features=10, hidden_dim=8))
    result = evaluate_closely(sae, flat, 100, 0)
    assert result.absorption is None
    assert result.parent_probability == []
    assert "absorption_full" not in result.figures


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model, training):
    sae = train(make_sae(), 5).train(training)
    evaluate(sae, model, 100, 0)
    assert sae.training == training


@pytest.mark.parametrize("rescale", [True, False])
def test_the_saved_sae_has_the_same_figures(model, tmp_path, rescale):
    """Absorption, too, where the saved decoder has rows of unit length."""
    sae = make_sae(rescale_acts_by_decoder_norm=rescale)
    train(sae, 20, data=lambda _: model.sample(64)).eval()
    sae.save_inference_model(tmp_path)
    saved = evaluate(SAE.load_from_disk(tmp_path), model, SAMPLES, 0)
    assert saved == pytest.approx(evaluate(sae, model, SAMPLES, 0), rel=1e-5)


@pytest.mark.parametrize("architecture", ["atm", "batchtopk", "topk"])
def test_the_decoder_of_the_activations_reconstructs(model, architecture):
    sae = TrainingSAE.from_dict({"architecture": architecture, "d_in": 8, "d_sae": 24, "k": 3})
    sae = train(sae, 5, data=lambda _: model.sample(64)).eval()
    with torch.no_grad():
        acts = sae.encode(model.sample(10)).to_dense()
        expected = acts @ decoder_of_activations(sae) + sae.b_dec
        torch.testing.assert_close(sae.decode(acts), expected)


def test_signed_activations():
    assert not is_signed(make_sae().eval())
    abs_topk = {"architecture": "abstopk", "d_in": 8, "d_sae": 24, "k": 3}
    assert is_signed(TrainingSAE.from_dict(abs_topk).eval())
