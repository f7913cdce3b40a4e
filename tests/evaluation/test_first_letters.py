import random

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.load_model import load_model
from transformers import AutoModelForCausalLM

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation import first_letters
from sae_lens_atm.evaluation.first_letters import (
    FirstLetterConfig,
    figures_of,
    letter_of,
    look_at_first_letters,
    prompt,
    residual_stream,
    scores_of,
    words_of,
)
from tests.data.spelling.lm import few_words, tiny_lm
from tests.helpers import make_sae

HOOK = "transformer.h.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm") / "lm", layers=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_model("AutoModelForCausalLM", str(folder), device="cpu", hook_names=[HOOK])


class Tokenizer:
    """GPT-2's way: a space belongs to the word after it."""

    def get_vocab(self):
        return {"Ġcat": 0, "cat": 1, "Ġ": 2, "naïve": 3, "Ġa1": 4, "ĠĠdog": 5, "C": 6}

    def convert_tokens_to_string(self, tokens):
        return tokens[0].replace("Ġ", " ")


def test_words_are_in_ascii_letters_with_one_leading_space_at_most():
    assert words_of(Tokenizer()) == [" cat", "C", "cat"]


def test_letters_ignore_space_and_case():
    assert [letter_of(word) for word in (" ant", "Bee", "z")] == [0, 1, 25]


def test_a_prompt_answers_ten_questions_and_asks_one():
    words = [f" w{'abcdefghijkl'[i]}" for i in range(12)]
    text = prompt(" wa", words, random.Random(0))
    lines = text.split("\n")
    assert lines[0] == ""
    assert len(lines) == 12
    assert lines[-1] == " wa has the first letter:"
    assert all(line.endswith(" has the first letter: W") for line in lines[1:-1])
    assert " wa has the first letter: W" not in lines
    assert len(set(lines)) == 12


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
    assert found.shares.sum() == pytest.approx(1)
    assert len(found.asked) == len(found.test.x)


def test_too_few_letters_count_for_nothing(model):
    found = look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=1))
    enough = found._replace(probe_f1=torch.tensor([0.7] * 20 + [0.6] * 6))
    assert enough.counts.tolist() == [True] * 20 + [False] * 6
    assert not found._replace(probe_f1=torch.tensor([0.7] * 19 + [0.6] * 7)).counts.any()


@pytest.mark.parametrize("architecture", ["atm", "topk"])
def test_a_saved_sae_has_figures_and_they_repeat(model, architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(first_letters, "MIN_LETTERS", 0)
    found = look_at_first_letters(model, HOOK, FirstLetterConfig(probe_epochs=40, probe_lr=0.05))
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
    assert figures["probe_f1"] == 1
    assert 0 <= figures["absorption_fraction"] <= 1
    assert {"k1_f1", "sparse_probing_1", "sparse_probing_2", "sparse_probing_5"} <= figures.keys()


@pytest.mark.parametrize("field", ["probe_epochs", "probe_lr", "sparse_batch_size"])
def test_an_error_names_the_field(field):
    with pytest.raises(ValueError, match=f"^{field} must"):
        FirstLetterConfig(**{field: 0})


def test_too_few_words_for_the_prompts(hooked_model):
    hooked_model.tokenizer = Tokenizer()
    with pytest.raises(SettingsError, match=r"^first_letters: .* 3 words"):
        look_at_first_letters(hooked_model, HOOK, FirstLetterConfig())
    hooked_model.tokenizer = None
