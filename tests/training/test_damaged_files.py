"""Files with any content are read, or refused with one clear line."""

import json
import os
import shutil
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.errors import CheckpointError, Interrupted, SettingsError
from sae_lens_atm.files import MANIFEST_FILENAME
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run, parse_run

RUN = {
    "runner": "synthetic",
    "seed": 3,
    "hierarchy_model": {"hidden_dim": 16, "roots": 4, "lone_features": 4, "depth": 1},
    "sae": {"architecture": "atm", "d_in": 16, "d_sae": 32, "k": 2, "mask_warm_up_steps": 5},
    "training_samples": 512,
    "batch_size": 64,
    "lr": 1e-3,
    "n_checkpoints": 1,
    "run_final_eval": False,
    "output_path": "out",
}
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["", "nan", "~", "/", "../..", "cuda:99", "\0", "x" * 5000, 2**70, -1, 0]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = st.sampled_from([*RUN, *(f"sae.{k}" for k in RUN["sae"]), "hierarchy_model.roots", "new"])


def changed(content, changes):
    content = json.loads(json.dumps(content))
    for key, value in changes.items():
        *parents, last = key.split(".")
        target = content
        for parent in parents:
            target = target[parent] if isinstance(target.get(parent), dict) else {}
        target[last] = value
    return content


def assert_clear(error):
    text = str(error)
    assert text
    assert len(text) < 5000
    assert "Traceback" not in text
    assert all(line.strip() for line in text.splitlines())


# Fixtures of a function serve all examples: each example makes its files anew.
EXAMPLES = 50 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 15
ours = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ours
@given(st.dictionaries(keys, values, max_size=3))
def test_run_files_with_other_values(changes):
    try:
        check_run(parse_run(changed(RUN, changes)))
    except SettingsError as error:
        assert_clear(error)


@ours
@given(st.data())
def test_run_files_with_other_bytes(tmp_path, data):
    text = bytearray(yaml.safe_dump(RUN).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        text[place : place + cut] = data.draw(st.binary(max_size=6))
    (tmp_path / "run.yaml").write_bytes(text)
    try:
        load_run(tmp_path / "run.yaml")
    except SettingsError as error:
        assert_clear(error)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: 2020-13-45",
        "a: 2020-02-30 25:61:61",
        "a: &a [*a]",
        "sae: &a {b: *a}",
        "? [1, 2]\n: 3",
        "? {a: b}\n: 3",
        "a: !!python/object/apply:os.system [touch owned]",
        "a: !!binary =",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: " + "9" * 5000,
        "a: !!float x",
        "\ufeff\x00",
        "runner: synthetic\nsae: "
        + "[" * 90
        + "]" * 90,
        # A list of lists of ... of the same: short on disk, endless when written out.
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
        + "runner: *a11\n",
    ],
)  # fmt: skip
def test_hostile_run_files(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_run(tmp_path / "run.yaml")
    assert_clear(caught.value)
    assert not (tmp_path / "owned").exists()


# --- files of a run -------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose two checkpoints are still there."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    train(parse_run(changed(RUN, {"n_checkpoints": 2, "output_path": str(folder / "out")})))
    return folder / "out"


def damaged(draw, content):
    """Flip a bit, cut off the end, remove a piece, or replace everything."""
    kind = draw(st.sampled_from(["flip", "cut", "gap", "other"]))
    if kind == "other":
        return draw(st.sampled_from([b"", b"{}", b"null", b"[]", b"\xff" * 100, b"PK\x03\x04"]))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        bit = 1 << draw(st.integers(0, 7))
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    return content[:place] + (content[place + draw(st.integers(1, 50)) :] if kind == "gap" else b"")


def spoil(draw, folder):
    """Damage one file of a folder. Return its name, and whether it changed."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size)
    path = draw(st.sampled_from(files))
    before = path.read_bytes()
    path.write_bytes(damaged(draw, before))
    return path.name, path.read_bytes() != before


def copied(finished, tmp_path):
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    return shutil.copytree(finished, tmp_path / "copy")


@ours
@given(st.data())
def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken(finished, tmp_path, data):
    copy = copied(finished, tmp_path)
    name, differs = spoil(data.draw, copy / "checkpoints/384")
    (copy / "cfg.json").unlink()  # as if the run had not ended
    run = parse_run(changed(RUN, {"output_path": str(copy)}))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if differs and name != MANIFEST_FILENAME:
            with pytest.raises(CheckpointError) as caught:
                newest_checkpoint(copy / "checkpoints/384")
            assert_clear(caught.value)
            assert newest_checkpoint(copy).name == "192"
        check_run(run, newest_checkpoint(copy))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@ours
@given(st.data())
def test_without_checksums_a_damaged_checkpoint_is_read_or_refused(finished, tmp_path, data):
    copy = copied(finished, tmp_path)
    checkpoint = copy / "checkpoints/384"
    (checkpoint / MANIFEST_FILENAME).unlink()
    (copy / "cfg.json").unlink()
    spoil(data.draw, checkpoint)
    run = parse_run(changed(RUN, {"output_path": str(copy)}))
    stop = StopFlag()
    stop.request()  # before the first step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((CheckpointError, Interrupted)) as caught:
            train(run, checkpoint, stop=stop)
    if isinstance(caught.value, CheckpointError):
        assert_clear(caught.value)


@ours
@given(st.data())
def test_a_damaged_sae_is_read_or_refused(finished, tmp_path, data):
    copy = copied(finished, tmp_path)
    shutil.rmtree(copy / "checkpoints")
    spoil(data.draw, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_sae(str(copy))
        except SettingsError as error:
            assert_clear(error)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state, _: state["W_dec"].fill_(float("nan")),
        lambda state, _: state["b_enc"].fill_(float("inf")),
        lambda state, _: state.update(W_dec=state["W_dec"][:5].clone()),
        lambda state, _: state.pop("W_enc"),
        lambda state, _: state.update(more=torch.ones(2)),
        lambda _, cfg: cfg.update(d_sae=7),
        lambda _, cfg: cfg.update(d_in="x"),
        lambda _, cfg: cfg.update(architecture="gated"),
        lambda _, cfg: cfg.update(architecture="nonsense"),
        lambda _, cfg: cfg.pop("architecture"),
        lambda _, cfg: cfg.update(dtype="float17"),
    ],
)
def test_a_saved_sae_that_is_not_one(finished, synthetic_yaml, tmp_path, spoil):
    folder = shutil.copytree(finished, tmp_path / "out")
    state = load_file(folder / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    spoil(state, cfg)
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match="cannot load out: "):
        load_sae("out")
    for command in (["inspect", "out"], ["evaluate", "out", "--on", str(synthetic_yaml)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_infinite_threshold_is_a_latent_that_never_fires(finished, tmp_path):
    weights = shutil.copytree(finished, tmp_path / "out") / "sae_weights.safetensors"
    state = load_file(weights)
    state["threshold"][0] = float("inf")
    save_file(state, weights)
    assert load_sae("out").encode(torch.randn(64, 16))[:, 0].sum() == 0


@pytest.mark.parametrize(
    "path",
    ["", ".", "/", "~", "nowhere", "x" * 5000, "a/../../b", "/dev/null", "/proc/self/mem", "loop"],
)
def test_hostile_paths(synthetic_yaml, tmp_path, path):
    (tmp_path / "loop").symlink_to("loop")
    for command in (
        ["train", str(synthetic_yaml), "--resume", path, "--dry-run"],
        ["inspect", path],
        ["evaluate", path, "--on", str(synthetic_yaml)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code in (1, 2), command
        assert isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output + result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"loop", synthetic_yaml.name}
