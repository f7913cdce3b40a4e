import shutil

import pytest
from datasets import Dataset, load_from_disk

from sae_lens_atm.data.model_identity import fingerprint, model_identity, source_identity
from sae_lens_atm.training.run_file import load_run


def test_a_moved_folder_keeps_its_identity(tmp_path, language_model_yaml, gemma_folder):
    moved = shutil.copytree(gemma_folder, tmp_path / "moved")
    runs = [load_run(language_model_yaml, [f"model_name={f}"]) for f in (gemma_folder, moved)]
    first, second = (model_identity(run.runner) for run in runs)
    assert first == second
    (moved / "README.md").write_text("a note")
    (moved / ".cache").mkdir()
    (moved / ".cache" / "file").write_text("x")
    assert fingerprint(moved) == fingerprint(gemma_folder)


@pytest.mark.parametrize("place", [0, 70_000, 2_500_000])
def test_a_changed_byte_in_a_read_block_changes_the_fingerprint(tmp_path, place):
    file = tmp_path / "weights.bin"
    content = bytearray(3_000_000)
    file.write_bytes(content)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    # A block of 65,536 bytes starts at each fifteenth of the rest.
    start = round((3_000_000 - 65_536) / 15 * round(place / 195_631)) if place else 0
    content[start + 5] = 1
    file.write_bytes(content)
    assert fingerprint(tmp_path) != before


def test_a_dataset_that_is_saved_again_keeps_its_identity(tmp_path):
    for name in ("first", "second"):
        Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / name)
    first, second = (source_identity(str(tmp_path / name)) for name in ("first", "second"))
    assert first == second
    Dataset.from_dict({"text": ["a", "c"]}).save_to_disk(tmp_path / "third")
    assert source_identity(str(tmp_path / "third")) != first


def test_a_dataset_that_was_mapped_keeps_its_identity(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path)
    before = source_identity(str(tmp_path))
    load_from_disk(tmp_path).map(lambda row: {"text": 2 * row["text"]})
    assert list(tmp_path.glob("cache-*.arrow"))
    assert source_identity(str(tmp_path)) == before


def test_size_and_name_count(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    first = fingerprint(tmp_path)
    (tmp_path / "a").write_bytes(b"abcd")
    second = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, fingerprint(tmp_path)}) == 3


@pytest.mark.parametrize(
    "change",
    [
        "model_name=someone/else",
        "hook_name=model.layers.0",
        "model_from_pretrained_kwargs={dtype: bfloat16}",
        "autocast_lm=true",
    ],
)
def test_what_changes_the_activations_changes_the_identity(language_model_yaml, change):
    before = model_identity(load_run(language_model_yaml).runner)
    assert model_identity(load_run(language_model_yaml, [change]).runner) != before


def test_the_sae_and_the_training_do_not(language_model_yaml):
    before = model_identity(load_run(language_model_yaml).runner)
    other = load_run(language_model_yaml, ["lr=1e-5", "seed=7", "sae.d_sae=64"])
    assert model_identity(other.runner) == before


def test_a_name_on_the_hub_stays_a_name():
    assert source_identity("google/gemma-2-2b") == "google/gemma-2-2b"


def test_texts_count_and_notes_do_not(tmp_path):
    (tmp_path / "part.txt").write_text("one")
    first = fingerprint(tmp_path)
    for name in ("README.md", "LICENSE", "license.txt", "NOTICE.txt", "picture.png"):
        (tmp_path / name).write_text("a note")
    assert fingerprint(tmp_path) == first
    (tmp_path / "part.txt").write_text("two")
    assert fingerprint(tmp_path) != first
