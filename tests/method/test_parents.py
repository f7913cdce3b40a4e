import pytest
import torch
from torch.testing import assert_close

from sae_lens_atm.method import parents
from sae_lens_atm.method.parents import ParentTracker, carried_energy, implied_parents, lift


@pytest.fixture(params=["sparse", "dense"], autouse=True)
def kernels(request, monkeypatch):
    """Each test with sparse products and without."""
    fast = parents.sparse_products_are_fast
    monkeypatch.setattr(
        parents, "sparse_products_are_fast", lambda x: request.param == "sparse" and fast(x)
    )


def test_lift_by_hand():
    # latent 0 fires with strength 2 on half of the inputs, which are (3, 1) then, else (1, 1)
    inputs = torch.tensor([[3.0, 1.0]])  # E[a x] = 1/2 * 2 * (3, 1)
    magnitude = torch.tensor([1.0])
    mean_input = torch.tensor([2.0, 1.0])
    decoder = torch.diag(torch.tensor([0.5, 3.0]))  # of any length
    assert_close(lift(inputs, magnitude, mean_input, decoder), torch.tensor([[1.0, 0.0]]))


def test_a_latent_that_never_fired_has_no_lift_of_its_own():
    found = lift(torch.zeros(1, 2), torch.zeros(1), torch.tensor([2.0, 1.0]), torch.eye(2))
    assert found.isfinite().all()


def test_implied_parents_by_hand():
    own = torch.tensor([1.0, 2.0, 0.0])  # the last never fired
    importance = torch.tensor([3.0, 1.0, 0.0])
    rows = torch.tensor([1, 0, 2])
    lifts = torch.tensor([[0.6, 9.0, 0.0], [9.0, 9.0, 0.0], [9.0, 9.0, 0.0]])
    found = implied_parents(lifts, own, importance, rows, tau=0.5, chance=3.0, most=2)
    # latent 1 implies 0 (0.6 >= 0.5 * 1), not itself; 0 is more important than all; 2 is dead
    assert found.tolist() == [[0, -1], [-1, -1], [-1, -1]]
    not_enough = torch.tensor([[0.4, 9.0, 0.0]])
    assert (implied_parents(not_enough, own, importance, rows[:1], 0.5, 3.0, 2) == -1).all()


def test_of_many_parents_the_most_clearly_implied_are_told():
    own = torch.tensor([1.0, 2.0, 1.0, 1.0])
    importance = torch.tensor([4.0, 3.0, 2.0, 1.0])
    # in units of the parents' own lift: 1, .85 and .8
    found = torch.tensor([[1.0, 1.7, 0.8, 9.0]])
    for most, expected in ((1, [0]), (2, [0, 1]), (4, [0, 1, 2, -1])):
        told = implied_parents(found, own, importance, torch.tensor([3]), 0.5, 3.0, most)
        assert told.tolist() == [expected]


def test_a_lift_that_other_directions_have_by_chance_is_none():
    # Latent 3 has the lifts 1, .6 and .5 to latents with own lift 1, and its own. The other 16 have
    # lifts of +-.2 by chance: three standard deviations are .6.
    own = torch.ones(20)
    importance = torch.arange(20.0, 0.0, -1)
    chance = 0.2 * (1 - 2 * (torch.arange(16) % 2))
    lifts = torch.cat([torch.tensor([1.0, 0.61, 0.59, 1.0]), chance])[None]
    row = torch.tensor([3])
    assert implied_parents(lifts, own, importance, row, 0.45, 3.0, 4).tolist() == [[0, 1, -1, -1]]
    # The lifts that pass tau do not raise the level, however many there are.
    lifts[0, 4:12] = 9.0
    found = implied_parents(lifts, own, importance, row, 0.45, 3.0, 4)
    assert found.tolist() == [[0, 1, -1, -1]]
    # Without lifts by chance tau alone decides, and so it does at 0.
    lifts[0, 4:] = chance
    assert implied_parents(lifts, own, importance, row, 0.45, 0.0, 4).tolist() == [[0, 1, 2, -1]]
    lifts[0, 4:] = 0.0
    assert implied_parents(lifts, own, importance, row, 0.45, 3.0, 4).tolist() == [[0, 1, 2, -1]]


def test_carried_energy_by_hand_and_its_gradient():
    decoder = torch.tensor([[2.0, 0.0], [3.0, 4.0], [-3.0, 4.0]], requires_grad=True)
    implied = torch.tensor([[-1, -1], [0, -1], [0, 1]])
    found = carried_energy(decoder, implied, torch.tensor([7.0, 2.0, 5.0]))
    # child 1: cos .6 to latent 0; child 2: cos -.6 to 0, which costs nothing, and .28 to 1
    assert_close(found, torch.tensor(2 * 0.36 + 5 * 0.28**2))
    found.backward()
    assert decoder.grad is not None
    assert not decoder.grad[0].any()  # a parent is not pushed
    # d cos / d child = (parent's direction - cos * own) / own length
    first = 2 * 2 * 0.6 * (torch.tensor([1.0, 0.0]) - 0.6 * torch.tensor([0.6, 0.8])) / 5
    second = 5 * 2 * 0.28 * (torch.tensor([0.6, 0.8]) - 0.28 * torch.tensor([-0.6, 0.8])) / 5
    assert_close(decoder.grad[1], first)
    assert_close(decoder.grad[2], second)


SIZE = 20  # latents and dimensions


def parent_and_child(absorbed: bool, samples: int = 20_000):
    """A parent that fires half of the time; a child that fires half of that; a third feature, on
    its own, whose direction overlaps with the parent's. Latents for them, the child's either pure
    or carrying the parent (which is silent then). The other latents never fire."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(3, samples, generator=generator) < 0.5
    parent, child, other = (d.float() for d in (draw[0], draw[0] & draw[1], draw[2]))
    axes = torch.eye(SIZE)
    p, c, o = axes[0], axes[1], 0.4 * axes[0] + 0.84**0.5 * axes[2]
    x = parent[:, None] * p + child[:, None] * c + other[:, None] * o + 7.0
    if absorbed:
        acts = torch.stack([parent - child, 2**0.5 * child, other], 1)
        directions = torch.stack([p, (p + c) / 2**0.5, o])
    else:
        acts, directions = torch.stack([parent, child, other], 1), torch.stack([p, c, o])
    silent = torch.zeros(samples, SIZE - 3)
    return x, torch.cat([acts, silent], 1), torch.cat([directions, axes[3:]])


@pytest.mark.parametrize("absorbed", [False, True])
def test_a_child_implies_its_parent_absorbed_or_not(absorbed):
    x, acts, directions = parent_and_child(absorbed)
    tracker = ParentTracker(SIZE, SIZE, decay=0.0)
    update(tracker, acts, x, torch.ones(SIZE, dtype=torch.bool))
    importance = torch.tensor([3.0, 1.0, 2.0] + [0.0] * (SIZE - 3))
    tracker.update_parents(torch.arange(SIZE), directions, importance, 0.5, 3.0)
    # and the overlapping feature implies nothing and is not implied
    assert tracker.parents[:, 0].tolist() == [-1, 0] + [-1] * (SIZE - 2)
    assert (tracker.parents[:, 1:] == -1).all()
    energy = acts.square().mean(0)
    carried = carried_energy(directions, tracker.parents, energy)
    share = (acts[:, 1] > 0).float().mean()
    # an absorbing child, active at sqrt(2), has cos 1 / sqrt(2): all of its parent's energy, 1
    assert_close(carried, share * (1.0 if absorbed else 0.0), atol=1e-6, rtol=1e-5)


def test_a_latent_that_also_fires_weakly_is_no_parent_of_what_overlaps_with_it():
    """Latent 0 fires at 1 on a tenth of the inputs, its own, and at .05 on all others. On a fifth
    of them is another feature, of cosine .3, with a latent that fires there alone."""
    p, o = torch.tensor([1.0, 0.0]), torch.tensor([0.3, (1 - 0.3**2) ** 0.5])
    x = torch.cat([p.expand(10, 2), o.expand(20, 2), torch.zeros(70, 2)])
    acts = torch.tensor([[1.0, 0.0]] * 10 + [[0.05, 1.0]] * 20 + [[0.05, 0.0]] * 70)
    directions = torch.stack([p, o])
    tracker = ParentTracker(2, 2, decay=0.0)
    update(tracker, acts, x, torch.ones(2, dtype=torch.bool))
    tracker.update_parents(torch.arange(2), directions, torch.tensor([2.0, 1.0]), 0.5, 3.0)
    assert (tracker.parents == -1).all()
    # L_00 by hand: (.1 * 1 + .2 * .05 * .3) / .145 of its direction, less .1 + .2 * .3 on average
    assert_close(tracker.own_lift[0], torch.tensor(0.103 / 0.145 - 0.16))
    # by its mean activation where it fires, .145, it would be one: L_10 is .3 - .16
    found = lift(tracker.inputs, tracker.magnitude, tracker.mean_input, directions)
    assert_close(found[1, 0], torch.tensor(0.14))
    mean_active = torch.tensor([0.145, 1.0])
    taken = implied_parents(
        found, mean_active, torch.tensor([2.0, 1.0]), torch.arange(2), 0.5, 0.0, 1
    )
    assert taken.tolist() == [[-1], [0]]


def test_a_latent_that_never_fired_has_no_parents_and_is_none():
    tracker = ParentTracker(2, 3, decay=0.0)
    acts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    x = torch.tensor([[1.0, 1.0], [1.0, -5.0]])  # the last latent's direction is away from the mean
    update(tracker, acts, x, torch.ones(3, dtype=torch.bool))
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    tracker.update_parents(torch.arange(3), directions, torch.tensor([2.0, 1.0, 3.0]), 1e-6, 0.0)
    assert tracker.own_lift[2] == 0
    assert (tracker.parents != 2).all()
    assert (tracker.parents[2] == -1).all()


def update(tracker, acts, x, measured):
    """Update with the means of a batch."""
    tracker.update(acts.T @ x / len(x), acts.mean(0), x.mean(0), measured)


def test_tracker_against_brute_force():
    torch.manual_seed(0)
    tracker = ParentTracker(2, 3, decay=0.9)
    acts, x = torch.rand(20, 8, 3), torch.randn(20, 8, 2)
    measured = torch.rand(20, 3) < 0.7
    inputs, magnitude, mean = torch.zeros(3, 2), torch.zeros(3), torch.zeros(2)
    for t in range(20):
        update(tracker, acts[t] * measured[t], x[t], measured[t])
        mean = 0.9 * mean + 0.1 * x[t].mean(0)
        for j in range(3):
            if measured[t, j]:
                inputs[j] = 0.9 * inputs[j] + 0.1 * (acts[t, :, j, None] * x[t]).mean(0)
                magnitude[j] = 0.9 * magnitude[j] + 0.1 * acts[t, :, j].mean()
    assert_close(tracker.inputs, inputs)
    assert_close(tracker.magnitude, magnitude)
    assert_close(tracker.mean_input / tracker.weight, mean / (1 - 0.9**20))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_no_trace(bad):
    tracker = ParentTracker(2, 3, decay=0.9)
    update(tracker, torch.rand(4, 3), torch.randn(4, 2), torch.ones(3, dtype=torch.bool))
    before = {name: b.clone() for name, b in tracker.named_buffers()}
    x = torch.randn(4, 2)
    x[1, 0] = bad
    update(tracker, torch.rand(4, 3), x, torch.ones(3, dtype=torch.bool))
    for name, buffer in tracker.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_its_averages_stay_float32_when_the_sae_is_cast():
    tracker = ParentTracker(2, 3).to(torch.bfloat16)
    assert {b.dtype for b in tracker.buffers()} == {torch.float32, torch.int64}
