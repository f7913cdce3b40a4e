"""The study's scripts, and that the tables in the docs are drawn from the committed results."""

import json
import re
from pathlib import Path

import pytest
import torch

from sae_lens_atm import ATMTrainingSAE, ATMTrainingSAEConfig
from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.report.results import Entry, Results, Row, Spread
from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model
from sae_lens_atm.method.importance import Signals
from tests.helpers import load_script, make_sae

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks/study"
RESULTS = STUDY / "results"
RECORDS = ROOT / "docs/lab-notebook"
NOTEBOOK = (ROOT / "docs/lab-notebook.md").read_text("utf-8")


def load(name):
    return load_script(STUDY / f"{name}.py")


targets = load("targets")


def row(entry, matched=True, **figures):
    spreads = {name: Spread(mean=value, sd=None, n=1) for name, value in figures.items()}
    return Row(entry=entry, l0_target=4, seeds=[0], matched=matched, moving=False, figures=spreads)


def results(*rows, not_ranked=()):
    roles = {"atm": "candidate", "control": "control"}
    entries = {
        r.entry: Entry(
            architecture=r.entry, role=roles.get(r.entry, "baseline"), l0_parameter="k", settings={}
        )
        for r in rows
    }
    return Results(
        name="x",
        created="",
        versions={},
        machine={},
        config={},
        not_ranked=list(not_ranked),
        entries=entries,
        runs=[],
        rows=list(rows),
        tests=[],
    )


def test_each_figure_has_its_own_best_baseline():
    found = results(
        row("atm", f1=0.9, absorption_full=0.01),
        row("topk", f1=0.7, absorption_full=0.2),
        row("jumprelu", f1=0.6, absorption_full=0.04),
        row("gated", matched=False, f1=0.99, absorption_full=0.0),
        row("control", f1=0.99, absorption_full=0.0),
        row("matching_pursuit", f1=0.85, absorption_full=0.1),
    )
    assert targets.best_baseline(found, "f1", one_step=True).entry == "topk"
    assert targets.best_baseline(found, "f1", one_step=False).entry == "matching_pursuit"
    assert targets.best_baseline(found, "absorption_full", one_step=True).entry == "jumprelu"
    lines = targets.table(found).splitlines()
    assert lines[2:] == [
        "| absorption, full | ≤ 0.3 x best | jumprelu 0.0400 | 0.0120 | 0.0100 | yes |",
        "| absorption, full | ≤ 0.05 x topk | topk 0.2000 | 0.0100 | 0.0100 | yes |",
        "| F1 | ≥ best + 0.1 | topk 0.700 | 0.800 | 0.900 | yes |",
        "| F1 | ≥ best + 0.1 | matching_pursuit 0.850 | 0.950 | 0.900 | no |",
    ]


def test_the_bound_of_a_figure_of_probing_is_two_standard_errors_above_the_best_baseline():
    ours, theirs = row(targets.ON_LANGUAGE_MODELS), row("topk")
    ours.figures["sparse_probing_1"] = Spread(mean=0.8, sd=0.03, n=9)
    theirs.figures["sparse_probing_1"] = Spread(mean=0.76, sd=0.04, n=16)
    found = results(ours, theirs, row("batchtopk", absorption_full=0.1))
    found.entries[ours.entry].role = "candidate"
    ours.figures["absorption_full"] = Spread(mean=0.06, sd=0.01, n=9)
    lines = targets.language_model_targets(found).splitlines()
    # sqrt(.03^2 / 9 + .04^2 / 16) = .01414, and .76 + 2 x .01414 = .788
    probing = "| sparse probing, k 1 | ≥ best + 2 standard errors | **0.800** / 0.788 topk |"
    assert probing in lines
    assert "| absorption, full | ≤ 0.5 x batchtopk | 0.060 / 0.050 batchtopk |" in lines


def test_where_less_is_better_the_standard_errors_lower_the_bound(monkeypatch):
    ours, theirs = row(targets.ON_LANGUAGE_MODELS), row("topk")
    ours.figures["dead_latents"] = Spread(mean=3.0, sd=0.0, n=9)
    theirs.figures["dead_latents"] = Spread(mean=10.0, sd=3.0, n=9)
    target = targets.Target("dead_latents", errors=2)
    monkeypatch.setattr(targets, "FOR_LANGUAGE_MODELS", [target])
    found = results(ours, theirs)
    found.entries[ours.entry].role = "candidate"
    (line,) = targets.language_model_targets(found).splitlines()[2:]
    assert "best \N{MINUS SIGN} 2 standard errors" in line
    assert line.endswith("| **3.0** / 8.0 topk |")  # 10 - 2 x 3 / sqrt(9)


def test_a_baseline_off_the_target_or_at_another_l0_sets_no_bound():
    ours = row(targets.ON_LANGUAGE_MODELS, absorption_full=0.1)
    off = row("batchtopk", matched=False, absorption_full=0.5)
    lines = targets.language_model_targets(results(ours, off)).splitlines()
    assert "| absorption, full | ≤ 0.5 x batchtopk | - |" in lines
    elsewhere = row("topk", f1=0.9).model_copy(update={"l0_target": 8})
    (line,) = targets.table(
        results(row("atm", f1=0.8), row("jumprelu", f1=0.6), elsewhere)
    ).splitlines()[2:]
    assert "jumprelu" in line


def test_where_absorption_is_not_ranked_there_is_no_target_for_it():
    found = results(
        row("atm", explained_variance=0.79, absorption_full=0.1),
        row("batchtopk", explained_variance=0.794, absorption_full=0.2),
        not_ranked=["absorption_full"],
    )
    (line,) = targets.table(found).splitlines()[2:]
    assert line == (
        "| explained variance | ≥ best \N{MINUS SIGN} 0.005 "
        "| batchtopk 0.794 | 0.789 | 0.790 | yes |"
    )


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.yaml")), ids=lambda p: p.stem)
def test_its_files_are_valid_comparisons(path):
    comparison = load_comparison(path)
    assert "candidate" in {p.settings.role for p in comparison.planned}


def test_the_notebook_shows_all_results_of_the_study():
    shown = {ROOT / path for path in re.findall(r"<!-- \w+: (\S+) -->", NOTEBOOK)}
    special = {RESULTS / f"{name}.json" for name in ("exploratory", "implied")}
    assert set(RESULTS.glob("*.json")) - special <= shown
    assert {ROOT / f"docs/sister-{name}/results.json" for name in "ab"} <= shown
    assert "<!-- implied -->" in NOTEBOOK.splitlines()


def test_every_section_of_the_notebook_has_the_same_parts():
    sections = re.split(r"^## (\d+)\. .*$", NOTEBOOK, flags=re.MULTILINE)[1:]
    numbers, texts = [int(n) for n in sections[::2]], sections[1::2]
    assert numbers == list(range(1, len(numbers) + 1))
    for number, text in list(zip(numbers, texts, strict=True))[:-1]:  # the last: what is not done
        for part in ("**Question.**", "**Conclusion.**"):
            assert part in text, (number, part)


def test_records_name_the_commit_at_which_they_run():
    """They hold removed options, so they are not comparisons of this version."""
    records = sorted(RECORDS.glob("*.yaml"))
    assert [path.stem for path in records] == [
        "ablations",
        "choices",
        "schedules-b",
        "tune-a",
        "tune-b",
    ]
    for path in records:
        (commit,) = re.findall(r"Runs at commit (\w{7}),", path.read_text("utf-8"))
        assert f"(lab-notebook/{path.name})" in NOTEBOOK
        assert f"`{commit}`" in NOTEBOOK
        assert not (STUDY / path.name).exists()


def test_the_metrics_example_runs(capsys):
    """With an SAE of three latents that detects a parent and its two children ideally."""

    class Ideal:
        W_dec = torch.eye(3, 4)

        def encode(self, x):
            return x[:, :3]

    features = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    scope = {
        "sae": Ideal(),
        "feature_vectors": torch.eye(3, 4),
        "x": torch.nn.functional.pad(features, (0, 1)),
        "true_features": features,
        "decoders_of_other_seeds": [torch.eye(3, 4), torch.eye(3, 4)[[2, 0, 1]]],
    }
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(source, scope)
    assert capsys.readouterr().out.split() == ["0.0", "1.0"]


@pytest.fixture
def small(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(
        "name: small\nrunner: synthetic\nl0: [2]\nseeds: [0]\n"
        "hierarchy_model: {hidden_dim: 16, roots: 4, lone_features: 4, depth: 1}\n"
        "sae: {d_in: 16, d_sae: 20}\nbatch_size: 128\ntraining_samples: 38_400\nlr: 1e-2\n"
        "eval_samples: 2000\narchitectures: {atm: {role: candidate}}\n"
    )
    return config


def test_the_ceiling_trains_the_encoder_of_the_true_dictionary(tmp_path, small):
    output = tmp_path / "ceiling.json"
    load("ceiling").main(small, output, l0=2, seeds=2)
    found = json.loads(output.read_text())
    assert found["mean"]["mcc"] == pytest.approx(1.0, abs=1e-3)
    assert found["mean"]["children_learned"] == 1.0
    assert found["mean"]["explained_variance"] > 0.8
    assert found["mean"]["explained_variance"] < found["explained_variance_true_activations"] < 1
    assert found["mean"]["f1"] == pytest.approx(
        sum(run["f1"] for run in found["runs"]) / 2, rel=1e-5
    )


def test_all_true_activations_explain_everything(small):
    run = load_comparison(small).planned[0].run
    assert load("ceiling").with_true_activations(run, l0=4 + 4) == pytest.approx(1, abs=1e-6)


def test_the_script_counts_implied_pairs_of_every_seed_at_every_l0(tmp_path, small):
    load("implied").main(small, tmp_path / "implied.json", l0=[2, 3], seeds=2)
    runs = json.loads((tmp_path / "implied.json").read_text())["runs"]
    assert [(run["l0"], run["seed"]) for run in runs] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    for run in runs:
        for counts in run["readings"].values():
            assert sum(n for name, n in counts.items() if name.startswith("pairs")) > 0


def test_pairs_and_their_energy_by_hand():
    implied = load("implied")
    model = build_hierarchy_model(HierarchyModelConfig(20, roots=4, lone_features=4, depth=1))
    model.feature_dict.feature_vectors.data = torch.eye(20)
    # four roots with three children each, numbered depth first, and four features of their own
    above = {f: {f // 4 * 4} if f < 16 and f % 4 else set() for f in range(20)}
    assert implied.ancestors(model) == above
    sae = ATMTrainingSAE(ATMTrainingSAEConfig(20, 20, k=2))
    sae.W_enc.data = torch.eye(20)
    sae.W_dec.data = torch.eye(20)
    sae.W_dec.data[1, 0] = 0.5  # a child that carries half of its root: cos^2 = .25 / 1.25
    tracker = sae.parent_tracker
    tracker.weight += 1
    tracker.magnitude += 1
    tracker.inputs += torch.eye(20)
    for child, parent in ((1, 0), (2, 3), (3, 2), (17, 16)):
        tracker.inputs[child, parent] = 1.0
    falling = torch.arange(20, 0, -1.0)
    sae.tracker.update(Signals(falling, falling, falling), torch.ones(20, dtype=torch.bool))
    batch = torch.zeros(2, 20)
    batch[0, 1] = 3.0
    found = implied.count(sae, model, batch)["own lift"]
    # 1 implies its root, 3 its sister and 17 a stranger; 2 none, as 3 is less important
    assert [found[f"pairs, {kind}"] for kind in ("true", "others", "unclear")] == [1, 2, 0]
    assert found["energy, true"] == pytest.approx(9 * 1.25 / 2 * 0.2)
    assert found["energy, others"] == 0


def test_the_pictures_are_drawn_from_the_committed_results(tmp_path):
    pictures = load("pictures")
    (tmp_path / "docs").mkdir()
    pictures.main(tmp_path)
    for name, panels in pictures.PICTURES.items():
        assert (tmp_path / name).stat().st_size > 20_000
        assert all((ROOT / path).exists() for panel in panels for path in panel.results)
    drawn = {path for panel in pictures.PICTURES["docs/results.png"] for path in panel.results}
    held_out = {f"benchmarks/study/results/{p.name}" for p in RESULTS.glob("held-out-*.json")}
    assert held_out <= drawn


def test_committed_results_do_not_tell_where_they_were_made():
    root = Path(__file__).parent.parent
    files = [*root.glob("docs/*/results.json"), *root.glob("benchmarks/study/results/*.json")]
    kept = [json.loads(file.read_text(encoding="utf-8")).get("config", {}) for file in files]
    folders = [config["output_path"] for config in kept if "output_path" in config]
    assert len(folders) > 10
    assert not [folder for folder in folders if Path(folder).is_absolute()]


def test_where_a_figure_is_best_over_l0s():
    load("found_l0")
    script = load("l0_figures")
    least = {2.0: 5.0, 4.0: 1.0, 8.0: 5.0}
    assert script.answer(least, -1) == 4
    assert script.answer(least, 1) is None  # at an end
    curves = dict.fromkeys(script.FIGURES, least) | {"saved_bits": {2.0: 1, 4.0: 3, 8.0: 1}}
    text = script.table({"flat": {"true_l0": 4.5, "curves": curves}})
    cells = ["held out: one level", "4.50", *["**4.00**"] * 3, "at an end", "**4.00**"]
    assert text.splitlines()[-1] == f"| {' | '.join(cells)} |"


def test_the_figures_of_an_sae_over_l0s_by_hand():
    load("found_l0")
    script = load("l0_figures")
    sae = make_sae(d_in=2, d_sae=3, k=1).eval()
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    with torch.no_grad():
        sae.W_dec.copy_(rows)

    class Given:
        W_dec = sae.W_dec
        cfg, device, dtype, b_dec = sae.cfg, sae.device, sae.dtype, sae.b_dec
        run_time_activation_norm_fn_in = staticmethod(lambda x: x)
        encode = staticmethod(
            lambda _: torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
        )

    found = script.figures(Given, torch.randn(4, 2))
    assert found["decoder_cosine"] == pytest.approx((0 + 0.6 + 0.8) / 3)
    assert found["squared_cosine"] == pytest.approx((0 + 0.36 + 0.64) / 3)
    # Latents 0 and 2 fire together, 1 with neither: excess .25, -.25 and -.25.
    pairs = torch.tensor([[0.0, 0.6, 0.8], [-0.25, 0.25, -0.25]])
    assert found["cosine_and_firing"] == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), rel=1e-4)
