"""Timing a language model: its evaluation and its prompts."""

import time

import pytest

from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.training.preflight import timed_model
from sae_lens_atm.training.preflight.timed_model import TimedModel
from sae_lens_atm.training.preflight.timing import NotTimed, Timed
from sae_lens_atm.training.run_file import load_run
from tests.helpers import make_sae, train


@pytest.fixture
def model(language_model_yaml):
    return TimedModel.load(load_run(language_model_yaml, ["n_eval_batches=3"]).runner)


def test_what_all_saes_share_is_timed_once(model, monkeypatch):
    def figures(_sae, _model, tokens, _cfg):
        time.sleep(0.01 if tokens.shared else 0.05)
        tokens.shared["hook"] = None

    monkeypatch.setattr(timed_model, "language_model_figures", figures)
    first, further = model.time_evaluation(make_sae(d_in=16, d_sae=32), 1.0)
    assert first.size == 4 * 16
    assert first.seconds > 2 * further > 0


def test_the_time_of_an_evaluation_is_that_of_all_its_batches(model, monkeypatch):
    def half_of_the_work(work, sizes, _limit):
        work(sizes[0])
        return Timed(10.0, sizes[0], sizes[-1])

    monkeypatch.setattr(timed_model, "time_work", half_of_the_work)
    first, further = model.time_evaluation(train(make_sae(d_in=16, d_sae=32), 1).eval(), 1.0)
    assert first.seconds + further == pytest.approx(3 * 10.0)


def test_prompts_are_counted_and_timed(model, monkeypatch):
    class Tokenizer:
        def get_vocab(self):
            letters = "abcdefghij"
            return {f" {a}{b}": i for i, a in enumerate(letters) for b in letters}

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    model.model.tokenizer = Tokenizer()
    asked = []
    monkeypatch.setattr(
        timed_model, "residual_stream", lambda _model, _hook, prompts: asked.append(len(prompts))
    )
    cfg = FirstLetterConfig()
    number, seconds = model.time_prompts(cfg, 1.0)
    assert number == 120
    assert max(asked) == 20  # the test words
    assert seconds > 0


def test_a_dataset_that_is_not_here_is_not_timed(language_model_yaml):
    with pytest.raises(NotTimed, match="nowhere"):
        TimedModel.load(load_run(language_model_yaml, ["dataset_path=nowhere"]).runner)
