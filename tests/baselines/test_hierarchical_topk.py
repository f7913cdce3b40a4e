import pytest
import torch
from sae_lens import TopKTrainingSAEConfig, TrainingSAE

from sae_lens_atm.baselines.hierarchical_topk import (
    HierarchicalTopKTrainingSAEConfig,
    budget_errors,
)
from tests.helpers import step_input, train


def make(**fields):
    return TrainingSAE.from_dict(
        HierarchicalTopKTrainingSAEConfig(**{"d_in": 8, "d_sae": 30, "k": 3, **fields}).to_dict()
    )


def test_the_errors_of_a_sample_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    rows = torch.eye(2)
    # After the first latent the error is 3^2, after the second 1^2.
    values, chosen = torch.tensor([[4.0, 2.0]]), torch.tensor([[1, 0]])
    assert float(budget_errors(x, values, rows, chosen)) == 9 + 1


def test_errors_and_gradients_are_those_of_every_reconstruction():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    values = torch.rand(7, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(9)[:4] for _ in range(7)])
    parts = (values.unsqueeze(-1) * rows[chosen]).cumsum(1)
    expected = (x.unsqueeze(1) - parts).square().sum()
    torch.testing.assert_close(budget_errors(x, values, rows, chosen), expected)
    for found, wanted in zip(
        torch.autograd.grad(budget_errors(x, values, rows, chosen), (x, values, rows)),
        torch.autograd.grad(expected, (x, values, rows)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_loss_is_the_mean_error_of_saelens_topk_at_every_budget(rescale):
    torch.manual_seed(0)
    fields = {"rescale_acts_by_decoder_norm": rescale, "decoder_init_norm": None}
    sae = make(k=4, **fields)
    x = torch.randn(64, 8)
    found = sae.training_forward_pass(step_input(x)).losses["mse_loss"]
    errors = []
    for k in range(1, 5):
        cfg = TopKTrainingSAEConfig(d_in=8, d_sae=30, k=k, **fields)
        one = TrainingSAE.from_dict(cfg.to_dict())
        one.load_state_dict(sae.state_dict())
        errors.append(one.training_forward_pass(step_input(x)).losses["mse_loss"])
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_one_training_serves_every_budget():
    weights = []
    for k in (1, 3):
        torch.manual_seed(0)
        sae = train(make(k=k, max_k=5), 5)
        weights.append(sae.W_dec)
        sae.eval()
        assert (sae.encode(torch.randn(16, 8)) > 0).sum(1).max() <= k
        sae.train()
        assert (sae.encode(torch.randn(16, 8)) > 0).sum(1).max() > k
    assert torch.equal(*weights)


def test_a_new_sae_trains_all_budgets():
    sae = make(k=1, max_k=5)
    acts = sae.training_forward_pass(step_input(torch.randn(16, 8))).feature_acts
    assert (acts > 0).sum(1).max() > 1


def test_few_latents_reconstruct_better_than_those_of_topk():
    def data(step):
        generator = torch.Generator().manual_seed(step)
        active = torch.rand(256, 24, generator=generator) < 0.15
        size = 0.2 + torch.rand(256, 24, generator=generator)
        return (active * size) @ torch.randn(24, 8, generator=torch.Generator().manual_seed(99))

    errors = {}
    for name, cfg in {
        "hierarchical": HierarchicalTopKTrainingSAEConfig(d_in=8, d_sae=30, k=6),
        "topk": TopKTrainingSAEConfig(d_in=8, d_sae=30, k=6),
    }.items():
        torch.manual_seed(0)
        sae = train(TrainingSAE.from_dict(cfg.to_dict()), 300, data=data)
        sae.eval()
        sae.activation_fn.k = 1
        errors[name] = float((sae(data(999)) - data(999)).detach().square().sum(1).mean())
    assert errors["hierarchical"] < 0.9 * errors["topk"]
