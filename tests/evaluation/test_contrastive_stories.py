import random

import pytest
import torch
from datasets import Dataset, DatasetDict

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.contrastive_stories import (
    ContrastiveStoriesConfig,
    contrastive_figures,
    read_stories,
    story_activations,
)
from sae_lens_atm.metrics import ContrastiveScore
from sae_lens_atm.training.run_file import load_run
from tests.helpers import make_sae, train

WORDS = [f"w{i}" for i in range(60)]


def stories(number, seed=0):
    """Pairs of stories of 1 to 90 words, some longer than the context of the model."""
    draw = random.Random(seed)
    return [
        tuple(" ".join(draw.choices(WORDS, k=draw.randint(1, 90))) for _ in range(2))
        for _ in range(number)
    ]


def save(pairs, folder):
    rows = [{"story1": one, "story2": other, "subject_title": "x"} for one, other in pairs]
    Dataset.from_list(rows).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture
def run(language_model_yaml):
    return load_run(language_model_yaml).runner


def test_pairs_are_at_even_distances(tmp_path):
    pairs = stories(10)
    folder = save(pairs, tmp_path / "stories")
    assert read_stories(ContrastiveStoriesConfig(folder)) == pairs
    assert read_stories(ContrastiveStoriesConfig(folder, None)) == pairs
    assert read_stories(ContrastiveStoriesConfig(folder, 3)) == [pairs[i] for i in (0, 3, 6)]
    assert read_stories(None) == []


def test_the_train_split_of_a_saved_dictionary_is_read(tmp_path):
    test, rows = (Dataset.from_dict({"story1": [x], "story2": ["w2 w3"]}) for x in ("w9", "w1"))
    DatasetDict({"test": test, "train": rows}).save_to_disk(str(tmp_path / "splits"))
    assert read_stories(ContrastiveStoriesConfig(str(tmp_path / "splits"))) == [("w1", "w2 w3")]


def test_a_folder_of_json_lines_is_read(tmp_path):
    Dataset.from_dict({"story1": ["w1"], "story2": ["w2"]}).to_json(tmp_path / "train.jsonl")
    assert read_stories(ContrastiveStoriesConfig(str(tmp_path))) == [("w1", "w2")]


def test_the_score_by_hand(run):
    model = load_language_model(run)
    pairs = stories(5)
    calls = []
    found = story_activations(model, run, pairs, lambda *done: calls.append(done))
    assert calls[0] == (0, 10)
    sae = train(make_sae(d_in=16, d_sae=32, k=4), 3).eval()
    expected = ContrastiveScore()
    for pair, read in zip(pairs, found, strict=True):
        acts = []
        for story, x in zip(pair, read, strict=True):
            ids = torch.tensor([[0, *(4 + WORDS.index(w) for w in story.split())][:64]])
            with torch.no_grad():
                _, cache = model.run_with_cache(ids, names_filter=[run.hook_name])
                alone = cache[run.hook_name][0]
                acts.append(sae.encode(alone))
            torch.testing.assert_close(x, alone, atol=1e-5, rtol=1e-5)
        expected.update(*acts)
    figures = contrastive_figures(sae, found)
    assert figures == {"contrastive_score": pytest.approx(expected.compute(), rel=1e-4)}


def test_without_stories_there_is_no_score(run):
    assert story_activations(None, run, []) == []
    assert contrastive_figures(make_sae(), []) == {}


def test_a_callback_can_stop_the_reading(run):
    def stop(*_done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        story_activations(load_language_model(run), run, stories(2), stop)


def test_a_dataset_with_other_columns_is_one_line(tmp_path):
    (tmp_path / "train.csv").write_text("story1,text\nw1,w2\n")
    with pytest.raises(SettingsError) as caught:
        read_stories(ContrastiveStoriesConfig(str(tmp_path)))
    assert str(caught.value) == (
        "contrastive_stories.dataset must have the columns story1 and story2, got "
        f"{str(tmp_path)!r} with story1, text"
    )


def test_datasets_without_rows_are_one_line(tmp_path):
    (tmp_path / "train.csv").write_text("story1,story2\n")
    Dataset.from_dict({"story1": [], "story2": []}).save_to_disk(str(tmp_path / "empty"))
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(SettingsError, match=r"^contrastive_stories\.dataset must be a name"):
            read_stories(ContrastiveStoriesConfig(str(folder)))


def test_a_dataset_that_cannot_be_read_is_one_line():
    with pytest.raises(SettingsError) as caught:
        read_stories(ContrastiveStoriesConfig("nobody/nothing-here"))
    assert str(caught.value).startswith("contrastive_stories.dataset must be a name on the Hub")
    assert "got 'nobody/nothing-here'" in str(caught.value)
    assert "\n" not in str(caught.value)
