import pytest

from sae_lens_atm.compare import dry_run, load_comparison
from sae_lens_atm.compare.dry_run import describe_plan
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.yaml_files import shipped_config

COMPARISONS = (
    "demo",
    "compare-sister-a",
    "compare-sister-b",
    "compare-spelling-lm",
    "compare-gemma-2-2b-l12-16k",
)


def test_a_dry_run_has_the_plan_and_an_estimate(comparison_yaml, tmp_path):
    facts = dry_run(load_comparison(comparison_yaml), 2)
    assert facts["runs"] == "16, 12 of them to train"
    assert facts["entries"] == "atm, topk, jumprelu, untrained"
    assert facts["estimate"].startswith("about ")
    assert {"atm", "topk", "jumprelu"} <= set(facts["ms a step"].replace(",", "").split())
    assert not (tmp_path / "out").exists()


def test_on_a_missing_device_the_plan_has_no_estimate(comparison_yaml):
    facts = dry_run(load_comparison(comparison_yaml, ["device=cuda:77"]), 1)
    assert facts["estimate"].startswith("none: ")


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_shipped_comparison_can_be_planned(name):
    for quick in (False, True):
        comparison = load_comparison(shipped_config(name), ["output_path=out"], quick=quick)
        assert any(p.settings.role == "candidate" for p in comparison.planned)
    facts = describe_plan(comparison, 2)
    assert facts["runs"].startswith(f"{len(comparison.planned)}, ")
    assert ("SAEs in a job" in facts) == (not comparison.is_synthetic)


@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_sweep_can_be_planned(quick):
    comparison = load_sweep(shipped_config("sweep-sister-a"), ["output_path=out"], quick=quick)
    assert {p.settings.architecture for p in comparison.planned} == {"atm", "batchtopk"}
    assert comparison.sweep.objective == "absorption_fraction"
    assert describe_plan(comparison, 2)["L0"] == "4"
