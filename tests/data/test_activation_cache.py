import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_atm.data import cache_writer
from sae_lens_atm.data.activation_cache import (
    ActivationCache,
    CachedBatches,
    CacheSettings,
    held_out_contexts,
)
from sae_lens_atm.data.cache_writer import (
    check_cache_folder,
    plan_cache,
    whole_contexts,
    write_cache,
)
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.errors import CheckpointError, SaveError, SettingsError
from sae_lens_atm.evaluation.language_model import make_store
from sae_lens_atm.files import manifest_mismatch
from sae_lens_atm.training.run_file import load_run
from tests.conftest import CONTEXT

D_IN = 16
CONTEXT_BYTES = CONTEXT * (D_IN * 4 + 4)


def config(path, *overrides):
    return load_run(path, overrides).runner


def fresh_store(cfg):
    return whole_contexts(make_store(cfg, load_language_model(cfg)))


def written(cfg, **settings):
    settings = CacheSettings(**{"cache": "cached", "dtype": "float32", **settings})
    done = list(write_cache(cfg, settings, fresh_store(cfg)))
    return settings, done


@pytest.fixture
def small_files(monkeypatch):
    """Files of 8 contexts."""
    monkeypatch.setattr(cache_writer, "_FILE_BYTES", 8 * CONTEXT_BYTES)


@pytest.fixture
def cfg(language_model_yaml):
    return config(language_model_yaml)


# --- what is in a cache --------------------------------------------------------------------------


@pytest.mark.usefixtures("small_files")
def test_a_cache_holds_the_activations_of_the_text_in_order(cfg):
    settings, done = written(cfg, tokens=30 * CONTEXT)
    assert done == [4, 8, 12, 16, 20, 24, 28, 30]
    cache = ActivationCache(settings.folder, cfg)
    assert cache.contexts == 30
    assert len(list(settings.folder.glob("*.arrow"))) == 4
    store = fresh_store(cfg)
    tokens = torch.cat([store.get_batch_tokens(4) for _ in range(8)])[:30]
    assert np.array_equal(cache.tokens, tokens.numpy())
    expected = store.get_activations(tokens).flatten(0, 1)
    rows = np.random.default_rng(0).permutation(30 * CONTEXT)[:200]
    torch.testing.assert_close(cache.read(rows), expected[rows], atol=1e-6, rtol=1e-5)


def test_half_precision_is_rounded_once(cfg):
    whole, _ = written(cfg, tokens=8 * CONTEXT)
    half, _ = written(cfg, tokens=8 * CONTEXT, cache="half", dtype="float16")
    rows = np.arange(8 * CONTEXT)
    exact = ActivationCache(whole.folder, cfg).read(rows)
    assert torch.equal(ActivationCache(half.folder, cfg).read(rows), exact.half().float())


def test_by_default_a_cache_holds_the_tokens_of_evaluation_and_training(cfg):
    plan = plan_cache(cfg, CacheSettings("x"))
    assert held_out_contexts(cfg) == 4
    assert plan.contexts == 4 + 2560 // CONTEXT
    assert plan.bytes == plan.contexts * CONTEXT * (D_IN * 2 + 4)


def test_saelens_reads_a_cache(cfg, language_model_yaml):
    settings, _ = written(cfg, tokens=8 * CONTEXT)
    cached = config(
        language_model_yaml,
        "use_cached_activations=true",
        f"cached_activations_path={settings.folder}",
    )
    store = ActivationsStore.from_config(
        None, cached, override_dataset=Dataset.from_list([{"tokens": [0] * CONTEXT}])
    )
    values, tokens = store.get_raw_llm_batch()
    cache = ActivationCache(settings.folder, cfg)
    assert torch.equal(values, cache.read(np.arange(4 * CONTEXT)))
    assert np.array_equal(tokens.numpy(), cache.tokens[:4].ravel())


def test_rows_leave_out_positions_and_tokens(language_model_yaml):
    settings, _ = written(config(language_model_yaml), tokens=4 * CONTEXT)

    def rows(*overrides, first=0, last=None):
        changed = config(language_model_yaml, *overrides)
        return ActivationCache(settings.folder, changed).rows(first, last).tolist()

    every = list(range(4 * CONTEXT))
    assert rows() == every
    assert rows(first=1, last=3) == every[CONTEXT : 3 * CONTEXT]
    assert rows("seqpos_slice=[1, null]") == [i for i in every if i % CONTEXT]
    tokens = ActivationCache(settings.folder, config(language_model_yaml)).tokens.ravel()
    some = int(tokens[5])
    assert rows(f"exclude_special_tokens=[{some}]") == [i for i in every if tokens[i] != some]
    special = json.loads((settings.folder / "cache.json").read_text())["special_tokens"]
    kept = rows("exclude_special_tokens=true")
    assert kept == [i for i in every if tokens[i] not in special]
    assert len(kept) < len(every)


# --- batches -------------------------------------------------------------------------------------


class Rows:
    """In the place of a cache: an activation is its own number."""

    folder = "cached"

    def read(self, rows):
        return torch.from_numpy(rows.copy())


def batches(number, size, seed=0, position=0):
    return CachedBatches(Rows(), np.arange(number), size, seed, position)


def test_each_pass_serves_each_activation_once_in_another_order():
    served = torch.cat(list(islice(batches(10, 4), 5))).tolist()  # two passes
    assert sorted(served[:10]) == sorted(served[10:]) == list(range(10))
    assert served[:10] != served[10:]
    other = torch.cat(list(islice(batches(10, 4, seed=1), 5))).tolist()
    assert other != served


def test_the_whole_cache_is_shuffled():
    first = next(batches(100_000, 1000)).float()
    # The mean of 1,000 of 100,000 numbers has a standard error of 908.
    assert abs(first.mean() - 50_000) < 4 * 908


def test_a_position_is_the_number_of_batches(tmp_path):
    whole = list(islice(batches(10, 4), 9))
    stopped = batches(10, 4)
    next(stopped), next(stopped), next(stopped)
    stopped.save_to_checkpoint(tmp_path)
    resumed = batches(10, 4)
    resumed.load_from_checkpoint(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=False))
    with pytest.raises(CheckpointError, match="did not read cached activations"):
        resumed.load_from_checkpoint(tmp_path / "elsewhere")


def test_a_process_reads_its_own_rows():
    own = CachedBatches(Rows(), np.arange(8), 4, 0, own_rows=lambda rows: rows[2:])
    assert torch.equal(next(own), next(batches(8, 4))[2:])


def test_a_batch_larger_than_the_cache_is_refused():
    with pytest.raises(SettingsError, match="holds 3 activations for training, fewer than a"):
        batches(3, 4)


# --- bad caches ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("hook_name=model.layers.0", "hook_name"),
        ("context_size=8", "context_size"),
        ("sae.d_in=8", "sae.d_in"),
        ("model_name=someone/else", "model_name"),
        ("dataset_path=someone/else", "dataset_path"),
        ("prepend_bos=false", "prepend_bos"),
    ],
)
def test_a_cache_of_something_else_is_refused(cfg, language_model_yaml, change, name):
    settings, _ = written(cfg, tokens=4 * CONTEXT)
    with pytest.raises(SettingsError, match=rf"^activations\.cache cached .* another {name} "):
        ActivationCache(settings.folder, config(language_model_yaml, change))
    with pytest.raises(SettingsError, match=f"another {name} "):
        check_cache_folder(config(language_model_yaml, change), settings, plan_cache(cfg, settings))


def test_a_damaged_cache_is_refused(cfg):
    settings, _ = written(cfg, tokens=4 * CONTEXT)
    file = next(settings.folder.glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    assert "does not match its checksum" in manifest_mismatch(settings.folder)
    file.write_bytes(content[:-1])
    with pytest.raises(SettingsError, match=r"^activations\.cache cached is damaged .*bytes"):
        ActivationCache(settings.folder, cfg)
    (settings.folder / "cache.json").write_text("{")
    with pytest.raises(SettingsError, match="is damaged"):
        ActivationCache(settings.folder, cfg)


def test_no_cache_says_how_to_make_one(cfg, tmp_path):
    with pytest.raises(SettingsError, match="holds no cache: run `sae-lens-atm cache`"):
        ActivationCache(tmp_path / "nowhere", cfg)


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("batches_done", [1, 3, 5])
def test_a_stopped_cache_goes_on_and_equals_a_whole_one(cfg, batches_done):
    whole, _ = written(cfg, tokens=24 * CONTEXT, cache="whole")
    settings = CacheSettings("stopped", 24 * CONTEXT, "float32")
    list(islice(write_cache(cfg, settings, fresh_store(cfg)), batches_done))
    with pytest.raises(SettingsError, match="holds an incomplete cache"):
        ActivationCache(settings.folder, cfg)
    written(cfg, tokens=24 * CONTEXT, cache="stopped")
    for file in whole.folder.glob("*.arrow"):
        assert (settings.folder / file.name).read_bytes() == file.read_bytes()
    assert manifest_mismatch(settings.folder) is None


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_complete_files_only(cfg, monkeypatch):
    settings = CacheSettings("cached", 24 * CONTEXT, "float32")
    save = Dataset.save_to_disk
    calls = []

    def full(self, path, **kwargs):
        calls.append(path)
        save(self, path, **kwargs)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "save_to_disk", full)
    with pytest.raises(SaveError, match="No space left"):
        list(write_cache(cfg, settings, fresh_store(cfg)))
    assert [f.name for f in settings.folder.glob("*.arrow")] == ["data-00000-of-00003.arrow"]
    assert not (settings.folder / ".partial").exists()
    with pytest.raises(SettingsError, match="incomplete"):
        ActivationCache(settings.folder, cfg)
    list(write_cache(cfg, settings, fresh_store(cfg)))  # there is space again
    assert ActivationCache(settings.folder, cfg).contexts == 24


def test_a_disk_that_is_too_small_is_told_before(cfg, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    settings = CacheSettings("cached", 30_000_000)
    with pytest.raises(SettingsError, match=r"needs 1\.0 GiB, and the disk has 0\.0 GiB free"):
        check_cache_folder(cfg, settings, plan_cache(cfg, settings))


def test_a_folder_with_other_files_is_refused(cfg, tmp_path):
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "thesis.tex").write_text("x")
    settings = CacheSettings("cached")
    with pytest.raises(SettingsError, match="is not empty"):
        check_cache_folder(cfg, settings, plan_cache(cfg, settings))


def test_another_size_is_refused(cfg):
    _settings, _ = written(cfg, tokens=8 * CONTEXT)
    for change in ({"tokens": 12 * CONTEXT}, {"dtype": "float16"}):
        other = CacheSettings(
            **{"cache": "cached", "tokens": 8 * CONTEXT, "dtype": "float32"} | change
        )
        with pytest.raises(SettingsError, match="was begun with another"):
            check_cache_folder(cfg, other, plan_cache(cfg, other))


def test_values_that_do_not_fit_are_refused(cfg):
    store = fresh_store(cfg)
    inner = store.get_activations
    for factor, remedy in ((1e6, "float32"), (float("inf"), "the model")):
        store.get_activations = lambda tokens, factor=factor: inner(tokens) * factor
        with pytest.raises(SettingsError, match=f"float16 cannot hold: .*{remedy}"):
            list(write_cache(cfg, CacheSettings("cached", 4 * CONTEXT), store))


def test_too_little_text_is_refused(cfg):
    with pytest.raises(SettingsError, match=r"dataset_path .* has .* tokens, and the cache needs"):
        written(cfg, tokens=8000 * CONTEXT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{}", r"activations\.cache: missing"),
        ("{cache: ''}", r"activations\.cache must be a folder"),
        ("{cache: x, tokens: 0}", r"activations\.tokens must be above 0, got 0"),
        ("{cache: x, dtype: int8}", r"activations\.dtype must be one of float16, float32"),
        ("{folder: x}", r"activations\.folder: unknown key"),
    ],
)
def test_bad_settings(language_model_yaml, values, message):
    with pytest.raises(SettingsError, match=message):
        config(language_model_yaml, f"activations={values}")
