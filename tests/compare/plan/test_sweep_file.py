import re
from pathlib import Path

import pytest
import yaml

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.run_file import load_run

SWEEP = """
sweep:
  over:
    lr: [1.0e-2, 1.0e-3]
    sae: {mask_rate: [0.5, 2]}
  objective: mcc
"""


@pytest.fixture
def sweep_yaml(comparison_yaml):
    """ATM and TopK, and what they are swept over."""
    content = yaml.safe_load(comparison_yaml.read_text())
    for name in ("jumprelu", "untrained"):
        del content["architectures"][name]
    content |= {"seeds": [0], "l0": [2]}
    comparison_yaml.write_text(yaml.safe_dump(content) + SWEEP)
    return comparison_yaml


def test_each_architecture_is_swept_over_the_fields_that_it_has(sweep_yaml):
    comparison = load_sweep(sweep_yaml)
    found = {
        p.entry: (p.run.runner.lr, getattr(p.run.runner.sae, "mask_rate", None))
        for p in comparison.planned
    }
    assert found == {
        "atm, lr 0.01, mask_rate 0.5": (0.01, 0.5),
        "atm, lr 0.01, mask_rate 2": (0.01, 2),
        "atm, lr 0.001, mask_rate 0.5": (0.001, 0.5),
        "atm, lr 0.001, mask_rate 2": (0.001, 2),
        "topk, lr 0.01": (0.01, None),
        "topk, lr 0.001": (0.001, None),
    }
    points = comparison.sweep.points
    assert points["topk, lr 0.01"].entry == "topk"
    assert points["atm, lr 0.001, mask_rate 2"].values == {"lr": 0.001, "sae.mask_rate": 2}
    assert all(p.run.runner.sae.k == 2 for p in comparison.planned)


def test_what_a_comparison_shares_can_be_swept_too(sweep_yaml):
    comparison = load_sweep(
        sweep_yaml, ["sweep.over={batch_size: [32, 64], training_samples: [640]}"]
    )
    shapes = {
        (p.run.runner.batch_size, p.run.runner.total_training_steps) for p in comparison.planned
    }
    assert shapes == {(32, 20), (64, 10)}
    assert len({p.data_key for p in comparison.planned}) == 2


def test_points_that_look_alike_have_names_of_their_own(sweep_yaml):
    comparison = load_sweep(
        sweep_yaml, ["sweep={points: 5, over: {lr: {low: 0.0100001, high: 0.0100002}}}"]
    )
    atm = [p for p in comparison.planned if p.entry.startswith("atm")]
    assert len({p.entry for p in atm}) == len({p.run.runner.lr for p in atm}) == 5


def test_a_run_file_is_swept_at_its_own_l0_and_seed(synthetic_yaml):
    comparison = load_sweep(synthetic_yaml, ["sweep.over.lr=[1.0e-2, 1.0e-3]"])
    assert [(p.entry, p.l0, p.seed) for p in comparison.planned] == [
        ("atm, lr 0.01", 2, 3),
        ("atm, lr 0.001", 2, 3),
    ]
    assert {p.run.runner.sae.k for p in comparison.planned} == {2}
    more = load_sweep(synthetic_yaml, ["sweep.over.lr=[1e-2]", "seeds=[5, 6]", "l0=[3]"])
    assert [(p.entry, p.l0, p.seed) for p in more.planned] == [
        ("atm, lr 0.01", 3, 5),
        ("atm, lr 0.01", 3, 6),
    ]


def test_fields_of_the_forward_pass_make_groups_of_their_own(language_model_comparison_yaml):
    comparison = load_sweep(
        language_model_comparison_yaml,
        ["sweep={over: {train_batch_size_tokens: [32, 64], lr: [1.0e-3, 1.0e-2]}}", "seeds=[0]"],
    )
    groups = {
        p.group: {
            q.run.runner.train_batch_size_tokens for q in comparison.planned if q.group == p.group
        }
        for p in comparison.planned
    }
    assert groups == {
        "seed 0, train_batch_size_tokens 32": {32},
        "seed 0, train_batch_size_tokens 64": {64},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=3"], "sweep: missing"),
        (["sweep={}"], "sweep.over: missing"),
        (["sweep.over={}"], "sweep.over: "),
        (["sweep.pionts=3"], "sweep.pionts: unknown key, did you mean 'points'?"),
        (["sweep.points=0"], "sweep.points must be"),
        (["sweep.objective=l0"], "sweep.objective must be"),
        (["sweep.objective=mccc"], "did you mean 'mcc'?"),
        (["sweep.over.lr=0.1"], "sweep.over.lr must be"),
        (["sweep.over.lr=[]"], "sweep.over.lr must be"),
        (["sweep.over.lr={low: 2, high: 1}"], "sweep.over.lr: low must be less than high"),
        (["sweep.over.lr={low: a, high: 1}"], "sweep.over.lr.low"),
        (["sweep.over.lr={low: 1, high: 2}"], "sweep.points: missing"),
        (["sweep.over.seed=[1, 2]"], "sweep.over.seed cannot differ"),
        (["sweep.over.l0=[1, 2]"], "sweep.over.l0 cannot differ"),
        (["sweep.over.sae.k=[1, 2]"], "sweep.over.sae.k is the L0"),
        (["sweep.over.sae.mask_rat=[1, 2]"], "sweep.over.sae.mask_rat: no architecture"),
        (["sweep.over.lrr=[1]"], "lrr: unknown key, did you mean 'lr'?"),
        (["sweep.over.lr=[x]"], "lr must be a valid number"),
        (["architectures=3"], "architectures must be"),
        (["architectures.atm=3"], "architectures.atm must be"),
        (["sweep.objective=stability"], "sweep.objective must be"),
        (["sweep.objective=ce_loss_score"], "got 'ce_loss_score'"),
        (["sweep.objective=f1", "not_ranked=[f1]"], "got 'f1'"),
        (["sweep.over.eval_samples=[9]"], "sweep.over.eval_samples cannot differ"),
        (["sweep.over.hook_name=[a]"], "sweep.over.hook_name cannot differ"),
        (["architectures={a: {architecture: [atm]}}"], "architecture"),
        (["sweep.over.lr=[2026-13-45]"], "not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_with_the_key(sweep_yaml, overrides, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_sweep(sweep_yaml, overrides)


def test_a_sweep_is_neither_a_comparison_nor_a_run(sweep_yaml, synthetic_yaml):
    with pytest.raises(SettingsError, match="sweep: not allowed"):
        load_comparison(sweep_yaml)
    with pytest.raises(SettingsError, match="sweep: this is a sweep"):
        load_run(synthetic_yaml, ["sweep.over.lr=[1]"])
    with pytest.raises(SettingsError, match="sweep: missing"):
        load_sweep(synthetic_yaml)


def test_a_pool_is_shared_by_runs_of_any_length(sweep_yaml):
    over = "sweep.over={training_samples: [1280, 2560], batch_size: [32, 64]}"
    comparison = load_sweep(sweep_yaml, ["pool_batches=10", over])
    assert len({planned.data_key for planned in comparison.planned}) == 2


def test_paths_can_be_absolute(sweep_yaml, tmp_path):
    assert load_sweep(sweep_yaml).output == Path("out")
    comparison = load_sweep(sweep_yaml, absolute_paths=True)
    assert comparison.output == tmp_path / "out"
    assert comparison.content["output_path"] == "out"


def test_many_fields_make_long_entries_and_short_folder_names(sweep_yaml):
    decays = ["adam_beta1", "adam_beta2", "sae.importance_decay"]
    others = ["lr", "lr_end", "sae.magnitude_weight", "sae.frequency_weight", "sae.mask_rate"]
    settings = [f"sweep.over.{name}=[0.5]" for name in decays + others]
    comparison = load_sweep(sweep_yaml, settings)
    assert max(len(planned.entry) for planned in comparison.planned) > 130
    assert max(len(planned.name) for planned in comparison.planned) < 130
