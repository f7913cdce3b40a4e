"""Run files with extreme values: what passes the dry run trains two steps.

15 examples by default. HYPOTHESIS_PROFILE=long tries more.
"""

import contextlib
import dataclasses
import os
import typing
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.synthetic import SyntheticSAERunnerConfig

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.data.synthetic import HierarchyModelConfig
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.preflight.estimate import estimate_time
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import parse_run

EXAMPLES = 400 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 15
FLOATS = [0.0, -1.0, 1e-30, 0.3, 1.0, 2.0, 1e6, 1e30, -1e30, 1e300, float("nan"), float("inf")]
WHOLE = [-1, 0, 1, 2, 7, 41, 1000, 2**31, 2**53, 2**63, 10**30]
# Values for these fields would only take long, or need another machine.
LEFT_OUT = {"sae", "synthetic_model", "logger", "metadata", "output_path", "sae_lens_version"}
# Larger values pass, and take as much time or memory as they say.
SIZES = {
    "d_in": [-1, 0, 15, 16, 2**40],
    "hidden_dim": [-1, 0, 15, 16, 2**40],
    "d_sae": [-1, 0, 1, 2, 33, 2**28, 2**40],
    "batch_size": [-1, 0, 1, 2, 33, 2**40],
    "roots": [-1, 0, 1, 2, 2**40],
    "lone_features": [-1, 0, 1, 2, 2**40],
    "branching": [-1, 0, 1, 2, 5, 2**40],
    "depth": [-1, 0, 1, 2, 3, 50, 2**40],
    "n_batches_for_norm_estimate": [-1, 0, 1, 2, 2**60],
    "checkpoint_path": [None, "", "elsewhere"],
    "device": ["cpu", "meta", "warp9", ""],
    "lr": [-1.0, 0.0, 1e-30, 1e-3, 1.0, float("nan"), float("inf")],
    "lr_scheduler_name": ["constant", "cosineannealing", "cosineannealingwarmrestarts", "no"],
    "dtype": ["float32", "float64", "bfloat16", "float16", "float12"],
}
BASE = {
    "runner": "synthetic",
    "seed": 0,
    "max_bad_batches": 1,
    "training_samples": 640,
    "batch_size": 64,
    "eval_samples": 100,
    "n_batches_for_norm_estimate": 2,
    "hierarchy_model": {"hidden_dim": 16, "roots": 4, "lone_features": 4, "depth": 1},
    "sae": {"architecture": "atm", "d_in": 16, "d_sae": 32, "k": 2, "mask_warm_up_steps": 0},
}


def values_of(name, hint):
    if name in SIZES:
        return SIZES[name]
    if typing.get_origin(hint) is typing.Literal:
        return [*typing.get_args(hint), "no"]
    if hint is bool:
        return [True, False]
    return WHOLE if hint is int else FLOATS


def fields_of(config, prefix=""):
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config) if field.name not in LEFT_OUT]
    return {f"{prefix}{name}": values_of(name, hints[name]) for name in names}


FIELDS = {
    "seed": WHOLE,
    **fields_of(SyntheticSAERunnerConfig),
    **fields_of(ATMTrainingSAEConfig, "sae."),
    **fields_of(HierarchyModelConfig, "hierarchy_model."),
}
SETTINGS = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(FIELDS[name]) for name in names})
)


def content_of(changes, output):
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for name, value in changes.items():
        *parents, key = name.split(".")
        (content[parents[0]] if parents else content)[key] = value
    if content.get("checkpoint_path"):
        content["checkpoint_path"] = str(output.with_name(content["checkpoint_path"]))
    # As from a file: YAML has other types of numbers than Python.
    return yaml.safe_load(yaml.safe_dump({**content, "output_path": str(output)}))


def refusal_of_dry_run(content):
    """Return the error of the dry run, or an empty string."""
    try:
        run = parse_run(content)
        check_run(run, dry=True)
        entries = estimate_time(run, limit=0.0)
    except SettingsError as error:
        return str(error)
    return next((entry.reason for entry in entries if entry.what == "everything"), "")


def train_two_steps(content):
    stop, steps = StopFlag(), []

    def on_step(_trainer, output):
        steps.append(output.loss.item())
        if len(steps) == 2:
            stop.request()

    with contextlib.suppress(Interrupted):
        train(parse_run(content), on_step=on_step, stop=stop)
    return len(steps)


def check_content(content, keys):
    """Check that a run trains two steps, or that its dry run says which key is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = refusal_of_dry_run(content)
        if not refusal:
            samples = content.get("training_samples", content.get("training_tokens"))
            batch = content.get("batch_size", content.get("train_batch_size_tokens"))
            assert train_two_steps(content) >= (1 if samples < 2 * batch else 2)
    for line in refusal.splitlines():
        assert any(key in line for key in keys), line
        assert "Error" not in line


@settings(max_examples=EXAMPLES, deadline=None)
@given(SETTINGS)
def test_what_passes_the_dry_run_trains(changes):
    with TemporaryDirectory() as folder:
        content = content_of(changes, Path(folder) / "out")
        check_content(content, {part for name in changes for part in (name, name.split(".")[-1])})


@pytest.mark.parametrize(
    "changes",
    [
        {"sae.decoder_init_norm": 1e6},
        {"sae.parent_weight": 1e30},
        {"sae.dtype": "float16"},
    ],
)
def test_found_by_the_fuzzer(changes):
    test_what_passes_the_dry_run_trains.hypothesis.inner_test(changes)
