from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_atm.data.spelling import model as spelling_model
from sae_lens_atm.data.spelling.model import (
    TOKENS,
    Rows,
    is_spelling_lm,
    make_spelling_lm,
)
from sae_lens_atm.errors import SettingsError
from tests.data.spelling.lm import few_rows, few_words, tiny


@pytest.fixture(autouse=True)
def text_of_few_words(monkeypatch):
    monkeypatch.setattr(spelling_model, "text", few_rows)


def test_rows_are_text_questions_and_answers():
    rows = Rows(few_rows(), 24, torch.Generator().manual_seed(0)).draw(8)[0]
    assert rows.shape == (8, 24)
    assert (rows[:, 0] == 0).all()
    words = [[few_words()[i] for i in row] for row in rows[:, 1:].tolist()]
    assert all((b - a) % 10 == 1 for row in rows[:4, 1:].tolist() for a, b in pairwise(row))
    for row in words[4:6]:
        assert row[0] == "\n"
        assert row[2:7] == ["has", "the", "first", "letter", ":"]
        assert row[7] == row[1][0].upper()
    for row in words[6:]:
        assert all(row[i + 2] == row[i + 1][0].upper() for i in range(0, 21, 3))


def test_answers_are_where_they_are_said_to_be():
    rows, is_answer = Rows(few_rows(), 24, torch.Generator().manual_seed(0)).draw(8)
    assert not is_answer[:4].any()
    assert is_answer[4:6].nonzero()[:, 1].tolist() == [8, 16] * 2
    assert is_answer[6:].nonzero()[:, 1].tolist() == [3, 6, 9, 12, 15, 18, 21] * 2
    assert (rows[is_answer] >= few_words().index("A")).all()


def test_letters_are_asked_for_equally_often():
    rows = Rows(few_rows(), 24, torch.Generator().manual_seed(0)).draw(4000)[0]
    first = few_words().index("A")
    letters = rows[2000:, 1:].flatten().bincount()[first : first + 4].float()
    assert (letters / letters.mean() - 1).abs().max() < 0.05


def test_the_same_seed_makes_the_same_model(tmp_path):
    a = make_spelling_lm(tiny(), tmp_path / "a")
    torch.rand(7)
    b = make_spelling_lm(tiny(), tmp_path / "b")
    c = make_spelling_lm(tiny(seed=1), tmp_path / "c")
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (a, b, c)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    datasets = [load_from_disk(str(folder / TOKENS))["tokens"] for folder in (a, b)]
    assert list(datasets[0]) == list(datasets[1])


def test_making_it_leaves_random_numbers_alone(tmp_path):
    before = torch.get_rng_state()
    make_spelling_lm(tiny(), tmp_path / "lm")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_is_there_is_not_made_again(tmp_path):
    folder = make_spelling_lm(tiny(), tmp_path / "lm")
    assert is_spelling_lm(tiny(), folder)
    assert not is_spelling_lm(tiny(seed=1), folder)
    steps = []
    make_spelling_lm(tiny(), folder, steps.append)
    assert not steps


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="FOLDER must be a new or an empty folder"):
        make_spelling_lm(tiny(), tmp_path / "lm")
    assert (tmp_path / "lm" / "thesis.txt").read_text() == "mine"


def test_training_lowers_the_loss(tmp_path):
    losses = []
    make_spelling_lm(tiny(steps=60, noise=0.1), tmp_path / "lm", losses.append)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_it_is_saved_as_transformers_wants_it(tmp_path):
    folder = make_spelling_lm(tiny(), tmp_path / "lm")
    ids = AutoTokenizer.from_pretrained(folder)("\nbee has", return_tensors="pt").input_ids
    assert ids.tolist() == [[0, 4, 11, 5]]
    assert AutoModelForCausalLM.from_pretrained(folder)(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    {"steps": 0, "lr": 0.0, "noise": -1.0, "context_size": 8, "heads": 3}.items(),
)
def test_an_error_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must|multiple of {field}"):
        tiny(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 3}, "batch_size must be 4 or more"),
        ({"dataset_rows": 3}, "dataset_rows must be 4 or more"),
        ({"steps": 0}, "steps must be 1 or more"),
    ],
)
def test_values_that_leave_no_rows_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        tiny(**values)


def test_what_cannot_be_saved_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"FOLDER must be a new or an empty folder, got '\.'"):
        make_spelling_lm(tiny(), Path())
    with pytest.raises(SettingsError, match="context_size must be at most"):
        make_spelling_lm(tiny(context_size=2**20), tmp_path / "lm")


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_few_steps(tmp_path, steps):
    assert is_spelling_lm(tiny(steps=steps), make_spelling_lm(tiny(steps=steps), tmp_path / "lm"))
