import re

import pytest

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.plan.l0_target import L0Parameter
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.yaml_files import shipped_config


def test_every_entry_l0_and_seed_is_planned(comparison_yaml):
    comparison = load_comparison(comparison_yaml)
    planned = {(p.entry, p.l0, p.seed) for p in comparison.planned}
    assert len(comparison.planned) == len(planned) == 4 * 2 * 2
    # seed by seed
    assert [p.seed for p in comparison.planned] == [0] * 8 + [1] * 8


def test_what_is_shared_and_what_is_not(comparison_yaml):
    planned = {p.label: p for p in load_comparison(comparison_yaml).planned}
    atm, topk, jumprelu = (planned[f"{n}, L0 3, seed 1"] for n in ("atm", "topk", "jumprelu"))
    assert atm.run.runner.sae.schedule_steps == 40
    assert {p.run.runner.sae.d_sae for p in planned.values()} == {32}
    assert (topk.run.runner.lr, jumprelu.run.runner.lr) == (1e-2, 3e-3)
    assert atm.run.runner.sae.k == topk.run.runner.sae.k == 3
    assert atm.l0_parameter == topk.l0_parameter == L0Parameter("k", False)
    assert jumprelu.l0_parameter == L0Parameter("l0", True)
    assert atm.run.seed == 1
    assert atm.run.runner.sae.mask_seed == 1  # seeds of the architecture follow the run's


def test_jumprelus_quadratic_loss_has_the_l0_as_a_setting(comparison_yaml):
    quadratic = "architectures.jumprelu.sae.jumprelu_sparsity_loss_mode=quadratic"
    comparison = load_comparison(
        comparison_yaml, ["architectures.jumprelu.l0_parameter=target_l0", quadratic]
    )
    runs = [p for p in comparison.planned if p.entry == "jumprelu"]
    assert all(p.run.runner.sae.target_l0 == p.l0 for p in runs)
    assert {p.l0_parameter for p in runs} == {L0Parameter("target_l0", False)}


def test_a_shared_field_is_passed_to_the_architectures_that_have_it(comparison_yaml):
    comparison = load_comparison(comparison_yaml, ["sae.aux_loss_coefficient=0.5"])
    by_entry = {p.entry: p.run.runner.sae for p in comparison.planned}
    assert by_entry["atm"].aux_loss_coefficient == by_entry["topk"].aux_loss_coefficient == 0.5
    assert not hasattr(by_entry["jumprelu"], "aux_loss_coefficient")


def test_quick_is_what_the_file_says(comparison_yaml):
    comparison = load_comparison(comparison_yaml, quick=True)
    assert {(p.l0, p.seed) for p in comparison.planned} == {(2, 0)}
    assert comparison.planned[0].run.runner.total_training_steps == 10
    # and --set has the last word
    longer = load_comparison(comparison_yaml, ["training_samples=1280"], quick=True)
    assert longer.planned[0].run.runner.total_training_steps == 20


def test_the_default_folder_is_the_file_s_name_with_figures_not_ranked(comparison_yaml):
    text = comparison_yaml.read_text().replace("output_path: out\n", "not_ranked: [mcc]\n")
    comparison_yaml.write_text(text)
    assert load_comparison(comparison_yaml).output.name == "small"


def test_quick_has_a_folder_of_its_own(comparison_yaml):
    text = comparison_yaml.read_text().replace("output_path: out\n", "")
    comparison_yaml.write_text(text)
    assert load_comparison(comparison_yaml).output.name == "small"
    assert load_comparison(comparison_yaml, quick=True).output.name == "small-quick"
    comparison_yaml.write_text(text + "output_path: here\n")
    assert load_comparison(comparison_yaml, quick=True).output.name == "here-quick"


def test_quick_without_changes_is_an_error(comparison_yaml):
    text = comparison_yaml.read_text().partition("quick:")[0]
    for value in ("", "quick: true\n"):
        comparison_yaml.write_text(text + value)
        with pytest.raises(SettingsError, match=r"quick must be a mapping.*got (None|True)"):
            load_comparison(comparison_yaml, quick=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("l0=[]", "got []"),
        ("l0=[0]", "l0 must be"),
        ("l0=[2, 2]", "l0 must have each value once"),
        ("seeds=[1, 1]", "seeds must have each value once"),
        ("seed=3", "seed: not allowed"),
        ("architectures.atm.rolle=candidate", "architectures.atm.rolle: unknown key, did you mean"),
        ("architectures.atm.role=winner", "architectures.atm.role must be"),
        ("architectures.atm.run.seed=3", "architectures.atm.run.seed cannot differ"),
        (
            "architectures.atm.run.batch_siz=3",
            "architectures.atm: batch_siz: unknown key, did you mean",
        ),
        ("architectures.atm.architecture=amt", "architectures.atm: sae.architecture must be"),
        ("architectures.atm.sae.c_rampsteps=1", "architectures.atm: sae.c_rampsteps: unknown key"),
        ("architectures.topk.l0_parameter=nope", "architectures.topk: l0_parameter is 'nope'"),
        ("architectures.topk.l0_knob=k", "architectures.topk.l0_knob: renamed, use l0_parameter"),
        ("sae.d_saee=3", "architectures.atm: sae.d_saee: unknown key"),
        ("sae=3", "sae must be"),
        ("eval_samples=0", "eval_samples must be"),
        ("sae.d_in=17", "architectures.atm: sae.d_in must be"),
        ("not_ranked=[mccc]", "got 'mccc'"),
        ("l0=[1000]", "architectures.atm: sae.k"),
    ],
)
def test_a_mistake_is_an_error_with_the_key(comparison_yaml, override, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_comparison(comparison_yaml, [override])


def test_a_run_file_is_not_a_comparison(synthetic_yaml):
    with pytest.raises(SettingsError, match="architectures: missing"):
        load_comparison(synthetic_yaml)


@pytest.mark.parametrize("name", ["compare-sister-a", "compare-sister-b"])
def test_the_sisters_hold_all_nine_architectures_and_controls(name):
    comparison = load_comparison(shipped_config(name))
    assert {p.run.runner.sae.architecture() for p in comparison.planned} == {
        "atm",
        "topk",
        "batchtopk",
        "jumprelu",
        "matryoshka_batchtopk",
        "standard",
        "gated",
        "abstopk",
        "matching_pursuit",
    }
    controls = {p.entry for p in comparison.planned if p.settings.role == "control"}
    assert {"untrained", "atm (masking off)", "atm (both off)"} <= controls
    assert len({p.seed for p in comparison.planned}) >= 3
    assert len({p.l0 for p in comparison.planned}) >= 3
