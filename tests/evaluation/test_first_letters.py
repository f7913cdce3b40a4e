import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TrainingSAE
from sae_lens.load_model import load_model
from transformers import AutoModelForCausalLM

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation import first_letters
from sae_lens_atm.evaluation.first_letters import (
    FirstLetterConfig,
    figures_of,
    keep_largest,
    look_at_first_letters,
    matched_l0,
    residual_stream,
    scores_of,
)
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.letter_words import words_of
from tests.data.spelling.lm import few_words, tiny_lm
from tests.helpers import make_sae

HOOK = ModelHook("transformer.h.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm") / "lm", layers=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_model("AutoModelForCausalLM", str(folder), device="cpu", hook_names=[HOOK.name])


def test_activations_are_those_of_the_word_with_any_padding(model, folder):
    prompts = [
        "\nbee has the first letter:",
        "\nant has the first letter: A\ncow has the first letter:",
    ]
    found = residual_stream(model, HOOK, prompts)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for text, stream in zip(prompts, found, strict=True):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        word = few_words().index(text.split("\n")[-1].split()[0])
        assert ids[0, -6] == word
        with torch.no_grad():
            after_first = plain(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(stream, after_first[0, -6])


def test_the_model_runs_only_up_to_the_hook(model):
    last = model.model.transformer.h[1]

    def fail(*_):
        raise AssertionError

    handle = last.register_forward_hook(fail)
    found = residual_stream(model, HOOK, ["\nbee has the first letter:"])
    handle.remove()
    assert found.shape == (1, 8)


def test_a_template_that_the_tokenizer_merges_with_the_word_is_one_line(model, monkeypatch):
    monkeypatch.setattr(first_letters, "TEMPLATE", " starts with")
    with pytest.raises(SettingsError, match=r"^first_letters: .* ' starts with'"):
        residual_stream(model, HOOK, ["\nbee has the first letter:"])


def test_every_batch_is_announced_and_can_stop(model):
    seen = []

    def on_batch(done, batches):
        seen.append((done, batches))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=1), on_batch)
    words = len(words_of(model.tokenizer))
    test = words - int(0.8 * words)
    batches = sum(-(-n // 64) for n in (words - test, test, test))
    assert seen == [(0, batches), (1, batches), (2, batches)]


def test_words_prompts_and_probes_depend_on_the_seed_alone(model):
    torch.rand(3)
    before = torch.get_rng_state()
    a, b, c = (
        look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=2, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.probe.weight, b.probe.weight)
    assert torch.equal(a.asked, b.asked)
    assert not torch.equal(a.train.letter, c.train.letter)


def test_words_are_split_four_to_one(model):
    found = look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=1))
    words = len(words_of(model.tokenizer))
    assert (len(found.train.x), len(found.test.x)) == (int(0.8 * words), words - int(0.8 * words))
    assert found.facts()["words"] == words == sum(found.facts()["words_by_letter"])
    assert found.shares.sum() == pytest.approx(1)
    assert len(found.asked) == len(found.test.x)


def test_too_few_letters_count_for_nothing(model):
    found = look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=1))
    enough = found._replace(probe_f1=torch.tensor([0.7] * 20 + [0.6] * 6))
    assert enough.counts.tolist() == [True] * 20 + [False] * 6
    few = found._replace(probe_f1=torch.tensor([0.7] * 19 + [0.6] * 7))
    assert not few.counts.any()
    assert few.facts()["letters_above"] == 19
    assert few._replace(cfg=FirstLetterConfig(min_f1=0.5)).counts.all()


@pytest.mark.parametrize("architecture", ["atm", "topk"])
def test_a_saved_sae_has_figures_and_they_repeat(model, architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(first_letters, "MIN_LETTERS", 0)
    found = look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=40, probe_lr=0.05))
    f1 = found.probe_f1[:4].mean().item()
    found = found._replace(probe_f1=torch.ones(26).index_fill(0, torch.arange(4, 26), 0.0))
    sae = make_sae(d_in=8, d_sae=32, k=3)
    if architecture == "topk":
        sae = TrainingSAE.from_dict({"architecture": "topk", "d_in": 8, "d_sae": 32, "k": 3})
    sae.save_inference_model(tmp_path)
    scores = scores_of(SAE.load_from_disk(tmp_path), found)
    again = scores_of(SAE.load_from_disk(tmp_path), found)
    assert torch.equal(scores.main_latents, again.main_latents)
    figures = figures_of(scores, found)
    assert figures["letters"] == 4
    assert figures["probe_f1"] == pytest.approx(f1)
    assert 0 <= figures["absorption_fraction"] <= 1
    assert {"k1_f1", "sparse_probing_1", "sparse_probing_2", "sparse_probing_5"} <= figures.keys()


def sae_of(decoder, threshold=0.0):
    """An SAE with the activations of `x @ decoder.T`, for inputs in two dimensions."""
    d_sae, d_in = decoder.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_(decoder.T)
        sae.b_enc.fill_(-threshold)
    return sae


@pytest.fixture
def letters(model, monkeypatch):
    monkeypatch.setattr(first_letters, "MIN_LETTERS", 0)
    found = look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=40, probe_lr=0.05))
    return found._replace(probe_f1=torch.ones(26).index_fill(0, torch.arange(4, 26), 0.0))


def test_figures_do_not_depend_on_the_lengths_of_the_decoder_rows(letters):
    torch.manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(24, 8), dim=-1)
    plain, stretched = sae_of(decoder), sae_of(decoder)
    scale = torch.linspace(0.5, 3, 24)
    with torch.no_grad():
        stretched.W_dec.mul_(scale[:, None])
        stretched.W_enc.div_(scale)
    one, other = scores_of(plain, letters), scores_of(stretched, letters)
    assert one.figures == pytest.approx(other.figures, abs=1e-6, nan_ok=True)
    assert one.figures["absorption_fraction"] > 0


def test_at_matched_l0_the_words_have_that_l0(letters):
    torch.manual_seed(0)
    sae = sae_of(torch.nn.functional.normalize(torch.randn(24, 8), dim=-1))
    own = scores_of(sae, letters)
    matched = letters._replace(cfg=FirstLetterConfig(match_l0=True))
    assert own.figures["l0_words"] > 8
    number = letters._replace(cfg=FirstLetterConfig(match_l0=3))
    at_3 = scores_of(sae, matched, 3).figures
    assert at_3["l0_words"] == pytest.approx(3, rel=0.2)
    assert scores_of(sae, number, 7).figures == pytest.approx(at_3, nan_ok=True)
    # An SAE with fewer active latents keeps them.
    assert scores_of(sae, matched, 30).figures == pytest.approx(own.figures, nan_ok=True)
    with pytest.raises(SettingsError, match=r"^first_letters\.match_l0 must be a number"):
        scores_of(sae, matched)


def test_l0_of_a_config():
    assert matched_l0(FirstLetterConfig(), 3) is None
    assert matched_l0(FirstLetterConfig(match_l0=True), 3) == 3
    assert matched_l0(FirstLetterConfig(match_l0=1), 3) == 1


def test_the_largest_activations_over_all_words_are_kept():
    train = torch.tensor([[5.0, 0.0, 1.0], [2.0, 3.0, 0.0]])
    test = torch.tensor([[0.5, -4.0, 0.0]])
    keep_largest((train, test), 1)
    assert train.tolist() == [[5, 0, 0], [0, 3, 0]]
    assert test.tolist() == [[0, -4, 0]]
    keep_largest((train, test), 2)
    assert train.count_nonzero() + test.count_nonzero() == 3
    keep_largest((train, test), 0.1)
    assert train.count_nonzero() + test.count_nonzero() == 1


def test_too_few_words_for_the_prompts(model):
    with pytest.raises(SettingsError, match=r"^first_letters: .* 40 words"):
        look_at_first_letters(model, HOOK, FirstLetterConfig(words=40))
