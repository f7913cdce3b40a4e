import math
import os
import re
import signal
import threading
import warnings

import pytest
import torch

from sae_lens_atm.training.hooks import (
    CollapseWarning,
    StepCallback,
    StepTimer,
    StopFlag,
    StopRequest,
    StopRequested,
)
from sae_lens_atm.training.supervise import supervise
from tests.training.test_supervise import make_trainer


def test_a_request_stops_before_the_next_step():
    trainer, stop, steps = make_trainer(), StopFlag(), []

    def on_step(trainer, output):
        steps.append(trainer.n_training_steps)
        assert output.loss.isfinite()
        if len(steps) == 3:
            stop.request(signal.SIGTERM)

    hooks = [StepCallback(trainer, on_step), StopRequest(stop)]
    with supervise(trainer, hooks), pytest.raises(StopRequested):
        trainer.fit()
    assert steps == [0, 1, 2]
    assert trainer.n_training_steps == 3


def test_all_ranks_stop_when_one_requests_it():
    trainer, stop = make_trainer(), StopFlag()
    hook = StopRequest(stop, max_over_ranks=lambda number: max(number, signal.SIGTERM))
    with pytest.raises(StopRequested):
        hook.between_steps()
    assert stop.signal_number == signal.SIGTERM
    assert trainer.n_training_steps == 0


def test_signals_request_a_stop_and_a_second_interrupt_is_immediate():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = StopFlag()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        stop.saving = True
        os.kill(os.getpid(), signal.SIGINT)  # does not interrupt the saving
        stop.saving = False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_have_no_signal_handlers():
    def enter():
        with StopFlag().on_signals():
            entered.append(signal.getsignal(signal.SIGTERM))

    entered, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [before]


def collapse(trainer, _):
    if trainer.n_training_steps == 5:
        for name in ("magnitude", "frequency", "contribution"):
            trainer.sae.tracker.get_buffer(name).copy_(1e6 * torch.eye(24)[3])


@pytest.mark.parametrize("on_step", [collapse, lambda *_: None])
def test_a_collapse_of_importance_warns_once(on_step):
    trainer = make_trainer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with supervise(trainer, [CollapseWarning(trainer, 2), StepCallback(trainer, on_step)]):
            trainer.fit()
    messages = [str(w.message) for w in caught if "collapsed" in str(w.message)]
    assert len(messages) == (on_step is collapse)
    for message in messages:
        assert re.search(r"at step 6 there are 1\.\d\d effective latents of 24", message)


def test_other_saes_do_not_collapse():
    trainer = make_trainer(architecture="topk")
    trainer.n_training_steps = 10
    CollapseWarning(trainer, 2).between_steps()


def test_the_timer_measures_each_step():
    trainer = make_trainer(4)
    timer = StepTimer(trainer.sae.device)
    assert math.isnan(timer.median_ms)
    with supervise(trainer, [timer]):
        trainer.fit()
    assert len(timer.seconds) == 4
    assert timer.median_ms == pytest.approx(1000 * sum(sorted(timer.seconds)[1:3]) / 2)
