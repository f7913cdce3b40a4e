"""Filling the buffer and estimating the scale: both are shown, and stop when requested."""

import signal
from pathlib import Path
from threading import Event

import pytest
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_atm.errors import Interrupted
from sae_lens_atm.files import read_json
from sae_lens_atm.training.before_first_step import ESTIMATING, FILLING, BeforeFirstStep
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import LOADING_MODEL_AND_DATASET, Phase
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.helpers import state_equal
from tests.training.runs import stopped_after, trained_files

# 16 rows of 16 tokens fill the buffer, 4 at a time. A training batch is 4 rows.
BUFFER = ["n_batches_in_buffer=16", "activations_mixing_fraction=0.5", "n_eval_batches=0"]
SCALED = [*BUFFER, "sae.normalize_activations=expected_average_only_in"]


@pytest.fixture
def computed(monkeypatch):
    """The batches of the language model."""
    batches = []
    get_batch_tokens = ActivationsStore.get_batch_tokens

    def listen(self, *args, **kwargs):
        batches.append(get_batch_tokens(self, *args, **kwargs))
        return batches[-1]

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", listen)
    return batches


@pytest.fixture
def watched_from_the_first_batch(monkeypatch):
    """The prefetching thread waits until its batches are counted. SAELens starts it earlier."""
    watched, attach, produce = Event(), BeforeFirstStep.attach, PrefetchingIterator._run

    def attach_then_start(self, undo):
        attach(self, undo)
        watched.set()

    def produce_once_watched(self, source):
        watched.wait(timeout=60)
        produce(self, source)

    monkeypatch.setattr(BeforeFirstStep, "attach", attach_then_start)
    monkeypatch.setattr(PrefetchingIterator, "_run", produce_once_watched)


def phases_of(run, **kwargs):
    phases = []
    train(run, on_phase=phases.append, **kwargs)
    return phases


def test_a_phase_as_text():
    assert str(Phase("loading")) == "loading"
    assert str(Phase("filling", 2, 3000, "batches")) == "filling: 2 of 3,000 batches"
    assert str(Phase("filling", 3000, 3000, "batches")) == "filling: 3,000 batches"
    assert not Phase("loading").is_finished
    assert not Phase("filling", 2, 3).is_finished
    assert Phase("filling", 3, 3).is_finished


def test_every_model_batch_is_shown_before_it_is_computed(language_model_yaml):
    phases = phases_of(load_run(language_model_yaml, BUFFER))
    assert phases[0] == Phase(LOADING_MODEL_AND_DATASET)
    filling = [phase for phase in phases[1:] if phase.what == FILLING]
    assert [phase[1:] for phase in filling] == [(i, 4, "model batches") for i in range(5)]
    assert phases == [Phase(LOADING_MODEL_AND_DATASET), *filling]


def test_the_estimate_is_shown_with_its_largest_number(language_model_yaml):
    run = load_run(language_model_yaml, [*SCALED, "n_batches_for_norm_estimate=6"])
    phases = phases_of(run)
    names = list(dict.fromkeys(phase.what for phase in phases))
    assert names == [LOADING_MODEL_AND_DATASET, FILLING, ESTIMATING]
    # Half of the buffer is served: two batches of it, then two more for each further two.
    assert phases[-1] == Phase(ESTIMATING, 6, 6, "training batches")
    totals = {p.total for p in phases if p.what == ESTIMATING and p != phases[-1]}
    assert totals == {4 + 3 * 2}


def test_the_estimate_of_synthetic_data_is_shown(synthetic_yaml):
    more = ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=4"]
    phases = phases_of(load_run(synthetic_yaml, more))
    expected = [Phase(ESTIMATING, i, 4, "training batches at most") for i in range(4)]
    assert phases == [*expected, Phase(ESTIMATING, 4, 4, "training batches")]


def test_without_an_estimate_a_synthetic_run_has_no_phases(synthetic_yaml):
    assert phases_of(load_run(synthetic_yaml)) == []


def test_the_evaluation_is_shown(language_model_yaml):
    phases = phases_of(load_run(language_model_yaml, ["n_eval_batches=3"]))
    assert phases[-1] == Phase("evaluating", 0, 1, "batches")


@pytest.mark.usefixtures("watched_from_the_first_batch")
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize(
    ("settings", "what", "after"),
    [(BUFFER, FILLING, 2), (BUFFER, FILLING, 4), (SCALED, FILLING, 3), (SCALED, ESTIMATING, 7)],
)
def test_a_stop_is_answered_before_the_next_model_batch(
    language_model_yaml, computed, prefetch, settings, what, after
):
    run = load_run(language_model_yaml, [*settings, f"prefetch_llm_batches={prefetch}"])
    stop = StopFlag()

    def on_phase(phase):
        if phase.what == what and phase.done >= after:
            stop.request(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(run, stop=stop, on_phase=on_phase)
    assert caught.value.checkpoint is None
    assert caught.value.signal_number == signal.SIGTERM
    # The phase is shown before its next batch. The thread computes more until it is answered.
    assert after <= len(computed) <= after + (6 if prefetch else 1)
    assert not list(Path("out").rglob("*.safetensors"))


def test_a_run_stopped_there_starts_again(language_model_yaml):
    settings = [*SCALED, "n_batches_for_norm_estimate=6"]
    stop = StopFlag()
    with pytest.raises(Interrupted):
        train(
            load_run(language_model_yaml, settings),
            stop=stop,
            on_phase=lambda phase: stop.request() if phase.what == ESTIMATING else None,
        )
    train(load_run(language_model_yaml, settings))
    train(load_run(language_model_yaml, [*settings, "output_path=straight"]))
    assert state_equal(trained_files("out"), trained_files("straight"))


def test_a_resumed_run_does_not_estimate_again(language_model_yaml):
    settings = [*SCALED, "n_batches_for_norm_estimate=6", "save_final_checkpoint=true"]
    checkpoint = stopped_after(5, load_run(language_model_yaml, settings))
    scale = read_json(checkpoint / "activation_scaler.json")["scaling_factor"]
    phases = phases_of(load_run(language_model_yaml, settings), resume="out")
    assert ESTIMATING not in {phase.what for phase in phases}
    assert scale > 0
