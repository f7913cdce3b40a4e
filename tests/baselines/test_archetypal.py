import pytest
import torch
from sae_lens import SAE, TrainingSAE

from sae_lens_atm.baselines.archetypal import ArchetypalTrainingSAEConfig
from tests.helpers import step_input, train


def make(**fields):
    size = {"d_in": 8, "d_sae": 32, "k": 3, "archetypal_points": 10}
    return TrainingSAE.from_dict(ArchetypalTrainingSAEConfig(**{**size, **fields}).to_dict())


def test_the_decoder_follows_the_formula():
    sae = make()
    sae.mixture.data.uniform_()
    sae.relaxation.data.normal_()
    sae.log_scale.data.fill_(0.5)
    hull = sae.mixture @ sae.points
    expected = torch.exp(torch.tensor(0.5)) * (hull + sae.relaxation)
    torch.testing.assert_close(sae.W_dec, expected)


def test_before_each_step_the_constraints_hold():
    sae = make(archetypal_delta=0.5)
    sae.mixture.data = torch.tensor([[3.0, 1.0, -2.0] + [0.0] * 7] * 32)
    sae.relaxation.data = torch.zeros(32, 8)
    sae.relaxation.data[0, :2] = torch.tensor([3.0, 4.0])
    sae.relaxation.data[1, 0] = 0.2
    sae.project()
    assert sae.mixture[0, :3].tolist() == pytest.approx([0.75, 0.25, 0])
    assert sae.relaxation[0, :2].tolist() == pytest.approx([0.3, 0.4])
    assert sae.relaxation[1, 0].item() == pytest.approx(0.2)


def test_points_are_centroids_of_the_first_batch_and_stay():
    sae = make(archetypal_points=3)
    centres = torch.eye(8)[:3] * 10
    batch = centres.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 8)
    sae.training_forward_pass(step_input(batch))
    assert torch.cdist(centres, sae.points).min(1).values.max() < 0.2
    before = sae.points.clone()
    sae.training_forward_pass(step_input(torch.randn(60, 8)))
    assert torch.equal(sae.points, before)


def test_encoders_are_divided_once_by_the_length_of_the_points():
    sae, batch = make(), torch.randn(60, 8)
    first = sae.W_enc.detach().clone()
    sae.take_points(1e20 * batch)  # a batch that is then rejected
    sae.take_points(batch)
    torch.testing.assert_close(sae.W_enc, first / sae.points.norm(dim=1).median())
    sae.training_forward_pass(step_input(100 * batch))
    torch.testing.assert_close(sae.W_enc, first / sae.points.norm(dim=1).median())


def test_a_seed_is_that_of_the_encoders():
    assert torch.equal(make().W_enc, make().W_enc)
    assert not torch.equal(make().W_enc, make(archetypal_seed=1).W_enc)


def test_a_small_batch_is_refused():
    with pytest.raises(ValueError, match="archetypal_points must be at most the batch size, 5"):
        make().training_forward_pass(step_input(torch.randn(5, 8)))


def test_without_relaxation_every_row_is_in_the_hull():
    """The paper's case of delta = 0: rows are mixtures of points."""
    torch.manual_seed(0)
    sae = make(archetypal_delta=0.0)
    train(sae, 50, data=lambda _: torch.rand(64, 8) + 1)
    sae.project()
    rows = sae.W_dec / sae.log_scale.exp()
    assert bool((rows >= sae.points.min(0).values - 1e-5).all())
    assert bool((rows <= sae.points.max(0).values + 1e-5).all())
    torch.testing.assert_close(sae.mixture.sum(1), torch.ones(32))


def test_all_parts_of_the_decoder_are_trained():
    sae = make()
    output = sae.training_forward_pass(step_input(torch.randn(64, 8)))
    output.loss.backward()
    for parameter in (sae.mixture, sae.relaxation, sae.log_scale, sae.W_enc):
        assert parameter.grad.abs().sum() > 0
    assert "W_dec" not in dict(sae.named_parameters())


def test_folding_the_scale_of_the_input_keeps_the_output(tmp_path):
    torch.manual_seed(0)
    sae = train(make(normalize_activations="expected_average_only_in"), 20).eval()
    sae.b_dec.data += 0.3
    x = torch.randn(64, 8)
    expected = sae(x * 2.5) / 2.5
    sae.fold_activation_norm_scaling_factor(2.5)
    torch.testing.assert_close(sae(x), expected)
    sae.save_inference_model(tmp_path)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), expected)
