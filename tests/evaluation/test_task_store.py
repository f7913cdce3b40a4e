from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.task_store import SaeProbesConfig, TaskStore
from sae_lens_atm.training.run_file import load_run
from tests.probing_package import install

CFG = SaeProbesConfig(tasks="all", max_samples=300, seed=1)


@pytest.fixture
def run(language_model_yaml, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    install(tmp_path / "site", monkeypatch)
    return load_run(language_model_yaml).runner


@pytest.fixture
def store(run, tmp_path):
    return TaskStore(run, CFG, tmp_path / "out")


class Loader:
    """Loads the model, and counts how often."""

    def __init__(self, run):
        self.run, self.calls = run, 0

    def __call__(self):
        self.calls += 1
        return load_language_model(self.run)


def silent(_done, _every):
    pass


def test_the_model_reads_each_task_once(run, store, tmp_path):
    load = Loader(run)
    assert store.missing() == store.tasks
    store.fill(load, silent)
    assert store.missing() == []
    store.fill(load, silent)
    for cfg in (replace(CFG, k=[3]), replace(CFG, tasks=1)):
        TaskStore(run, cfg, tmp_path / "out").fill(load, silent)
    assert load.calls == 1
    found = store.read(store.tasks[1])
    assert found.train.shape == (200, 16)
    assert found.test.shape == (99, 16)
    assert found.train_labels.sum() == 100


def test_other_settings_are_other_activations(run, store, tmp_path):
    store.fill(Loader(run), silent)
    for change in ({"max_samples": 299}, {"max_tokens": 2}, {"seed": 2}):
        assert TaskStore(run, replace(CFG, **change), tmp_path / "out").missing()
    run.hook_name = "model.layers.0"
    assert TaskStore(run, CFG, tmp_path / "out").missing()


def test_the_class_decides_the_activation(run, store):
    store.fill(Loader(run), silent)
    for task in store.tasks:  # the last word is that of the class
        found = store.read(task)
        means = [found.train[found.train_labels == label].mean(0) for label in (0, 1)]
        assert (means[0] - means[1]).norm() > 0.1
        assert store.raw_scores(task).auc > 0.75


def test_progress_counts_the_characters_of_all_texts(run, store):
    seen = []
    store.fill(Loader(run), lambda done, every: seen.append((done, every)))
    totals = {every for _, every in seen}
    assert len(totals) == 1
    dones = [done for done, _ in seen]
    assert dones[0] == 0
    assert dones == sorted(dones)
    assert len(set(dones)) == len(dones) >= 3
    assert dones[-1] < totals.pop()


def test_an_interruption_keeps_finished_tasks(run, store, monkeypatch):
    monkeypatch.setattr("sae_lens_atm.evaluation.task_activations._TOKENS_IN_BATCH", 256)
    batches = 0

    def stop(_done, _every):
        nonlocal batches
        batches += 1
        if batches == 6:
            raise KeyboardInterrupt

    load = Loader(run)
    with pytest.raises(KeyboardInterrupt):
        store.fill(load, stop)
    assert store.missing() == store.tasks[1:]
    store.fill(load, silent)
    assert (store.missing(), load.calls) == ([], 2)


def test_a_damaged_file_is_made_again(run, store):
    load = Loader(run)
    store.fill(load, silent)
    before = store.read(store.tasks[0]).train.clone()  # else it is mapped to the file
    file = store._file(store.tasks[0])
    file.write_bytes(file.read_bytes()[:-5])
    assert store.missing() == store.tasks[:1]
    store.fill(load, silent)
    torch.testing.assert_close(store.read(store.tasks[0]).train, before, rtol=0, atol=0)


def test_the_probe_of_the_activations_is_stored(run, store, monkeypatch):
    store.fill(Loader(run), silent)
    scores = store.raw_scores(store.tasks[0])
    monkeypatch.setattr("sae_lens_atm.evaluation.task_store.probe_scores", None)
    assert store.raw_scores(store.tasks[0]) == scores


def test_waiting_for_another_process_can_be_stopped(run, store):
    store._home.mkdir(parents=True)

    def stop(done, every):
        assert (done, every) == (0, 1)
        raise KeyboardInterrupt

    with FileLock(store._home / ".lock"), pytest.raises(KeyboardInterrupt):
        store.fill(Loader(run), stop)


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="sae_probes"):
        TaskStore(run, CFG, tmp_path / "file").fill(Loader(run), silent)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": 0}, "tasks must be above 0"),
        ({"tasks": []}, "tasks must have at least one value"),
        ({"tasks": ["a", "a"]}, "tasks must have .* each once"),
        ({"k": []}, "k must have"),
        ({"k": [1, 1]}, "k must have"),
        ({"k": [0]}, "k must be above 0"),
        ({"max_samples": 255}, "max_samples must be at least 256"),
        ({"max_tokens": 0}, "max_tokens must be above 0"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        SaeProbesConfig(**values)


def test_damaged_scores_are_made_again(run, store):
    store.fill(Loader(run), silent)
    scores = store.raw_scores(store.tasks[0])
    for content in ('{"auc": 0.', '{"other": 1}', "3"):
        store._raw_file(store.tasks[0]).write_text(content)
        assert store.raw_scores(store.tasks[0]) == scores
