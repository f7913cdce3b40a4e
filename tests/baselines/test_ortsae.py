import math

import pytest
import torch
from sae_lens import TrainingSAE

from sae_lens_atm.baselines.ortsae import OrtSAETrainingSAEConfig, chunk_penalty, nearest_rows
from tests.helpers import step_input


def make(**fields):
    return TrainingSAE.from_dict(
        OrtSAETrainingSAEConfig(**{"d_in": 8, "d_sae": 30, "k": 3, **fields}).to_dict()
    )


def all_pairs(rows):
    """The formula, with all cosines."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    cosines = cosines.masked_fill(torch.eye(len(rows), dtype=torch.bool), -math.inf)
    return cosines.max(1).values.square().mean()


def test_the_penalty_of_four_directions():
    angles = torch.tensor([0.0, 60.0, 90.0, 240.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    # The largest cosines: cos 60, cos 30, cos 30, cos 240. The squares: 1/4, 3/4, 3/4, 1/4.
    assert float(chunk_penalty(rows)) == pytest.approx((1 / 4 + 3 / 4 + 3 / 4 + 1 / 4) / 4)


def test_orthogonal_rows_have_no_penalty():
    assert float(chunk_penalty(3 * torch.eye(5))) == 0


@pytest.mark.parametrize("count", [2, 3, 511, 512, 513, 1300])
def test_penalty_and_gradient_are_those_of_all_pairs(count):
    rows = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    expected, found = all_pairs(rows), chunk_penalty(rows)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(torch.autograd.grad(found, rows)[0], gradient)


def test_a_row_is_never_its_own_nearest():
    nearest = nearest_rows(torch.randn(700, 3))
    assert bool((nearest != torch.arange(700)).all())


def test_a_single_row_and_a_row_of_zeros_have_finite_penalties():
    assert float(chunk_penalty(torch.ones(1, 3))) == 0
    rows = torch.zeros(2, 3, requires_grad=True)
    chunk_penalty(rows).backward()
    assert rows.grad.isfinite().all()


def test_each_step_has_its_own_partition_into_equal_chunks():
    sae = make(ort_chunk_size=8)
    first = list(sae.chunks())
    assert [len(chunk) for chunk in first] == [8, 8, 7, 7]
    assert sorted(torch.cat(first).tolist()) == list(range(30))
    assert all(torch.equal(a, b) for a, b in zip(first, sae.chunks(), strict=True))
    sae.steps += 1
    assert not torch.equal(torch.cat(first), torch.cat(list(sae.chunks())))
    expected = torch.stack([all_pairs(sae.W_dec[chunk]) for chunk in sae.chunks()]).mean()
    torch.testing.assert_close(sae.orthogonality(), expected)


def test_the_loss_is_that_of_batchtopk_plus_the_penalty():
    torch.manual_seed(0)
    sae = make(ort_coefficient=0.5)
    x = torch.randn(64, 8) * 3 + 1
    output = sae.training_forward_pass(step_input(x))
    variance = x.var(0, correction=0).sum()
    expected = 0.5 * variance * all_pairs(sae.W_dec)
    torch.testing.assert_close(output.losses["orthogonality_loss"], expected)
    torch.testing.assert_close(output.loss, sum(output.losses.values()))


def test_the_penalty_of_every_third_step_counts_three_times():
    sae, every = make(ort_interval=3), make()
    every.load_state_dict(sae.state_dict())
    x = torch.randn(64, 8)
    found = [
        sae.training_forward_pass(step_input(x)).losses["orthogonality_loss"].item()
        for _ in range(4)
    ]
    one = every.training_forward_pass(step_input(x)).losses["orthogonality_loss"].item()
    assert found == pytest.approx([3 * one, 0, 0, 3 * one])


def test_training_separates_the_decoder_rows():
    similar = {}
    for coefficient in (0.0, 0.25):
        torch.manual_seed(0)
        sae = make(ort_coefficient=coefficient, d_sae=16)
        optimizer = torch.optim.Adam(sae.parameters(), 1e-2)
        parents = torch.eye(8)[:4]
        for _ in range(300):  # a child fires only with its parent: it is absorbed
            active = (torch.rand(128, 4) < 0.4).float()
            child = active * (torch.rand(128, 4) < 0.5)
            x = active @ parents + child @ torch.eye(8)[4:]
            sae.training_forward_pass(step_input(x)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        similar[coefficient] = float(all_pairs(sae.W_dec.detach()))
    assert similar[0.25] < 0.5 * similar[0.0]
