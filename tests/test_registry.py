import subprocess
import sys

import pytest
import sae_lens
import torch
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
)
from safetensors.torch import save_file

import sae_lens_atm
from tests.helpers import make_sae, train


def test_importing_registers_both_classes():
    assert get_sae_class("atm") == (sae_lens_atm.ATMSAE, sae_lens_atm.ATMSAEConfig)
    expected = (sae_lens_atm.ATMTrainingSAE, sae_lens_atm.ATMTrainingSAEConfig)
    assert get_sae_training_class("atm") == expected


def test_registering_again_is_no_error():
    sae_lens_atm.register()


@pytest.mark.parametrize("registry", [SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY])
def test_a_clash_is_a_clear_error(registry, monkeypatch):
    monkeypatch.setitem(registry, "atm", (sae_lens.StandardSAE, sae_lens.StandardSAEConfig))
    with pytest.raises(ValueError, match=r"StandardSAE under 'atm'.*cannot register ATM"):
        sae_lens_atm.register()


def test_every_public_name_is_there():
    for name in sae_lens_atm.__all__:
        assert getattr(sae_lens_atm, name) is not None


def test_importing_loads_nothing_heavy_and_draws_no_random_numbers():
    code = """
import sys, torch, sae_lens
before, state = set(sys.modules), torch.get_rng_state()
import sae_lens_atm
new = {name for name in set(sys.modules) - before if not name.startswith("sae_lens_atm")}
assert not new, new
assert torch.equal(torch.get_rng_state(), state)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_console_script_imports_the_public_names_when_they_are_used():
    code = """
import sys
import sae_lens_atm_cli
import sae_lens_atm
assert not {"torch", "sae_lens"} & sys.modules.keys()
assert not hasattr(sae_lens_atm, "nonsense")
from sae_lens_atm import *
assert set(sae_lens_atm.__all__) <= globals().keys()
from sae_lens.registry import get_sae_class
assert get_sae_class("atm") == (ATMSAE, ATMSAEConfig)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_saved_sae_loads_in_a_process_that_never_imports_the_plugin(tmp_path):
    sae = train(make_sae(), 40).eval()
    sae.save_inference_model(tmp_path)
    x = torch.randn(16, 8)
    save_file({"x": x, "out": sae(x), "acts": sae.encode(x)}, tmp_path / "expected.safetensors")
    code = f"""
import sys, torch
from pathlib import Path
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from sae_lens import SAE
sae = SAE.load_from_disk({str(tmp_path)!r})
expected = load_file(Path({str(tmp_path)!r}) / "expected.safetensors")
assert torch.equal(sae(expected["x"]), expected["out"])
assert torch.equal(sae.encode(expected["x"]), expected["acts"])
assert sae.cfg.metadata.training_architecture == "atm"
assert not any(name.startswith("sae_lens_atm") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
