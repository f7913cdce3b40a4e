import pytest
import torch
from sae_lens import SAE, TrainingSAE

from sae_lens_atm.baselines.kronsae import KronTrainingSAEConfig, mand, pair_sums
from tests.helpers import step_input, train


def make(**fields):
    return TrainingSAE.from_dict(
        KronTrainingSAEConfig(**{"d_in": 8, "d_sae": 48, "k": 3, **fields}).to_dict()
    )


def test_one_head_by_hand():
    u, v = [4.0, -1.0], [9.0, 1.0, -2.0]
    expected = [6.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert mand(torch.tensor([*u, *v]), 2, 3).tolist() == expected


def test_products_do_not_overflow_in_float16():
    for value in (300, 1e-4):
        pre = torch.tensor([value, value], dtype=torch.float16)
        assert mand(pre, 1, 1).item() == pytest.approx(value, rel=2e-3)


def test_it_is_the_root_of_the_kronecker_product_of_each_head():
    h, m, n = 5, 2, 3
    pre = torch.randn(h * (m + n), dtype=torch.float64, requires_grad=True)
    heads = pre.relu().view(h, m + n)
    expected = torch.cat([torch.kron(head[:m], head[m:]) for head in heads]).sqrt()
    found = mand(pre, m, n)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), pre)
    assert gradient.isfinite().all()
    assert gradient[pre <= 0].abs().sum() == 0


def test_both_pre_activations_must_be_positive():
    pre = torch.randn(100, 4 * 6)
    heads = pre.view(100, 4, 6)
    both = (heads[..., :2, None] > 0) & (heads[..., None, 2:] > 0)
    assert torch.equal(mand(pre, 2, 4) > 0, both.flatten(1))


def test_rows_begin_as_sums_of_pairs():
    sae = make()
    assert sae.W_enc.shape == (8, 6 * (2 + 4))
    first = sae.W_enc[:, 0] + sae.W_enc[:, 2]
    torch.testing.assert_close(sae.W_dec[0], first / first.norm())
    last = sae.W_enc[:, -5] + sae.W_enc[:, -1]
    torch.testing.assert_close(sae.W_dec[-1], last / last.norm())
    torch.testing.assert_close(pair_sums(sae.W_enc, 2, 4)[5], sae.W_enc[:, 1] + sae.W_enc[:, 3])


def test_the_norm_of_decoder_rows_has_no_effect():
    sae, x = make(), torch.randn(64, 8)
    before = sae(x)
    sae.W_dec.data *= torch.rand(48, 1) + 0.5
    torch.testing.assert_close(sae(x), before)


def test_with_one_row_of_q_the_encoder_is_that_of_another_sae():
    """The toy case: m = n = 1 and Q = P is TopK's encoder."""
    sae = make(kron_m=1, kron_n=1)
    sae.W_enc.data[:, 1::2] = sae.W_enc.data[:, ::2]
    x = torch.randn(64, 8)
    pre = (x @ sae.W_enc[:, ::2]).relu()
    torch.testing.assert_close(sae.encode_with_hidden_pre(x)[1], pre)


def test_folding_the_scale_of_the_input_keeps_the_output(tmp_path):
    torch.manual_seed(0)
    sae = train(make(normalize_activations="expected_average_only_in"), 20).eval()
    sae.b_dec.data += 0.3
    x = torch.randn(64, 8)
    expected = sae(x * 2.5) / 2.5
    sae.fold_activation_norm_scaling_factor(2.5)
    torch.testing.assert_close(sae(x), expected)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    torch.testing.assert_close(loaded(x), expected)


def test_dead_latents_get_a_gradient():
    sae = make()
    dead = torch.zeros(48, dtype=torch.bool)
    dead[7] = True
    output = sae.training_forward_pass(step_input(torch.randn(64, 8), dead))
    output.losses["auxiliary_reconstruction_loss"].backward()
    assert sae.W_dec.grad[7].abs().sum() > 0


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 4)])
def test_the_latents_are_those_of_all_heads(m, n):
    assert make(kron_m=m, kron_n=n).encode(torch.randn(5, 8)).shape == (5, 48)
