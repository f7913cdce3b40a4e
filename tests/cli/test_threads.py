import os
import warnings

import pytest
import torch

from sae_lens_atm.cli.threads import use_threads, warn_if_busy


@pytest.fixture
def load(monkeypatch):
    def load(value, cores=8):
        monkeypatch.setattr(os, "getloadavg", lambda: (value, 0.0, 0.0))
        monkeypatch.setattr(os, "cpu_count", lambda: cores)

    return load


def test_a_busy_machine_gets_a_warning_of_one_line(load):
    load(4.1)
    with pytest.warns(UserWarning, match=r"load of this machine is 4\.1 on 8 cores") as caught:
        warn_if_busy("cpu", 2)
    message = str(caught[0].message)
    assert "--threads 1" in message
    assert "OMP_NUM_THREADS=1" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("value", "device", "threads"), [(4.0, "cpu", 8), (9.0, "cpu", 1), (9.0, "cuda", 8)]
)
def test_otherwise_nothing_is_said(load, value, device, threads):
    load(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_busy(device, threads)


def test_threads_are_set(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    use_threads(None)
    use_threads(3)
    assert seen == [3]
