import threading

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from sae_lens_atm.data import activation_stream as stream
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.training.watch import StopFlag
from tests.helpers import ACTIVATIONS, SCHEDULES

# A buffer of 16 rows of 16 tokens, refilled by 4 rows; batches of 48 that divide neither.
ORDINARY = ["activations_mixing_fraction=0.5", "n_batches_in_buffer=16"]
ORDINARY += ["train_batch_size_tokens=48", "training_tokens=1920"]


@pytest.fixture
def run_file(language_model_yaml):
    def load(output, *more):
        return load_run(language_model_yaml, [*ORDINARY, f"output_path={output}", *more])

    return load


def stopped_after(steps, run, resume=None, **kwargs):
    stop = StopFlag()

    def on_step(trainer, _):
        if trainer.n_training_steps + 1 == steps:
            stop.request()

    with pytest.raises(Interrupted):
        train(run, resume, on_step, stop, **kwargs)


def finished(folder):
    return {
        **load_file(f"{folder}/sae_weights.safetensors"),
        **load_file(f"{folder}/sparsity.safetensors"),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check(run_file, at, *settings):
    """A run that was stopped after these numbers of steps is the run that was not."""
    train(run_file("straight", *settings))
    resume = None
    for steps in at:
        stopped_after(steps, run_file("stopped", *settings), resume)
        torch.manual_seed(12345)  # a new process
        resume = "stopped"
    train(run_file("stopped", *settings), resume=resume)
    assert same(finished("straight"), finished("stopped"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_resumed_equals_straight(run_file, activation, schedule):
    check(run_file, [17], f"sae.activation={activation}", f"sae.schedule={schedule}")


@pytest.mark.parametrize(
    "settings",
    [
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
def test_and_so_under_other_settings(run_file, settings):
    check(run_file, [17], *settings)


@pytest.mark.parametrize("prefetch", ["true", "3", "20"])
def test_and_so_when_batches_are_made_ahead(run_file, prefetch):
    check(run_file, [9, 23], f"prefetch_llm_batches={prefetch}")


@pytest.mark.parametrize("at", [[1, 2, 3], [5, 39], [12, 13, 30]])
def test_and_so_after_several_stops(run_file, at):
    check(run_file, at)


@pytest.mark.parametrize("prefetch", [0, 4])
def test_and_so_over_several_epochs(run_file, token_dataset, prefetch):
    # 50 rows of 16 tokens: an epoch is 16 steps, and does not divide by the rows of a model batch.
    token_dataset.select(range(50)).save_to_disk("few")
    own = ["dataset_path=few", "is_dataset_tokenized=true", "store_batch_size_prompts=3"]
    check(run_file, [11, 29], *own, f"prefetch_llm_batches={prefetch}")


def test_and_so_with_rows_of_many_sequences(run_file):
    # One row gives many sequences: SAELens' count of rows does not tell where in it one was.
    words = " ".join(f"w{i % 60}" for i in range(700))
    Dataset.from_list([{"text": words}] * 6).save_to_disk("long")
    check(run_file, [17], "dataset_path=long")


def test_from_a_periodic_checkpoint(run_file):
    train(run_file("straight", "n_checkpoints=3"))
    for name in ("528", "1008"):
        train(run_file(f"from-{name}"), resume=f"straight/checkpoints/{name}")
        assert same(finished("straight"), finished(f"from-{name}"))


def test_outside_the_main_thread(run_file):
    def work():
        check(run_file, [17], "prefetch_llm_batches=2")
        done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_a_buffer_that_is_too_large_is_not_saved(run_file, monkeypatch):
    monkeypatch.setattr(stream, "MOST_BYTES", 1000)
    with pytest.warns(UserWarning, match="the activation buffer .* is not saved"):
        stopped_after(17, run_file("out"))
    saved = load_file(newest_checkpoint("out") / stream.STREAM_FILENAME)
    assert saved.keys() == {"sequences"}
    with pytest.warns(UserWarning, match="holds no activation buffer"):
        result = train(run_file("out"), resume="out")
    assert result.sae.tracker.steps.item() == 40
    train(run_file("straight"))
    assert not same(finished("straight"), finished("out"))


def test_a_model_in_bfloat16_takes_half_the_space(run_file):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        own = f"model_from_pretrained_kwargs={{dtype: {dtype}}}"
        stopped_after(17, run_file(dtype, own))
        saved = load_file(newest_checkpoint(dtype) / stream.STREAM_FILENAME)
        sizes[dtype] = saved["kept"].nbytes + saved["waiting"].nbytes
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    train(run_file("straight", own))
    train(run_file("bfloat16", own), resume="bfloat16")
    assert same(finished("straight"), finished("bfloat16"))


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
