from types import SimpleNamespace

import pytest

from sae_lens_atm.training.fit import PreparedRun
from sae_lens_atm.training.history import LastBatch


def test_an_evaluation_that_fails_is_a_warning_in_one_line(tmp_path):
    def fail(_sae):
        raise ValueError("one\n  two")

    prepared = PreparedRun(lambda: None, fail)
    with pytest.warns(UserWarning, match=r"evaluating it failed \(ValueError: one two\)"):
        figures, _ = prepared.evaluate_safely(SimpleNamespace(device="cpu"), tmp_path, LastBatch())
    assert figures == {}
    assert not list(tmp_path.iterdir())
