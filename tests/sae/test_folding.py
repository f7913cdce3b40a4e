import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from tests.helpers import ACTIVATIONS, make_sae, train

pytestmark = pytest.mark.parametrize("activation", ACTIVATIONS)


def trained(activation, **fields):
    sae = make_sae(activation=activation, dtype="float64", **fields)
    sae.W_dec.data *= torch.rand(24, 1, dtype=torch.float64) * 3 + 0.2
    return train(sae, 40).eval()


def test_decoder_norm(activation):
    sae = trained(activation)
    x = torch.randn(200, 8, dtype=torch.float64)
    before, norm = sae(x), sae.W_dec.norm(dim=1)
    acts, scale = sae.encode(x), 1.0 if activation == "batchtopk" else norm
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones_like(norm))
    torch.testing.assert_close(sae(x), before)
    torch.testing.assert_close(sae.encode(x), acts * scale)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_activation_scaling_factor(activation, rescale, apply_b_dec):
    sae = trained(
        activation, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec
    )
    importance = sae.importance
    factor = 3.7
    raw = torch.randn(200, 8, dtype=torch.float64)
    before = sae(raw * factor) / factor
    sae.fold_activation_norm_scaling_factor(factor)
    torch.testing.assert_close(sae(raw), before)
    assert torch.equal(sae.importance, importance)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_whitening(activation, rescale, apply_b_dec):
    sae = trained(
        activation, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec
    )
    mixing = torch.randn(8, 8, dtype=torch.float64)
    raw = torch.randn(400, 8, dtype=torch.float64) @ mixing + 2
    scaler = ActivationScaler()
    scaler.estimate_whitening(8, iter(raw.split(100)), n_batches_for_norm_estimate=4)
    whitened = scaler.scale(raw)
    before, acts = scaler.unscale(sae(whitened)), sae.encode(whitened)
    whitening = scaler.whitening
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    torch.testing.assert_close(sae(raw), before)
    if activation == "batchtopk" and rescale:  # the decoder's norms are folded first
        torch.testing.assert_close(sae.encode(raw), acts)
