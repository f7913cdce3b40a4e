import pytest
import torch
from sae_lens import SAE, TrainingSAE

from sae_lens_atm.baselines.itda import ITDATrainingSAEConfig, matching_pursuit
from tests.helpers import step_input


def make(**fields):
    cfg = ITDATrainingSAEConfig(**{"d_in": 8, "d_sae": 32, "k": 3, **fields})
    return TrainingSAE.from_dict(cfg.to_dict())


def slow(x, rows, steps):
    """Matching pursuit, sample by sample."""
    codes = torch.zeros(len(x), len(rows), dtype=x.dtype)
    for sample, code in zip(x, codes, strict=True):
        residual = sample.clone()
        for _ in range(steps):
            correlations = rows @ residual
            best = int(correlations.abs().argmax())
            code[best] += correlations[best]
            residual -= correlations[best] * rows[best]
    return codes


def test_codes_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # The second atom has correlation -4 with (0, -5); then the first has 2.4 with the residual.
    codes = matching_pursuit(torch.tensor([[0.0, -5.0]]), rows, 2)
    assert codes[0].tolist() == pytest.approx([2.4, -4.0])


def test_codes_are_those_of_the_slow_version():
    x = torch.randn(30, 8, dtype=torch.float64)
    rows = torch.nn.functional.normalize(torch.randn(40, 8, dtype=torch.float64), dim=1)
    torch.testing.assert_close(matching_pursuit(x, rows, 6), slow(x, rows, 6))


def test_the_dictionary_holds_the_samples_that_it_does_not_reconstruct():
    sae = make(k=1, itda_threshold=0.5)
    x = torch.cat([3 * torch.eye(8)[:3], 3 * torch.eye(8)[:3], 2.9 * torch.eye(8)[1:2]])
    sae.training_forward_pass(step_input(x))
    assert int(sae.size) == 3
    torch.testing.assert_close(sae.W_dec[:3].detach(), torch.eye(8)[:3])
    sae.training_forward_pass(step_input(x))
    assert int(sae.size) == 3
    sae.training_forward_pass(step_input(3 * torch.eye(8)[4:6]))
    assert int(sae.size) == 5


def test_a_full_dictionary_stays():
    sae = make(itda_threshold=0.0)
    for _ in range(3):
        sae.training_forward_pass(step_input(torch.randn(64, 8)))
    assert int(sae.size) == 32
    before = sae.W_dec.clone()
    sae.training_forward_pass(step_input(torch.randn(64, 8)))
    assert torch.equal(sae.W_dec, before)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(32))


def test_gradient_descent_changes_nothing():
    sae = make()
    optimizer = torch.optim.Adam(sae.parameters(), 0.1)
    x = torch.randn(64, 8)
    sae.training_forward_pass(step_input(x)).loss.backward()
    before = {name: p.clone() for name, p in sae.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in sae.named_parameters())


def test_an_empty_dictionary_reconstructs_zero():
    assert make()(torch.randn(5, 8)).abs().sum() == 0


def test_a_lower_threshold_gives_a_larger_dictionary():
    sizes = []
    for threshold in (0.5, 0.2, 0.05):
        sae = make(d_sae=500, itda_threshold=threshold)
        torch.manual_seed(0)
        for _ in range(5):
            sae.training_forward_pass(step_input(torch.randn(200, 8)))
        sizes.append(int(sae.size))
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_few_samples_need_no_products_of_atoms():
    x = torch.randn(3, 8, dtype=torch.float64)
    rows = torch.nn.functional.normalize(torch.randn(90, 8, dtype=torch.float64), dim=1)
    torch.testing.assert_close(matching_pursuit(x, rows, 6), slow(x, rows, 6))


def test_the_products_of_atoms_are_those_of_the_present_dictionary():
    x, sae, other = torch.randn(64, 8), make(), make()
    for one in (sae, other):
        one.training_forward_pass(step_input(torch.randn(64, 8)))
        one.encode(x)
    sae.load_state_dict(other.state_dict())
    torch.testing.assert_close(sae.encode(x), other.encode(x))
    assert sae.double()._products is None


def test_a_single_vector_is_encoded(tmp_path):
    sae = make()
    sae.training_forward_pass(step_input(torch.randn(64, 8)))
    sae.save_inference_model(tmp_path)
    saved, x = SAE.load_from_disk(tmp_path), torch.randn(5, 8)
    torch.testing.assert_close(saved.encode(x[0]), saved.encode(x)[0])
    torch.testing.assert_close(sae.encode(x[0]), saved.encode(x[0]))
    assert saved.encode(x[:0]).shape == sae.encode(x[:0]).shape == (0, 32)
