import numpy as np

from sae_lens_atm.explore.examples import (
    LEVELS,
    PARTS,
    TOP,
    WINDOW,
    Amount,
    find_examples,
    windows_at,
)
from tests.explore.sample import reading_of


def window(windows, index):
    part = slice(windows.starts[index], windows.starts[index + 1])
    return dict(zip(windows.offsets[part].tolist(), windows.levels[part].tolist(), strict=True))


def test_a_window_has_the_activations_of_its_context():
    acts = [[0], [10], [0], [5], [4], [0], [10], [0]]
    windows = windows_at(reading_of(acts), [0], [np.array([3, 4])], context_size=4)
    assert windows.places.tolist() == [3, 4]
    half = -(-LEVELS // 2)
    assert window(windows, 0) == {-2: LEVELS, 0: half}  # not the row 4 of the next context
    assert window(windows, 1) == {0: int(np.ceil(0.4 * LEVELS)), 2: LEVELS}


def test_a_window_ends_far_from_its_place():
    windows = windows_at(reading_of(np.ones((200, 1))), [0], [np.array([100])], context_size=200)
    assert sorted(window(windows, 0)) == [*range(-WINDOW, WINDOW + 1)]


def test_the_strongest_contexts_come_once():
    acts = np.zeros((12, 2))
    acts[[0, 1, 5, 9], 0] = [3, 4, 2, 5]
    found = find_examples(reading_of(acts), 4, Amount(top=2, part=0, pair=0))
    assert found.starts.tolist() == [0, 2, 2]
    assert found.groups.tolist() == [TOP, TOP]
    assert found.windows.places.tolist() == [9, 1]


def test_some_contexts_are_from_each_part_of_the_activations():
    acts = np.arange(1, 101, dtype=float)[:, None]
    found = find_examples(reading_of(acts), 1, Amount(top=1, part=3, pair=0))
    values = {group: [] for group in range(PARTS + 1)}
    for group, place in zip(found.groups.tolist(), found.windows.places.tolist(), strict=True):
        values[group].append(place + 1)
    assert values.pop(TOP) == [100]
    for group, some in values.items():
        assert len(set(some)) == 3
        assert all(20 * (group - 1) < value <= 20 * group for value in some)


def test_the_same_seed_gives_the_same_contexts():
    reading = reading_of(np.random.default_rng(0).random((50, 3)))
    amount = Amount(top=1, part=2, pair=0)
    places = [find_examples(reading, 5, amount, seed).windows.places for seed in (0, 0, 1)]
    assert places[0].tolist() == places[1].tolist() != places[2].tolist()
