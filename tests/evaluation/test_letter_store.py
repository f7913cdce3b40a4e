import json
import threading

import pytest
import torch
from filelock import FileLock
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.load_model import load_model
from safetensors.torch import load_file

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.first_letters import look_at_first_letters
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.letter_store import are_stored, first_letters_of
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from tests.data.spelling.lm import tiny_lm

CFG = FirstLetterConfig(probe_epochs=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny_lm(tmp_path_factory.mktemp("lm") / "lm", layers=2)
    return LanguageModelSAERunnerConfig(
        sae=ATMTrainingSAEConfig(d_in=8, d_sae=16, k=2),
        model_name=str(folder),
        model_class_name="AutoModelForCausalLM",
        hook_name="transformer.h.0",
        device="cpu",
    )


@pytest.fixture
def load(run):
    def load():
        load.calls += 1
        return load_model(
            "AutoModelForCausalLM", run.model_name, device="cpu", hook_names=[run.hook_name]
        )

    load.calls = 0
    return load


def same(a, b):
    tensors = ("asked", "probe_f1")
    assert a.words == b.words
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    for name in ("train", "test", "probe"):
        assert all(map(torch.equal, getattr(a, name), getattr(b, name)))


def test_the_model_is_loaded_once(run, load, tmp_path):
    assert not are_stored(run, CFG, tmp_path)
    first = first_letters_of(run, CFG, load, tmp_path)
    assert are_stored(run, CFG, tmp_path)
    same(first, first_letters_of(run, CFG, load, tmp_path))
    assert load.calls == 1
    same(first, look_at_first_letters(load(), ModelHook("transformer.h.0"), CFG))
    same(first, first_letters_of(run, CFG, load))
    assert load.calls == 3


def test_settings_of_the_probes_and_of_the_figures_need_no_model(run, load, tmp_path):
    first = first_letters_of(run, CFG, load, tmp_path)
    longer = first_letters_of(run, FirstLetterConfig(probe_epochs=4), load, tmp_path)
    figures = FirstLetterConfig(probe_epochs=2, min_f1=0.1, match_l0=True, sparse_batch_size=8)
    again = first_letters_of(run, figures, load, tmp_path)
    assert load.calls == 1
    assert torch.equal(first.train.x, longer.train.x)
    assert not torch.equal(first.probe.weight, longer.probe.weight)
    same(first, again)
    assert again.cfg == figures


def test_other_words_another_seed_or_another_hook_need_the_model(run, load, tmp_path):
    first_letters_of(run, CFG, load, tmp_path)
    for cfg in (FirstLetterConfig(seed=1), FirstLetterConfig(words=59)):
        assert not are_stored(run, cfg, tmp_path)
    run.hook_name = "transformer.h.1"
    assert not are_stored(run, CFG, tmp_path)
    run.hook_name = "transformer.h.0"
    assert are_stored(run, CFG, tmp_path)


def test_the_words_are_there_to_read(run, load, tmp_path):
    found = first_letters_of(run, CFG, load, tmp_path)
    (path,) = (tmp_path / "first-letters").glob("activations-*/words.json")
    content = json.loads(path.read_text())
    assert (content["train"], content["test"]) == found.words
    assert content["hook_name"] == "transformer.h.0"


def test_a_damaged_file_is_made_again(run, load, tmp_path):
    first = first_letters_of(run, CFG, load, tmp_path)
    (path,) = (tmp_path / "first-letters").glob("activations-*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert not are_stored(run, CFG, tmp_path)
    same(first, first_letters_of(run, CFG, load, tmp_path))
    assert load.calls == 2
    assert torch.equal(load_file(path)["train"], first.train.x)


def test_an_interruption_leaves_nothing_behind(run, load, tmp_path):
    def stop(done, _batches):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_letters_of(run, CFG, load, tmp_path, stop)
    assert not list((tmp_path / "first-letters").glob("*-*/*"))
    assert not are_stored(run, CFG, tmp_path)
    first_letters_of(run, CFG, load, tmp_path)  # its lock is free


def test_a_second_process_waits_and_can_be_stopped(run, load, tmp_path):
    first_letters_of(run, CFG, load, tmp_path)
    (lock_file,) = (tmp_path / "first-letters").glob(".*.lock")
    held, done = FileLock(lock_file), threading.Event()

    def hold():
        with held:
            taken.set()
            done.wait(20)

    taken = threading.Event()
    other = threading.Thread(target=hold)
    other.start()
    taken.wait(20)

    def stop(*progress):
        assert progress == (0, 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_letters_of(run, CFG, load, tmp_path, stop)
    done.set()
    other.join()
    first_letters_of(run, CFG, load, tmp_path, stop)
    assert load.calls == 1


def test_a_folder_that_cannot_be_written_is_one_line(run, load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file is no folder"):
        first_letters_of(run, CFG, load, tmp_path / "file" / "out")
    assert load.calls == 0
