import threading

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from sae_lens_atm.data import activation_stream
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run import train
from tests.helpers import state_equal
from tests.training.runs import (
    PRESET_SETTINGS,
    language_model_run,
    resumes_bit_for_bit,
    stopped_after,
    trained_files,
)


@pytest.fixture
def run_file(gemma_folder, text_folder):
    def load(output, *overrides):
        return language_model_run(output, gemma_folder, text_folder, overrides)

    return load


def check(run_file, at, *settings, straight=None):
    resumes_bit_for_bit(lambda output: run_file(output, *settings), at, straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, gemma_folder, text_folder):
    """The run under the default settings, without a stop, and with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("straight")
    train(language_model_run(folder, gemma_folder, text_folder, ["n_checkpoints=3"]))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        PRESET_SETTINGS["paper"],
        ["activations_mixing_fraction=0"],
        ["activations_mixing_fraction=0.9", "n_batches_in_buffer=9"],
        ["activations_mixing_fraction=1"],
        ["n_batches_in_buffer=3"],
        ["exclude_special_tokens=true"],
        ["disable_concat_sequences=true"],
        ["seqpos_slice=[2, 15]"],
        ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=7"],
        ["sae.normalize_activations=covariance_whitening", "n_batches_for_norm_estimate=7"],
        ["lr_scheduler_name=cosineannealing", "lr_warm_up_steps=5", "lr_decay_steps=9"],
        ["streaming=true"],
    ],
    ids=lambda settings: settings[0],
)
def test_resumed_equals_straight(run_file, settings):
    check(run_file, [17], *settings)


def test_and_so_after_several_stops(run_file, straight):
    check(run_file, [1, 12, 13, 39], straight=straight)


def test_and_so_with_prefetched_batches(run_file, straight):
    check(run_file, [9, 23], "prefetch_llm_batches=3", straight=straight)


@pytest.mark.parametrize("prefetch", [0, 4])
def test_and_so_over_several_epochs(run_file, token_dataset, prefetch):
    # 50 rows of 16 tokens: an epoch has 16 steps, and is no multiple of the model's batches.
    token_dataset.select(range(50)).save_to_disk("few")
    own = ["dataset_path=few", "is_dataset_tokenized=true", "store_batch_size_prompts=3"]
    check(run_file, [11, 29], *own, f"prefetch_llm_batches={prefetch}")


def test_and_so_with_rows_of_many_sequences(run_file):
    # SAELens counts rows. Here one row holds many sequences.
    words = " ".join(f"w{i % 60}" for i in range(700))
    Dataset.from_list([{"text": words}] * 6).save_to_disk("long")
    check(run_file, [17], "dataset_path=long")


def test_from_a_periodic_checkpoint(run_file, straight):
    for name in ("528", "1008"):
        train(run_file(f"from-{name}"), resume=straight / "checkpoints" / name)
        assert state_equal(trained_files(straight), trained_files(f"from-{name}"))


def test_outside_the_main_thread(run_file, straight):
    def work():
        check(run_file, [17], "prefetch_llm_batches=2", straight=straight)
        done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_a_buffer_that_is_too_large_is_not_saved(run_file, straight, monkeypatch):
    monkeypatch.setattr(activation_stream, "MOST_BYTES", 1000)
    with pytest.warns(UserWarning, match="the activation buffer .* is not saved"):
        checkpoint = stopped_after(17, run_file("out"))
    saved = load_file(checkpoint / activation_stream.STREAM_FILENAME)
    assert saved.keys() == {"sequences"}
    with pytest.warns(UserWarning, match="holds no activation buffer"):
        result = train(run_file("out"), resume="out")
    assert result.sae.tracker.steps.item() == 40
    assert not state_equal(trained_files(straight), trained_files("out"))


def test_a_model_in_bfloat16_takes_half_the_space(run_file):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        own = f"model_from_pretrained_kwargs={{dtype: {dtype}}}"
        checkpoint = stopped_after(17, run_file(dtype, own))
        saved = load_file(checkpoint / activation_stream.STREAM_FILENAME)
        sizes[dtype] = saved["kept"].nbytes + saved["waiting"].nbytes
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    train(run_file("straight", own))
    train(run_file("bfloat16", own), resume="bfloat16")
    assert state_equal(trained_files("straight"), trained_files("bfloat16"))


def test_a_stop_before_the_first_step_leaves_the_checkpoint_that_there_was(run_file):
    stop = StopFlag()
    stop.request()
    with pytest.raises(Interrupted) as caught:
        train(run_file("out", "prefetch_llm_batches=3"), stop=stop)
    assert caught.value.checkpoint is None
    stopped_after(9, run_file("out", "prefetch_llm_batches=3"))
    with pytest.raises(Interrupted) as caught:
        train(run_file("out", "prefetch_llm_batches=3"), resume="out", stop=stop)
    assert caught.value.checkpoint == newest_checkpoint("out")
