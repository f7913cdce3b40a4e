import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot
from torch.testing import assert_close

from sae_lens_atm.metrics.first_letter import absorbed, first_letter_scores
from sae_lens_atm.metrics.probes import Probe, Words, f1_scores, nested_logistic, train_probes


def by_the_book(acts, p, cosine, main):
    """SAEBench's rules for one word, one after the other."""
    contribution = [a * c for a, c in zip(acts, cosine, strict=True)]
    m = sum(x for x, is_main in zip(contribution, main, strict=True) if is_main)
    others = sorted(
        (
            x
            for x, c, is_main in zip(contribution, cosine, main, strict=True)
            if not is_main and c >= 0.1 and x > 0
        ),
        reverse=True,
    )
    t = sum(others[:3])
    if p <= 0 or m >= p or t / p < 0.4:
        fraction = 0.0
    elif m <= 0:
        fraction = 1.0
    else:
        u = min(t, p - m)
        fraction = u / (u + m)
    best = max(range(len(acts)), key=lambda j: contribution[j])
    silent = all(a < 1e-8 for a, is_main in zip(acts, main, strict=True) if is_main)
    full = silent and cosine[best] >= 0.025 and p > 0 and contribution[best] / p >= 0.4
    return fraction, full


# In sixteenths, so that sums are exact and no threshold is a matter of rounding.
sixteenths = st.integers(0, 64).map(lambda n: n / 16)
cosines = st.sampled_from([-0.5, -0.0625, 0.0, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0])


@given(st.data(), st.integers(4, 7))
def test_absorption_is_that_of_the_rules(data, latents):
    acts = [data.draw(sixteenths) for _ in range(latents)]
    cosine = [data.draw(cosines) for _ in range(latents)]
    main = [True, *(data.draw(st.booleans()) for _ in range(latents - 1))]
    p = data.draw(st.integers(-16, 64)) / 16 + 1 / 1024
    fraction, full = absorbed(
        torch.tensor([acts]), torch.tensor([p]), torch.tensor(cosine), torch.tensor(main)
    )
    expected = by_the_book(acts, p, cosine, main)
    assert fraction.item() == pytest.approx(expected[0], abs=1e-6)
    assert full.item() == expected[1]


def test_logistic_regressions_are_where_their_gradient_is_nothing():
    torch.manual_seed(0)
    x = torch.randn(300, 4, dtype=torch.float64).relu()
    true = x[:, 0] + torch.randn(300) > 1
    weights, biases = nested_logistic(x, true)
    share = true.double().mean()
    class_weight = torch.where(true, 0.5 / share, 0.5 / (1 - share))
    for k in range(1, 5):
        w = weights[k - 1].clone().requires_grad_()
        b = biases[k - 1].clone().requires_grad_()
        logits = x[:, :k] @ w[:k] + b
        misfit = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, true.double(), weight=class_weight, reduction="sum"
        )
        (w.square().sum() / 2 + misfit).backward()
        assert not weights[k - 1, k:].any()
        assert_close(w.grad, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
        assert_close(b.grad, torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_logistic_regressions_of_nothing_or_much_are_finite(scale):
    torch.manual_seed(0)
    x = scale * torch.randn(60, 3)
    weights, biases = nested_logistic(x, x[:, 0] > 0 if scale else torch.arange(60) < 9)
    assert weights.isfinite().all()
    assert biases.isfinite().all()
    if scale == 1e4:
        assert ((x.double() @ weights.T + biases > 0) == (x[:, :1] > 0)).all()


def test_f1_by_hand():
    predicted = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()
    true = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()
    assert f1_scores(predicted, true).tolist() == pytest.approx([2 / 3, 0, 4 / 5])


def test_a_probe_finds_what_can_be_told():
    torch.manual_seed(0)
    letter = torch.randint(3, (600,))
    x = torch.randn(600, 8) + 6 * torch.eye(8)[letter]
    probe = train_probes(x, one_hot(letter), torch.Generator().manual_seed(0), epochs=30)
    yes = probe.score(x) > 0
    assert (f1_scores(yes, one_hot(letter, 3).bool()) > 0.95).all()
    assert probe.weight.diagonal().min() > probe.weight.abs().median()


def one_hot_sae(absorbing=False, signs=1.0):
    """Three letters of four words each, 30 of each word. Latents 0 to 2 fire for their letters, 3
    to 14 for words; if absorbing, word 0 has its letter in its own latent. Activations and decoder
    rows are multiplied by `signs`."""
    word = torch.arange(12).repeat(30)
    letter = word // 4
    direction = torch.eye(16)
    x = direction[letter] + direction[3 + word]
    acts = torch.cat([torch.eye(3)[letter], torch.eye(12)[word]], 1)
    decoder = direction[:15].clone()
    if absorbing:
        acts[word == 0, 0] = 0.0
        decoder[3] += direction[0]
    acts, decoder = acts * signs, (decoder.T * signs).T
    probe = Probe(direction[:3], torch.full((3,), -0.5))
    return first_letter_scores(
        Words(acts, letter),
        Words(acts, letter),
        # A word's own latent then carries the length of both directions.
        acts * (1 + (2**0.5 - 1) * (torch.arange(15) == 3)) if absorbing else acts,
        x,
        decoder,
        probe,
        probe.score(x) > 0,
        torch.tensor([True, True, True]),
        seed=0,
        batch_size=16,
        resamples=200,
    )


def test_a_sae_with_a_latent_for_each_letter_absorbs_nothing():
    scores = one_hot_sae()
    nothing = {"absorption_full", "absorption_fraction"}
    nothing |= {f"{name}_learned" for name in nothing}
    ones = {"k1_f1", "feature_splits", "parents_learned", "probe_f1"}
    ones |= {"sparse_probing_1", "sparse_probing_2", "sparse_probing_5"}
    expected = dict.fromkeys(nothing, 0) | dict.fromkeys(ones, 1) | {"l0_words": 2}
    assert scores.figures == expected
    assert scores.intervals == {name: (value, value) for name, value in expected.items()}
    assert [row.nonzero().squeeze(1).tolist() for row in scores.main_latents] == [[0], [1], [2]]


def test_a_word_with_its_letter_in_its_own_latent_is_absorbed():
    # One word in four of one letter in three.
    scores = one_hot_sae(absorbing=True)
    assert scores.figures["absorption_full"] == pytest.approx(1 / 12)
    assert scores.figures["absorption_fraction"] == pytest.approx(1 / 12)
    assert scores.figures["l0_words"] == pytest.approx(2 - 1 / 12)
    assert scores.fraction_by_letter.tolist() == pytest.approx([1 / 4, 0, 0])
    low, high = scores.intervals["absorption_full"]
    # A third of a proportion of 120 words, with a standard deviation of .04.
    assert (low, high) == (
        pytest.approx(1 / 12 - 0.027, abs=0.006),
        pytest.approx(1 / 12 + 0.027, abs=0.006),
    )


@pytest.mark.parametrize("absorbing", [False, True])
def test_the_sign_of_a_latent_has_no_effect(absorbing):
    signs = 1 - 2.0 * (torch.arange(15) % 2 == 0)  # latents 0 and 2 detect their letters by -1
    plain, signed = (one_hot_sae(absorbing, s) for s in (torch.ones(15), signs))
    assert signed.figures == pytest.approx(plain.figures)
    assert torch.equal(signed.main_latents, plain.main_latents)


def test_letters_that_do_not_count_are_left_out():
    letter = torch.arange(3).repeat(20)
    acts = torch.eye(3)[letter].repeat(1, 4)
    scores = first_letter_scores(
        Words(acts, letter),
        Words(acts, letter),
        acts,
        torch.eye(12)[letter],
        torch.eye(12),
        Probe(torch.eye(12)[:3], torch.zeros(3)),
        torch.ones(60, 3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.bool),
        seed=0,
        resamples=10,
    )
    measured = {name for name, value in scores.figures.items() if not math.isnan(value)}
    assert measured == {"l0_words"}
    assert math.isnan(scores.intervals["k1_f1"][0])
    assert scores.fraction_by_letter.isnan().all()


def test_sparse_probing_by_hand():
    # Latent 0 fires for half of letter 0 and nothing else; latent 1 for all of letter 1.
    letter = torch.arange(2).repeat(40)
    acts = torch.zeros(80, 2)
    acts[(letter == 0) & (torch.arange(80) % 4 == 0), 0] = 1
    acts[letter == 1, 1] = 1

    def found(acts):
        words, probe = Words(acts, letter), Probe(torch.eye(2), torch.full((2,), -0.5))
        every = torch.ones(2, dtype=torch.bool)
        by_probe = torch.eye(2).bool()[letter]
        x = torch.eye(2)[letter]
        decoder = torch.eye(acts.shape[1], 2)
        scores = first_letter_scores(
            words, words, acts, x, decoder, probe, by_probe, every, 0, resamples=2
        )
        return {k: v for k, v in scores.figures.items() if k.startswith("sparse_probing")}

    assert found(acts) == {"sparse_probing_1": 1.0, "sparse_probing_2": 1.0}
    halves = {f"sparse_probing_{k}": pytest.approx(0.75) for k in (1, 2)}
    assert found(acts[:, :1].repeat(1, 2)) == halves
