import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE

from sae_lens_atm.baselines.lista_matryoshka import (
    ListaMatryoshkaTrainingSAEConfig,
    above,
    refined,
    tilted_mean,
)
from tests.helpers import step_input


def make(**fields):
    cfg = ListaMatryoshkaTrainingSAEConfig(**{"d_in": 8, "d_sae": 32, "k": 3, **fields})
    return TrainingSAE.from_dict(cfg.to_dict())


def test_refinements_solve_the_sparse_code():
    """With eta = 1 and tied weights, a refinement is a step of iterative thresholding."""
    rows = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:2]
    rows = torch.stack([rows[0], 0.6 * rows[0] + 0.8 * rows[1]])  # two correlated latents
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    encoder = (rows.T, torch.zeros(2, dtype=torch.float64))
    threshold = above(torch.tensor(0.1, dtype=torch.float64))
    first, _ = refined(z @ rows, encoder, rows, 1.0, [threshold])
    many, _ = refined(z @ rows, encoder, rows, 1.0, [threshold] * 60)
    # One step finds 0.6 of the other latent, too; enough steps find the code.
    torch.testing.assert_close(first[0][0], torch.tensor([1.0, 0.6], dtype=torch.float64))
    torch.testing.assert_close(many[-1], z, atol=1e-3, rtol=0)


def test_two_steps_by_hand():
    weights, bias, rows = torch.eye(2), torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    steps, pre = refined(
        torch.tensor([[2.0, 1.0]]), (weights, bias), rows, 0.5, [torch.relu, torch.relu]
    )
    # s(p_0) = (2, 1), decoded (2, 2): the residual is (0, -1).
    assert steps[0].tolist() == [[2, 1]]
    assert pre.tolist() == steps[1].tolist() == [[2, 0.5]]


def test_the_tilted_mean():
    losses = torch.tensor([1.0, 3.0])
    weights = torch.softmax(torch.tensor([0.5, 1.5]), 0)
    assert float(tilted_mean(losses, 1.0)) == pytest.approx(float((weights * losses).sum()))
    assert float(tilted_mean(losses, 0.0)) == 2


def test_without_its_parts_it_is_batchtopk():
    x = torch.randn(64, 8)
    torch.manual_seed(0)
    ours = make(refinements=0, term_tilt=0.0, initial_k=1.0)
    torch.manual_seed(0)
    cfg = BatchTopKTrainingSAEConfig(d_in=8, d_sae=32, k=3)
    theirs = TrainingSAE.from_dict(cfg.to_dict())
    a, b = (sae.training_forward_pass(step_input(x)) for sae in (ours, theirs))
    torch.testing.assert_close(a.losses["mse_loss"], b.losses["mse_loss"])
    torch.testing.assert_close(a.feature_acts, b.feature_acts)
    torch.testing.assert_close(ours.thresholds[-1], theirs.topk_threshold)


def test_levels_hold_the_most_frequent_latents_and_train_their_own():
    sae = make(matryoshka_widths=[2, 6])
    sae.frequencies.copy_(torch.arange(32))
    acts = torch.rand(16, 32)
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    for (width, found), used in zip(
        sae.level_reconstructions(acts), [[31, 30], [31, 30, 29, 28, 27, 26]], strict=True
    ):
        torch.testing.assert_close(found, acts[:, used] @ rows[used] + sae.b_dec)
        (gradient,) = torch.autograd.grad(found.square().sum(), sae.W_dec, retain_graph=True)
        own = used if width == 2 else used[2:]
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == sorted(own)


def test_k_falls_linearly_to_its_end():
    sae, x = make(initial_k=3.0, schedule_steps=4), torch.randn(64, 8)
    found = [sae.training_forward_pass(step_input(x)).metrics["k"] for _ in range(6)]
    assert found == pytest.approx([9, 7.5, 6, 4.5, 3, 3])


def test_the_threshold_of_the_last_step_is_reported():
    sae = make()
    metrics = sae.training_forward_pass(step_input(torch.randn(64, 8))).metrics
    assert metrics["topk_threshold"] == sae.thresholds[-1]


def test_the_default_widths_are_those_of_the_benchmark():
    assert make(d_sae=4096, k=25).cfg.widths == [128, 512, 2048]


def test_frequencies_are_a_moving_average():
    sae, x = make(), torch.randn(64, 8)
    fired = [
        (sae.training_forward_pass(step_input(x)).feature_acts > 0).double().mean(0)
        for _ in range(2)
    ]
    torch.testing.assert_close(sae.frequencies, 0.99 * fired[0] + 0.01 * fired[1])
