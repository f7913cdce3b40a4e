import pytest

from sae_lens_atm.compare import dry_run, load_comparison
from sae_lens_atm.compare.dry_run import describe_plan
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.run.language_model import train_group
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.timed_model import TimedModel
from sae_lens_atm.yaml_files import shipped_config

COMPARISONS = (
    "demo",
    "compare-sister-a",
    "compare-sister-a-peers",
    "compare-sister-b",
    "compare-sister-b-peers",
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


# --- the language model --------------------------------------------------------------------------

SCALED = ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=7"]


def test_a_language_model_is_timed(language_model_comparison_yaml, monkeypatch, tmp_path):
    monkeypatch.setattr(TimedModel, "time_prompts", lambda *_: (600, 7200.0))
    reported = []
    more = ["first_letters={}", "n_batches_in_buffer=16", "activations_mixing_fraction=0"]
    planned = load_comparison(language_model_comparison_yaml, [*more, *SCALED])
    facts = dry_run(planned, 2, reported.append)
    assert facts["checked"].startswith("hook and d_in, from its config.json")
    assert facts["columns"] == "text, tokenised during training"
    # In each of two groups, 7 and 20 training batches: those of the buffer are 4 model batches.
    batches = facts["language model"]
    assert batches.startswith("56 model batches of 4 x 16 tokens")
    assert "at most 16 of them before step 1 for the scale" in batches
    assert facts["evaluation"].startswith("8 SAEs on 128 tokens")
    assert facts["first letters"] == "600 prompts, without the probes, 2.0 h"
    assert facts["estimate"].startswith("about 60 min")  # two jobs at once
    assert "without" not in facts["estimate"]
    assert reported[0] == "training steps of atm"
    assert reported[-1] == "prompts for first letters"
    assert not (tmp_path / "out").exists()


def test_what_is_stored_is_not_timed(language_model_comparison_yaml):
    planned = load_comparison(language_model_comparison_yaml, ["seeds=[0]"])
    train_group(planned.planned[:4], planned.output, 4, lambda *_: None, StopFlag())
    facts = dry_run(planned, 1)
    assert not {"language model", "evaluation", "first letters"} & facts.keys()
    assert facts["runs"] == "4, 0 of them to train"


def test_a_cache_is_one_pass_of_the_model(language_model_comparison_yaml):
    settings = ["activations={cache: cached}", "n_eval_batches=2"]
    facts = dry_run(load_comparison(language_model_comparison_yaml, settings), 1)
    # 1280 tokens for training and two batches of 4 prompts for the evaluation, 4 prompts at once
    assert facts["cache"].startswith("22 model batches of 4 x 16 tokens")
    assert "language model" not in facts


def test_a_model_that_is_not_here_is_named(language_model_comparison_yaml):
    facts = dry_run(load_comparison(language_model_comparison_yaml, ["model_name=a/b"]), 1)
    assert "without the language model (a/b is not on this machine)" in facts["estimate"]
    assert facts["checked"].startswith("not checked: the model")
