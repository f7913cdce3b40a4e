import pytest
import torch

from sae_lens_atm.sae.forward_pass import mean_l0, restricted_to
from tests.helpers import ACTIVATIONS, make_sae


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_restricted_sae_is_whole_again_afterwards(activation):
    sae = make_sae(activation=activation)
    before = {name: p.data_ptr() for name, p in sae.named_parameters()}
    rows = sae.W_dec[[1, 5]]
    with restricted_to(sae, torch.tensor([1, 5])):
        assert sae.W_enc.shape == (8, 2)
        assert torch.equal(sae.W_dec, rows)
    with pytest.raises(IndexError), restricted_to(sae, torch.tensor([1])):
        sae.W_dec[5]
    assert {name: p.data_ptr() for name, p in sae.named_parameters()} == before
    assert sae.W_enc is sae.get_parameter("W_enc")


def test_latents_outside_the_restriction_get_zero_gradient():
    sae = make_sae()
    with restricted_to(sae, torch.tensor([3])):
        sae.W_dec.square().sum().backward()
    assert sae.W_dec.grad[3].any()
    assert sae.W_dec.grad.count_nonzero() == sae.W_dec.grad[3].count_nonzero()


def test_mean_l0_of_dense_and_sparse_activations():
    acts = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    assert mean_l0(acts) == mean_l0(acts.to_sparse()) == 1.5
