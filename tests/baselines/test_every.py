"""What every baseline must do: train, be compared, be saved, be loaded, refuse bad settings."""

import json
import subprocess
import sys
from itertools import count
from typing import NamedTuple

import pytest
import torch
import yaml
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig

from sae_lens_atm.baselines import BASELINES, inference_class, training_class, training_names
from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.comparison import summarise
from sae_lens_atm.compare.run.tasks import make_jobs
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run_file import parse_run
from tests.helpers import state_equal


class Baseline(NamedTuple):
    fields: dict  # of an SAE of 16 dimensions and 32 latents
    saved_as: str
    bad: dict  # fields with a value that is not allowed
    entry: dict | None = None  # more keys of the entry in a comparison


EVERY = {
    "archetypal": Baseline(
        {"k": 3, "archetypal_points": 40},
        "topk",
        {
            "archetypal_points": 0,
            "archetypal_delta": -1,
            "normalize_activations": "covariance_whitening",
        },
    ),
    "balanced_matryoshka": Baseline(
        {"k": 3}, "jumprelu", {"matryoshka_balance": -1, "normalize_activations": "layer_norm"}
    ),
    "hierarchical_topk": Baseline(
        {"k": 3, "max_k": 5},
        "topk",
        {
            "max_k": 2,
            "use_sparse_activations": True,
            "normalize_activations": "constant_norm_rescale",
        },
    ),
    "itda": Baseline(
        {"k": 3},
        "itda",
        {"itda_threshold": -1, "normalize_activations": "covariance_whitening"},
    ),
    "kronsae": Baseline(
        {"k": 3},
        "kronsae",
        {
            "kron_m": 0,
            "kron_n": 5,
            "rescale_acts_by_decoder_norm": False,
            "normalize_activations": "covariance_whitening",
        },
    ),
    "lista_matryoshka": Baseline(
        {"k": 3, "schedule_steps": 300},
        "lista_matryoshka",
        {
            "refinements": -1,
            "eta": 0,
            "matryoshka_widths": [4, 2],
            "term_tilt": -1,
            "initial_k": 0.5,
            "rescale_acts_by_decoder_norm": False,
            "normalize_activations": "covariance_whitening",
        },
    ),
    "ortsae": Baseline(
        {"k": 3, "ort_chunk_size": 10},
        "jumprelu",
        {
            "ort_coefficient": -1,
            "ort_chunk_size": 2,
            "ort_interval": 0,
            "normalize_activations": "layer_norm",
        },
    ),
    "top_afa": Baseline(
        {},
        "top_afa",
        {
            "afa_coefficient": -1,
            "rescale_acts_by_decoder_norm": False,
            "normalize_activations": "covariance_whitening",
        },
    ),
    "tree_sae": Baseline(
        {"k": 3, "tree_widths": [8, 24], "schedule_steps": 300},
        "tree_sae",
        {
            "k": 1,
            "tree_widths": [8, 23],
            "tree_k": [3, 1],
            "rescale_acts_by_decoder_norm": False,
            "dtype": "bfloat16",
            "normalize_activations": "covariance_whitening",
        },
    ),
}
STOCK = {"jumprelu", "topk", "standard", "gated", "matching_pursuit"}


def data(step):
    generator = torch.Generator().manual_seed(step)
    directions = torch.randn(24, 16, generator=torch.Generator().manual_seed(99))
    active = torch.rand(128, 24, generator=generator) < 0.1
    return (active * (1 + torch.rand(128, 24, generator=generator))) @ directions


def make(name, **fields):
    assert training_class(name) is not None
    shape = {"architecture": name, "d_in": 16, "d_sae": 32}
    return TrainingSAE.from_dict({**shape, **EVERY[name].fields, **fields})


def trainer_of(sae, steps, folder=None):
    cfg = SAETrainerConfig(
        total_training_samples=128 * steps,
        train_batch_size_samples=128,
        lr=3e-3,
        lr_end=3e-4,
        device="cpu",
        dead_feature_window=20,
        checkpoint_path=None if folder is None else str(folder),
    )
    return SAETrainer(cfg, sae, map(data, count()))


def error_of(sae, x):
    return float((sae(x) - x).detach().square().sum(1).mean())


@pytest.fixture(scope="module")
def trained():
    """Every baseline after 300 steps of SAELens' trainer."""
    torch.manual_seed(0)
    saes = {}
    for name in EVERY:
        sae = make(name)
        trainer_of(sae, 300).fit()
        saes[name] = sae.eval()
    return saes


def test_every_baseline_is_tested():
    assert set(EVERY) == set(BASELINES)


def test_no_baseline_is_imported_unless_named():
    program = """
import sys
import sae_lens_atm, sae_lens_atm.compare.plan.sweep_file, sae_lens_atm.hub.loading
from sae_lens_atm.baselines import BASELINES, training_class
training_class("batchtopk")
loaded = [n for n in sys.modules if n.startswith("sae_lens_atm.baselines.")]
assert loaded == [], loaded
for name in BASELINES:
    assert training_class(name)[1].architecture() == name
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_architecture_is_told_the_names_of_baselines():
    sae = {"architecture": "ortsea", "d_in": 16, "d_sae": 32}
    with pytest.raises(SettingsError, match=r"ortsae.*did you mean 'ortsae'\?"):
        parse_run({"runner": "synthetic", "sae": sae})
    assert training_class("ortsea") is None
    assert inference_class("ortsea") is None
    assert {"atm", "batchtopk", *BASELINES} <= set(training_names())


@pytest.mark.parametrize("name", EVERY)
def test_training_reduces_the_error(name, trained):
    torch.manual_seed(0)
    x = data(10_000)
    before, after = error_of(make(name).eval(), x), error_of(trained[name], x)
    assert after < 0.6 * before
    assert all(p.isfinite().all() for p in trained[name].parameters())


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_sae_is_as_promised_and_gives_the_same_output(name, trained, tmp_path):
    sae = trained[name]
    sae.save_inference_model(tmp_path)
    saved = json.loads((tmp_path / "cfg.json").read_text())
    assert saved["architecture"] == EVERY[name].saved_as
    assert saved["metadata"]["training_architecture"] == name
    loaded = load_sae(str(tmp_path))
    assert type(loaded).__module__.startswith("sae_lens.") is (EVERY[name].saved_as in STOCK)
    x = data(10_001)
    again = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(again(x), loaded(x))
    if EVERY[name].saved_as != "jumprelu":  # SAELens' BatchTopK selects within the batch
        same = torch.isclose(loaded.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5).all(1)
        assert int(same.sum()) >= len(x) - 1  # rounding can change a choice at its border
        torch.testing.assert_close(loaded(x)[same], sae(x)[same], rtol=1e-4, atol=1e-4)
        return
    acts = sae.encode_with_hidden_pre(x)[1]
    expected = acts * (acts > sae.topk_threshold)
    torch.testing.assert_close(loaded.encode(x), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_resumes_exactly(name, tmp_path):
    torch.manual_seed(0)
    whole = trainer_of(make(name), 40, tmp_path)
    for step in range(40):
        if step == 20:
            whole.save_checkpoint("half")
            rng = torch.get_rng_state()
        whole.step(data(step))
        whole.n_training_steps += 1
    torch.manual_seed(1)
    second = trainer_of(make(name), 40, tmp_path)
    second.load_trainer_state(tmp_path / "half")
    second.sae.load_weights_from_checkpoint(tmp_path / "half")
    torch.set_rng_state(rng)
    for step in range(20, 40):
        second.step(data(step))
        second.n_training_steps += 1
    assert state_equal(whole.sae.state_dict(), second.sae.state_dict())


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, one in EVERY.items() for field in one.bad]
)
def test_a_bad_setting_is_one_clear_line(name, field):
    value = EVERY[name].bad[field]
    sae = {"architecture": name, "d_in": 16, "d_sae": 32, **EVERY[name].fields, field: value}
    with pytest.raises(SettingsError) as error:
        parse_run({"runner": "synthetic", "hierarchy_model": {"hidden_dim": 16}, "sae": sae})
    message = str(error.value)
    assert message.startswith(f"sae.{field} must be ")
    assert "\n" not in message


def test_all_in_one_comparison(comparison_yaml):
    content = yaml.safe_load(comparison_yaml.read_text())
    content |= {"seeds": [0], "l0": [3], "training_samples": 6400}
    content["architectures"] = {
        name: {"sae": {k: v for k, v in one.fields.items() if k != "k"}, **(one.entry or {})}
        for name, one in EVERY.items()
    }
    comparison_yaml.write_text(yaml.safe_dump(content))
    comparison = load_comparison(comparison_yaml)
    for jobs in make_jobs(comparison):
        for job in jobs:
            job.work(lambda _progress: None, StopFlag())
    results = summarise(comparison, {})
    assert {run.entry for run in results.runs} == set(EVERY)
    assert all(run.figures["explained_variance"] > 0 for run in results.runs)
