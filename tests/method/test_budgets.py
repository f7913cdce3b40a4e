import pytest
import torch

from sae_lens_atm.method.budgets import (
    ranks,
    smaller_budgets,
    sparse_errors,
)
from sae_lens_atm.method.selection import largest_of_each
from sae_lens_atm.method.sparse import Pattern
from tests.helpers import make_sae, step_input
from tests.method.brute_force import batchtopk, sae_of_uneven_rows


@pytest.mark.parametrize(
    ("k", "budgets"), [(64, [8, 16, 32]), (4, [1, 2]), (2.5, [1]), (1, []), (12, [2, 3, 6])]
)
def test_budgets_below_k(k, budgets):
    assert smaller_budgets(k) == budgets  # halves are rounded to even numbers, as Python does


def test_ranks_by_hand():
    rows, columns = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 3, 1, 2])
    values = torch.tensor([1.0, 5.0, 3.0, 2.0, 7.0])
    assert ranks(values, Pattern(rows, columns, (3, 4))).tolist() == [2, 0, 1, 1, 0]
    assert ranks(values[:0], Pattern(rows[:0], columns[:0], (3, 4))).tolist() == []


def test_sparse_errors_and_their_gradients_are_those_of_dense_products():
    mask = torch.rand(20, 12) < 0.4
    pattern = Pattern(*mask.nonzero(as_tuple=True), (20, 12))
    x = torch.randn(20, 5, dtype=torch.float64)
    leaves = [
        torch.rand(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((int(mask.sum()),), (12, 5), (5,))
    ]
    values, rows, bias = leaves
    acts = torch.zeros(20, 12, dtype=torch.float64).masked_scatter(mask, values)
    budgets = [1, 2, 4]
    expected = [
        (x - part @ rows - bias).square().sum(1).mean() for part in largest_of_each(acts, budgets)
    ]
    found = sparse_errors(x, values, rows, bias, pattern, values.detach(), budgets)
    torch.testing.assert_close(found, expected)
    weights = (1.0, 2.0, 3.0)
    gradients = [
        torch.autograd.grad(sum(w * e for w, e in zip(weights, errors, strict=True)), leaves)
        for errors in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rescaled", [True, False])
def test_the_loss_in_training_is_its_formula(rescaled):
    x, gradients = torch.randn(64, 8, dtype=torch.float64), []
    for kernels in ("auto", "dense"):
        sae = sae_of_uneven_rows(64, 4, rescaled, kernels, budget_weight=0.5)
        assert sae.uses_sparse_kernels(x) == (kernels == "auto")
        loss = sae.training_forward_pass(step_input(x)).losses["budget_loss"]
        acts, lengths = batchtopk(sae, x)
        decoder = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True) * lengths[:, None]

        def error(number, acts=acts, sae=sae, decoder=decoder):
            cut = acts.sort(descending=True).values[:, number - 1 : number]
            decoded = (acts * (acts >= cut)) @ decoder + sae.b_dec
            return (x - decoded).square().sum(1).mean()

        whole = error(64)
        expected = 0.5 * ((error(1) + error(2) + whole) / 3 - whole)
        torch.testing.assert_close(loss, expected)
        parameters = (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
        gradients.append(torch.autograd.grad(loss, parameters))
        torch.testing.assert_close(gradients[-1], torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("k", [0.9, 1])
def test_without_a_smaller_budget_the_loss_is_zero(kernels, k):
    sae = make_sae(k=k, kernels=kernels, budget_weight=0.5)
    output = sae.training_forward_pass(step_input(torch.randn(64, 8)))
    assert output.losses["budget_loss"] == 0


def test_masks_give_the_loss_the_weight_of_the_full_pass():
    """Otherwise the full error, which the loss subtracts, would have a negative weight."""
    for weight in (0.25, 1.0):
        sae = make_sae(
            k=4, mask_warm_up_steps=0, masked_weight=weight, budget_weight=1.0, parent_weight=0.0
        )
        sae.training_forward_pass(step_input(torch.randn(64, 8)))
        output = sae.training_forward_pass(step_input(torch.randn(64, 8), step=1))
        losses = output.losses
        assert losses["budget_loss"] > 0
        full = losses["mse_loss"] + losses["budget_loss"]
        expected = (1 - weight) * full + weight * losses["masked_mse_loss"]
        torch.testing.assert_close(output.loss, expected)


def test_the_loss_ends_at_its_step():
    for end, last in ((0.6, 5), (1.0, 9)):
        sae = make_sae(k=4, schedule_steps=10, budget_weight=0.5, budget_end=end)
        for step in range(10):
            losses = sae.training_forward_pass(step_input(torch.randn(64, 8), step=step)).losses
            assert ("budget_loss" in losses) == (step <= last), step


def test_relu_has_no_budgets():
    with pytest.raises(ValueError, match="budget_weight must be 0 with activation='relu'"):
        make_sae(activation="relu", budget_weight=0.5)
