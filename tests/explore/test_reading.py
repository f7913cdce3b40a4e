import pytest
import torch

from sae_lens_atm.explore import reading as module
from sae_lens_atm.method.importance import batch_signals
from tests.explore.sample import linear_sae, read


@pytest.fixture
def sae():
    return linear_sae(torch.randn(6, 5))


def test_everything_is_that_of_one_large_batch(sae):
    x = torch.randn(20, 5) + 1
    found = read(sae, x, batch=3)
    acts = sae.encode(x).detach()
    residual = x - sae.decode(acts).detach()
    torch.testing.assert_close(torch.from_numpy(found.acts.toarray()), acts)
    for one, other in zip(
        found.signals, batch_signals(acts, sae.W_dec.detach(), residual), strict=True
    ):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.inputs, acts.T @ x / 20)
    torch.testing.assert_close(found.mean_input, x.mean(0))
    variance = (x - x.mean(0)).square().sum(-1).mean()
    assert found.variance == pytest.approx(float(variance), rel=1e-5)
    explained = 1 - float(residual.square().sum(-1).mean() / variance)
    assert found.explained_variance == pytest.approx(explained, rel=1e-4)
    assert found.l0 == pytest.approx(float((acts > 0).sum(1).float().mean()))


def test_a_column_has_the_rows_on_which_a_latent_fires():
    found = read(linear_sae(torch.eye(2)), torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 0]]))
    rows, acts = found.column(0)
    assert rows.tolist() == [0, 2]
    assert acts.tolist() == [1, 3]


def test_tokens_with_long_activations_are_left_out():
    x = torch.ones(8, 2)
    x[5] *= 100
    found = read(linear_sae(torch.eye(2)), x, batch=8)
    assert found.left_out == 1
    assert found.places.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert found.acts.max() == 1
    assert read(linear_sae(torch.eye(2)), x, batch=8, longest=None).left_out == 0


def test_reading_ends_when_too_many_latents_fired(monkeypatch):
    monkeypatch.setattr(module, "MOST_FIRINGS", 10)
    assert read(linear_sae(torch.eye(2)), torch.ones(40, 2), batch=4).rows == 8


def test_activations_below_0_are_left_out_and_told():
    sae = linear_sae(torch.eye(2))
    sae.activation_fn = torch.nn.Identity()
    found = read(sae, torch.tensor([[1.0, -1], [-2, 3], [1, 1], [1, 1]]))
    assert found.is_signed
    assert found.acts.toarray().min() == 0
    assert not read(linear_sae(torch.eye(2)), torch.ones(4, 2)).is_signed
