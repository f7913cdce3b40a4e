"""The real client, against a server on loopback that speaks the Hub's protocol (`hub_server`)."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import close_session
from sae_lens import SAE, JumpReLUSAE
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sae_lens_atm.cli.main import app
from sae_lens_atm.hub.push import without_local_paths
from tests.helpers import make_sae, train
from tests.hub.hub_server import READ_TOKEN, TOKEN, File, Hub, Repo

NAMES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to, as a process with its own environment would."""
    with Hub() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's, between its tries
        close_session()
        yield server
        close_session()


@pytest.fixture
def save(tmp_path):
    """What a run writes, of a language model in a folder of somebody's."""
    return write_save(tmp_path / "run")


def write_save(folder, **fields):
    sae = train(make_sae(**fields), 20).eval()
    home = str(folder.parent)
    sae.cfg.metadata.model_name = f"{home}/secret/tiny-model"
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.cfg.metadata.dataset_path = "somebody/some-text"
    sae.cfg.metadata.l0 = 3.0
    sae.save_inference_model(folder)
    save_file({"sparsity": torch.zeros(24)}, folder / "sparsity.safetensors")
    runner = {
        "training_tokens": 1280,
        "train_batch_size_tokens": 64,
        "lr": 3e-4,
        "seed": 12345,
        "output_path": str(folder),
        "checkpoint_path": f"{home}/checkpoints",
        "model_name": f"{home}/secret/tiny-model",
        "model_from_pretrained_kwargs": {"cache_dir": f"{home}/secret/cache"},
        "logger": {"wandb_entity": "somebody"},
    }
    (folder / "runner_cfg.json").write_text(json.dumps(runner))
    stats = {"explained_variance": 0.75, "mse": 1.5, "l0": 3.25, "cossim": None}
    (folder / "eval_stats.json").write_text(json.dumps(stats))
    return folder


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def failed(code, *args):
    result = run(*args)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 300
    return line


def same(a, b):
    x = torch.randn(16, 8)
    return torch.equal(a.encode(x), b.encode(x)) and torch.equal(a(x), b(x))


def metadata_of(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def card_of(hub, branch="main", repo="me/saes"):
    return hub.repos[repo].files(branch)["README.md"].content.decode()


def test_a_push_makes_the_repo_and_comes_back_bit_for_bit(hub, save):
    result = run("push", save, "me/saes")
    assert result.exit_code == 0, result.output
    sae_id = "blocks.1.hook_resid_post/atm-24-l0-3"
    assert f"pushed me/saes:{sae_id}" in result.output
    repo = hub.repos["me/saes"]
    assert set(repo.files()) == {".gitattributes", "README.md", *(f"{sae_id}/{n}" for n in NAMES)}
    assert not repo.private
    assert len(repo.commits) == 2  # the one that makes the repo, and ours
    for name in NAMES[1:3]:
        file = repo.files()[f"{sae_id}/{name}"]
        assert file == File((save / name).read_bytes(), lfs=True)

    loaded = SAE.from_pretrained("me/saes", sae_id)
    assert type(loaded) is JumpReLUSAE
    assert same(loaded, SAE.load_from_disk(save))
    shown = run("inspect", f"me/saes:{sae_id}")
    assert shown.exit_code == 0, shown.output
    assert "trained as" in shown.output


def test_the_token_stays_with_the_hub(hub, save):
    run("push", save, "me/saes", "--id", "a")
    SAE.from_pretrained("me/saes", "a")
    elsewhere = [token for _, path, token in hub.requests if path.startswith(("/cdn/", "/lfs/"))]
    assert len(elsewhere) == 4  # two files up, two down
    assert set(elsewhere) == {""}


def test_a_process_with_nothing_but_its_environment(hub, save, tmp_path):
    """No patches. The card's own lines load it with SAELens alone; then the plugin comes in."""
    assert run("push", save, "me/saes", "--id", "a").exit_code == 0
    x = torch.randn(8, 8)
    expected = SAE.load_from_disk(save)(x).detach()
    save_file({"x": x, "expected": expected}, tmp_path / "x.safetensors")
    (source,) = re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    source += f"""
import sys
from safetensors.torch import load_file
kept = load_file({str(tmp_path / "x.safetensors")!r})
assert (sae(kept["x"]) == kept["expected"]).all()
assert not any(name.startswith("sae_lens_atm") for name in sys.modules)

from sae_lens_atm.cli.main import app
app(["push", {str(save)!r}, "me/saes", "--id", "b"], standalone_mode=False)
app(["push", {str(save)!r}, "you/saes"], standalone_mode=True)
"""
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "b/cfg.json" in hub.repos["me/saes"].files()
    assert "no rights in you" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_card_says_what_it_is_and_nothing_of_the_machine(hub, save, tmp_path):
    run("push", save, "me/saes", "--id", "a")
    card = card_of(hub)
    facts = metadata_of(card)
    assert facts["library_name"] == "saelens"
    assert {"saelens", "sparse-autoencoder", "sae-lens-atm", "arxiv:2510.08855"} < {*facts["tags"]}
    assert facts["datasets"] == ["somebody/some-text"]
    assert "base_model" not in facts  # a folder is no model of the Hub's
    for row in (
        "| model | tiny-model |",
        "| hook | blocks.1.hook_resid_post |",
        "| d_in, d_sae | 8, 24 |",
        "| trained as | atm |",
        "| k | 3 |",
        "| masked_weight | 0.5 |",
        "| tokens | 1,280 |",
        "| learning rate | 0.0003 |",
        "| seed | 12345 |",
        "| explained variance | 0.75 | more |",
        "| MSE | 1.5 | less |",
        "| L0 | 3.25 | - |",
    ):
        assert f"\n{row}\n" in card
    assert "cos" not in card.split("**Figures**")[1].split("**Load**")[0]  # it was not measured
    for name, file in hub.repos["me/saes"].files().items():
        assert str(tmp_path).encode() not in file.content, name
        assert b"secret" not in file.content, name
    runner = json.loads(hub.repos["me/saes"].files()["a/runner_cfg.json"].content)
    assert runner == {
        "training_tokens": 1280,
        "train_batch_size_tokens": 64,
        "lr": 3e-4,
        "seed": 12345,
        "model_name": "tiny-model",
        "model_from_pretrained_kwargs": {"cache_dir": "cache"},
    }


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/dk/models/gemma", "gemma"),
        ("~/models/gemma/", "gemma"),
        ("../../dk/text", "text"),
        ("file:///home/dk/text.jsonl", "text.jsonl"),
        ("C:\\Users\\dk\\models\\gemma", "gemma"),
        ("\\\\server\\dk\\gemma", "gemma"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("blocks.8.hook_resid_post", "blocks.8.hook_resid_post"),
    ],
)
def test_what_is_a_local_path(text, left):
    assert without_local_paths({"a": [{"b": text}], "output_path": "x"}) == {"a": [{"b": left}]}


def test_base_model_of_a_short_name(hub, save):
    cfg = json.loads((save / "cfg.json").read_text())
    cfg["metadata"]["model_name"] = "gemma-2-2b"
    (save / "cfg.json").write_text(json.dumps(cfg))
    run("push", save, "me/saes")
    assert metadata_of(card_of(hub))["base_model"] == ["google/gemma-2-2b"]


def test_a_second_sae_leaves_the_first_and_what_people_wrote(hub, save, tmp_path):
    assert run("push", save, "me/saes", "--id", "a").exit_code == 0
    repo = hub.repos["me/saes"]
    text = card_of(hub).replace("# Sparse autoencoders", "# Mine\r\n\r\nBy *me* \\1.")
    text = text.replace("library_name: saelens", "library_name: mine\nlicense: mit")
    repo.commit("main", {**repo.files(), "README.md": File(text.encode(), False)})
    first = text[text.index("<!-- sae-lens-atm") : text.index("<!-- end of a -->")]

    other = write_save(tmp_path / "other", d_sae=16, k=2)
    assert run("push", other, "me/saes", "--id", "b").exit_code == 0
    card = card_of(hub)
    assert "# Mine\r\n\r\nBy *me* \\1." in card
    assert first in card
    assert "## b\n" in card
    assert metadata_of(card)["license"] == "mit"
    assert metadata_of(card)["library_name"] == "mine"
    assert metadata_of(card)["tags"].count("saelens") == 1
    assert same(SAE.from_pretrained("me/saes", "a"), SAE.load_from_disk(save))
    assert same(SAE.from_pretrained("me/saes", "b"), SAE.load_from_disk(other))

    # once more over the first: its section alone is new, and no file of the former is left
    (other / "sparsity.safetensors").unlink()
    assert run("push", other, "me/saes", "--id", "a").exit_code == 0
    again = card_of(hub)
    assert again.count("## a\n") == again.count("## b\n") == 1
    assert again.index("## a\n") < again.index("## b\n")
    assert "| d_in, d_sae | 8, 24 |" not in again
    assert "a/sparsity.safetensors" not in repo.files()
    assert "b/sparsity.safetensors" in repo.files()


def test_a_bar_and_a_backslash_stay_in_their_cell(hub, save):
    cfg = json.loads((save / "cfg.json").read_text())
    cfg["metadata"]["dataset_path"] = "some\n| \\d text"
    (save / "cfg.json").write_text(json.dumps(cfg))
    for _ in range(2):
        assert run("push", save, "me/saes", "--id", "a").exit_code == 0
        assert "\n| data | some \\| \\d text |\n" in card_of(hub)
    assert "datasets" not in metadata_of(card_of(hub))


def test_a_card_without_metadata_gets_some(hub, save):
    repo = hub.repos["me/saes"] = Repo(private=False)
    repo.commit("main", {**repo.files(), "README.md": File(b"# Mine\n\n---\n\nText\n", False)})
    assert run("push", save, "me/saes").exit_code == 0
    assert metadata_of(card_of(hub))["library_name"] == "saelens"
    assert "# Mine\n\n---\n\nText\n" in card_of(hub)


def test_a_card_that_cannot_be_read_is_left_alone(hub, save):
    repo = hub.repos["me/saes"] = Repo(private=False)
    repo.commit("main", {**repo.files(), "README.md": File(b"---\na: [\n---\nText\n", False)})
    before = dict(repo.branches)
    assert "correct it first" in failed(2, "push", save, "me/saes")
    assert repo.branches == before


def test_a_default_name_never_replaces(hub, save, tmp_path):
    assert run("push", save, "me/saes").exit_code == 0
    before = dict(hub.repos["me/saes"].branches)
    other = write_save(tmp_path / "other", mask_seed=1)
    assert "already holds blocks.1.hook" in failed(2, "push", other, "me/saes")
    assert hub.repos["me/saes"].branches == before


def test_private(hub, save):
    assert run("push", save, "me/hidden", "--private").exit_code == 0
    assert hub.repos["me/hidden"].private
    hub.repos["me/open"] = Repo(private=False)
    assert "is public" in failed(2, "push", save, "me/open", "--private")
    assert len(hub.repos["me/open"].commits) == 1


def test_a_branch(hub, save):
    repo = hub.repos["me/saes"] = Repo(private=False)
    repo.branches["new/k"] = repo.branches["main"]
    main = repo.branches["main"]
    assert run("push", save, "me/saes", "--id", "a", "--revision", "new/k").exit_code == 0
    assert repo.branches["main"] == main
    assert "a/cfg.json" in repo.files("new/k")
    # SAE.from_pretrained reads main alone: the card says how else
    assert "the repo has no such file" in failed(2, "inspect", "me/saes:a")
    (source,) = re.findall(r"```python\n(.*?)```", card_of(hub, "new/k"), re.DOTALL)
    scope = {}
    exec(source, scope)
    assert same(scope["sae"], SAE.load_from_disk(save))
    # the next one finds the branch's card, not main's
    assert run("push", save, "me/saes", "--id", "b", "--revision", "new/k").exit_code == 0
    assert "## a\n" in card_of(hub, "new/k")

    for name in ("me/saes", "me/none"):
        line = failed(2, "push", save, name, "--revision", "nope")
        assert "nope" in line
        assert name in line
    assert "me/none" not in hub.repos  # for a typo in a branch no repo is made


def test_dry_run_asks_nobody(hub, save):
    result = run("push", save, "me/saes", "--dry-run")
    assert result.exit_code == 0, result.output
    size = (save / "sae_weights.safetensors").stat().st_size
    for text in ("sae_weights.safetensors", f"{size:,} B", "library_name: saelens", "## blocks.1"):
        assert text in result.output
    assert hub.requests == []


def test_no_token(hub, save, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "(401)" in failed(1, "push", save, "me/saes")
    hub.repos["me/saes"] = Repo(private=False)
    assert "(401)" in failed(1, "push", save, "me/saes")
    assert len(hub.repos["me/saes"].commits) == 1
    hub.repos["me/hidden"] = Repo(private=True)
    assert "(401)" in failed(1, "inspect", "me/hidden:a")


def test_a_token_that_is_wrong_or_may_not(hub, save, monkeypatch):
    assert "no rights in you" in failed(1, "push", save, "you/saes")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "403" in failed(1, "push", save, "me/saes")
    monkeypatch.setenv("HF_TOKEN", "hf_nonsense")
    assert "(401)" in failed(1, "push", save, "me/saes")
    assert hub.repos == {}


@pytest.mark.usefixtures("hub")
def test_what_is_not_there(save):
    assert "no such repo" in failed(2, "inspect", "me/none:a")
    run("push", save, "me/saes", "--id", "a")
    assert "me/saes:b" in failed(2, "inspect", "me/saes:b")


def test_no_network(hub, save):
    hub.shutdown()
    hub.server_close()
    line = failed(1, "push", save, "me/saes")
    assert "no connection to http://127.0.0.1" in line
    assert "no connection" in failed(1, "inspect", "me/saes:a")


def test_someone_else_pushes_at_the_same_time(hub, save):
    repo = hub.repos["me/saes"] = Repo(private=False)
    hub.before_commit = lambda repo: repo.commit("main", {**repo.files(), "x": File(b"x", False)})
    assert "push again" in failed(1, "push", save, "me/saes")
    assert set(repo.files()) == {".gitattributes", "x"}
    hub.before_commit = None
    assert run("push", save, "me/saes").exit_code == 0
    assert "x" in repo.files()


def test_a_cut_in_mid_upload_leaves_the_repo_as_it_was(hub, save):
    repo = hub.repos["me/saes"] = Repo(private=False)
    hub.cut, hub.cuts = {"upload": 100}, 100
    assert "no connection" in failed(1, "push", save, "me/saes", "--id", "a")
    assert set(repo.files()) == {".gitattributes"}
    hub.cuts = 1  # once is got over without a word
    assert run("push", save, "me/saes", "--id", "a").exit_code == 0
    assert same(SAE.from_pretrained("me/saes", "a"), SAE.load_from_disk(save))


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_cut_in_mid_download_loads_nothing_and_the_next_try_succeeds(hub, save, tmp_path, name):
    run("push", save, "me/saes", "--id", "a")
    hub.cut, hub.cuts, hub.ranges = {f"a/{name}": 50}, 100, False
    line = failed(1, "inspect", "me/saes:a")
    assert "no connection" in line
    assert hub.cuts < 100
    cached = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert name not in {p.name for p in cached}
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    hub.cuts = 0
    assert run("inspect", "me/saes:a").exit_code == 0
    assert same(SAE.from_pretrained("me/saes", "a"), SAE.load_from_disk(save))


def test_a_cut_that_passes_is_resumed(hub, save):
    run("push", save, "me/saes", "--id", "a")
    hub.cut, hub.cuts = {"a/sae_weights.safetensors": 700}, 2
    assert same(SAE.from_pretrained("me/saes", "a"), SAE.load_from_disk(save))
    assert hub.cuts == 0


def test_names_that_point_elsewhere_write_nothing_there(hub, save, tmp_path):
    """In a listing, in a file's name, and in what one asks for."""
    hostile = ["../../outside", "a/../../../outside", "/outside", "a/..\\..\\outside"]
    hub.repos["me/saes"] = repo = Repo(private=False)
    good = {f"a/{name}": File((save / name).read_bytes(), False) for name in NAMES}
    repo.commit("main", {**repo.files(), **good, **{n: File(b"x", False) for n in hostile}})
    hub.listed = ["../README.md", *hostile]
    assert run("push", save, "me/saes", "--id", "b").exit_code == 0
    assert set(hostile) < set(repo.files())  # neither taken for ours nor touched
    assert run("inspect", "me/saes:a").exit_code == 0
    for name in ("../..", "../../outside", "a/../../.."):
        assert run("inspect", f"me/saes:{name}").exit_code == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run", "cache"}
    assert not list((tmp_path / "cache").rglob("outside*"))


@pytest.mark.parametrize("name", ["a/../../../../outside", "../outside", "/outside"])
def test_a_branch_of_a_hostile_repo_is_fetched_into_the_cache_alone(hub, save, tmp_path, name):
    """By the card's own way to a branch, but of the whole of it."""
    repo = hub.repos["me/saes"] = Repo(private=False)
    repo.branches["k"] = repo.branches["main"]
    run("push", save, "me/saes", "--id", "a", "--revision", "k")
    repo.commit("k", {**repo.files("k"), name: File(b"x", False)})
    with pytest.raises(ValueError, match="Invalid filename"):
        snapshot_download("me/saes", revision="k")
    assert not list((tmp_path / "cache").rglob("outside"))
    assert {p.name for p in tmp_path.iterdir()} == {"run", "cache"}
    assert not Path("/outside").exists()


@pytest.mark.parametrize("repo_id", ["saes", "a/b/c", "me/../saes", "me/sa es", "me/-", ""])
def test_a_repo_id_that_cannot_be(save, repo_id):
    assert "repo id must be" in failed(2, "push", save, repo_id)


@pytest.mark.parametrize("sae_id", ["..", "../a", "/a", "a/", "a//b", "a/../b", ".git", "a b", ""])
def test_an_id_that_cannot_be(save, sae_id):
    assert "--id must be" in failed(2, "push", save, "me/saes", "--id", sae_id)


def test_where_the_sae_is_looked_for(save, tmp_path):
    assert "no folder nowhere" in failed(2, "push", "nowhere", "me/saes")
    (tmp_path / "empty").mkdir()
    assert "no cfg.json" in failed(2, "push", "empty", "me/saes")
    home = tmp_path / "compared/runs/atm-l0-3"
    home.mkdir(parents=True)
    save.rename(home / "sae")
    (home / "sae/eval_stats.json").unlink()
    (home / "figures.json").write_text(json.dumps({"figures": {"mcc": 0.5}}))
    for path in (home, tmp_path / "compared"):
        result = run("push", path, "me/saes", "--dry-run")
        assert "| MCC | 0.5 | more |" in result.output
    write_save(tmp_path / "compared/runs/other/sae")
    assert "holds 2 SAEs" in failed(2, "push", "compared", "me/saes")


def test_what_is_not_fit_to_be_pushed(save, tmp_path):
    sae = train(make_sae(), 5)
    sae.save_model(tmp_path / "checkpoint")
    assert "is a training checkpoint" in failed(2, "push", "checkpoint", "me/saes")
    weights = load_file(save / "sae_weights.safetensors")
    for name, bad, said in (
        ("W_enc", torch.full((8, 24), torch.nan), "W_enc holds NaN or Inf"),
        ("threshold", torch.zeros(23), "size mismatch"),
    ):
        save_file({**weights, name: bad}, save / "sae_weights.safetensors")
        assert said in run("push", save, "me/saes").stderr
    (save / "eval_stats.json").write_text("[1]")
    save_file(weights, save / "sae_weights.safetensors")
    assert "eval_stats.json must hold" in failed(2, "push", save, "me/saes")
    (save / "sae_weights.safetensors").write_bytes(b"half")
    assert "cannot load" in failed(2, "push", save, "me/saes")


def test_a_run_that_is_not_finished_has_nothing_to_push(synthetic_yaml):
    run("train", synthetic_yaml, "--set", "n_checkpoints=1")
    assert run("push", "out", "me/saes", "--dry-run").exit_code == 0
    for file in ("cfg.json", "sae_weights.safetensors"):
        Path("out", file).unlink()
    assert "train --resume" in failed(2, "push", "out", "me/saes")
