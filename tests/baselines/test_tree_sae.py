from itertools import product

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAE

from sae_lens_atm.baselines.tree_allocation import (
    fair_quotas,
    reallocated,
    reallocation_end,
    reallocation_steps,
)
from sae_lens_atm.baselines.tree_sae import TreeTrainingSAEConfig, layer_k, layer_widths
from sae_lens_atm.baselines.tree_sae import tree_activations as activations
from tests.helpers import step_input, train

ROOT = 5


def make(**fields):
    return TrainingSAE.from_dict(
        TreeTrainingSAEConfig(**{"d_in": 8, "d_sae": 32, "k": 6, **fields}).to_dict()
    )


# --- activations ---------------------------------------------------------------------------------


def test_a_child_fires_only_with_its_parent():
    # Layers {0, 1}, {2, 3, 4}. The parent of 2 is 0, of 3 is 1, of 4 is the root.
    parents = torch.tensor([ROOT, ROOT, 0, 1, ROOT])
    pre = torch.tensor([[1.0, 2.0, 9.0, 3.0, 4.0], [2.0, -1.0, 1.0, 5.0, 0.5]])
    found = activations(pre, parents, [2, 3], [1, 1])
    # Sample 1: latent 1 fires, so 2 may not; 4 beats 3. Sample 2: latent 0 fires; 2 beats 4.
    assert found.tolist() == [[0, 2, 0, 0, 4], [2, 0, 1, 0, 0]]


def slow_activations(pre, parents, widths, active):
    """Equation 6, sample by sample and latent by latent."""
    result = torch.zeros_like(pre)
    for row, z in zip(pre, result, strict=True):
        start = 0
        for width, k in zip(widths, active, strict=True):
            allowed = {}
            for i in range(start, start + width):
                parent = int(parents[i])
                if parent == pre.shape[1] or z[parent] > 0:
                    allowed[i] = float(row[i])
            for i in sorted(allowed, key=lambda i: -allowed[i])[:k]:
                z[i] = row[i].relu()
            start += width
    return result


def test_activations_are_those_of_the_slow_version():
    sae = make(k=6, d_sae=32, tree_widths=[4, 8, 20], tree_k=[2, 2, 2])
    pre = torch.randn(200, 32)
    found = activations(pre, sae.parents, sae.widths, sae.active)
    torch.testing.assert_close(found, slow_activations(pre, sae.parents, sae.widths, sae.active))
    assert (found > 0).sum(1).max() <= 6


def test_parents_are_in_lower_layers():
    sae = make(d_sae=3200, tree_widths=[200, 400, 2600])
    assert bool((sae.parents[:200] == 3200).all())
    for start, end in sae.upper_layers():
        drawn = sae.parents[start:end]
        assert bool(((drawn < start) | (drawn == 3200)).all())
        assert len(drawn.unique()) > 0.5 * start


# --- losses --------------------------------------------------------------------------------------


def test_every_prefix_of_layers_reconstructs_the_input():
    torch.manual_seed(0)
    sae = make(tree_widths=[4, 8, 20])
    x = torch.randn(64, 8)
    output = sae.training_forward_pass(step_input(x))
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    for end, name in [(4, "inner_mse_loss_4"), (12, "inner_mse_loss_12"), (32, "mse_loss")]:
        sae_out = output.feature_acts[:, :end] @ rows[:end] + sae.b_dec
        expected = (x - sae_out).square().sum(1).mean()
        torch.testing.assert_close(output.losses[name], expected)
    torch.testing.assert_close(output.loss, torch.stack(list(output.losses.values())).sum())


def test_dead_latents_of_the_first_layer_alone_reconstruct_its_error():
    torch.manual_seed(0)
    sae = make(tree_widths=[4, 28])
    x = torch.randn(64, 8)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[10:] = True
    losses = sae.training_forward_pass(step_input(x, dead)).losses
    assert float(losses["auxiliary_reconstruction_loss"]) == 0
    dead[1] = True
    output = sae.training_forward_pass(step_input(x, dead))
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    error = x - (output.feature_acts[:, :4] @ rows[:4] + sae.b_dec)
    rest = error - output.hidden_pre[:, 1:2].relu() * rows[1]
    spread = (error - error.mean(1, keepdim=True)).square().mean()
    expected = 1 / 32 * 8 * x.var() * rest.square().mean() / spread
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], expected)
    sae.zero_grad()
    output.losses["auxiliary_reconstruction_loss"].backward()
    assert sae.W_dec.grad[1].abs().sum() > 0
    assert sae.W_dec.grad[10:].abs().sum() == 0


# --- parents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [[3.0, 1.0, 2.0], [5.0, 5.0, 0.1], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("total", [1, 2, 5, 8])
def test_quotas_maximise_the_smallest_share(capacity, total):
    def smallest(quotas):
        return min(c / k for c, k in zip(capacity, quotas, strict=True) if k)

    every = [q for q in product(range(total + 1), repeat=3) if sum(q) == total]
    found = fair_quotas(capacity, total)
    assert sum(found) == total
    assert smallest(found) == pytest.approx(max(map(smallest, every)))


def test_only_dead_children_move_and_only_to_living_parents():
    parents = torch.tensor([0, 0, 0, 0, 1])
    dead = torch.tensor([False, True, True, False, True])
    capacity = torch.tensor([1.0, 1.0, 9.0, 1.0])
    # All five belong to parent 2; but two live, and parent 1 is dead: its child may leave.
    living = torch.tensor([True, False, True, True])
    found = reallocated(parents, dead, capacity, living)
    assert found.tolist() == [0, 2, 2, 0, 2]


def test_the_reallocations_are_those_of_the_paper():
    assert sorted(reallocation_steps(100_000)) == [3_000, 9_000, 19_000, 29_000, 39_000, 49_000]
    assert reallocation_end(100_000) == 50_000


def test_capacity_goes_to_parents_that_fired_and_to_the_root():
    sae = make(tree_widths=[4, 28], tree_k=[1, 5], schedule_steps=1000)
    x = torch.randn(64, 8)
    output = sae.training_forward_pass(step_input(x))
    fired = (output.feature_acts[:, :4] > 0).any(0)
    share = output.loss.item() / (int(fired.sum()) + 1)
    expected = [share * float(f) for f in fired]
    assert sae.capacity[0, :4].tolist() == pytest.approx(expected)
    assert float(sae.capacity[0, -1]) == pytest.approx(share)


def test_dead_children_move_to_the_root_half_way():
    sae = make(tree_widths=[4, 28], schedule_steps=10)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[20:] = True
    before = sae.parents.clone()
    for _ in range(5):
        sae.training_forward_pass(step_input(torch.randn(64, 8), dead))
    assert bool((sae.parents[20:] == 32).all())
    assert torch.equal(sae.parents[:20], before[:20])
    after = sae.parents.clone()
    for _ in range(10):
        sae.training_forward_pass(step_input(torch.randn(64, 8), dead))
    assert torch.equal(sae.parents, after)


# --- settings and the whole ----------------------------------------------------------------------


def test_default_layers():
    def layers(d_sae, k):
        cfg = TreeTrainingSAEConfig(d_in=8, d_sae=d_sae, k=k)
        return layer_widths(cfg), layer_k(cfg)

    assert layers(24576, 32) == ([1536, 3072, 9216, 10752], [8, 8, 8, 8])
    assert layers(256, 6) == ([16, 32, 96, 112], [2, 2, 1, 1])
    assert layers(256, 2) == ([64, 192], [1, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"d_sae": 64, "k": 32},
            r"widths \[4, 8, 24, 28\], .* got \[8, 8, 8, 8\] by default",
        ),
        ({"d_sae": 7, "k": 4}, r"total d_sae = 7, got \[0, 1, 3, 3\] by default"),
        ({"d_sae": 64, "k": 3, "tree_widths": [8]}, r"total d_sae = 64, got \[8\]$"),
    ],
)
def test_layers_that_do_not_fit_are_shown(values, message):
    with pytest.raises(ValueError, match=message):
        TreeTrainingSAEConfig(d_in=8, **values)


def test_it_learns_a_hierarchy(tmp_path):
    """Children of the data become children in the tree, and their parents are not absorbed."""
    parents, children = torch.eye(16)[:4], torch.eye(16)[4:12]

    def data(step):
        generator = torch.Generator().manual_seed(step)
        active = torch.rand(256, 4, generator=generator) < 0.3
        which = torch.randint(3, (256, 4), generator=generator)  # none, or one of two children
        child = torch.stack([active & (which == 1), active & (which == 2)], -1).flatten(1)
        return active.float() @ parents + child.float() @ children

    def recall(sae):
        """How often the best latent of a parent fires where the parent is active."""
        x = data(99_999)
        fires = sae.eval().encode(x) > 0
        found = []
        for one in parents:
            latent = (sae.W_dec @ one / sae.W_dec.norm(dim=1)).argmax()
            found.append(float(fires[x @ one > 0.5][:, latent].float().mean()))
        return sum(found) / 4

    torch.manual_seed(0)
    tree = make(d_in=16, d_sae=12, k=4, tree_widths=[4, 8], tree_k=[2, 2], schedule_steps=1500)
    train(tree, 1500, data=data, lr=3e-3)
    torch.manual_seed(0)
    flat = TrainingSAE.from_dict(TopKTrainingSAEConfig(d_in=16, d_sae=12, k=3).to_dict())
    train(flat, 1500, data=data, lr=3e-3)
    assert recall(tree) > 0.9 > recall(flat)
    tree.save_inference_model(tmp_path)
    x = data(99_998)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), tree(x))
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        SAE.load_from_disk(tmp_path, dtype="bfloat16")
