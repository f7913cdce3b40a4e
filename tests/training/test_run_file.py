import pytest
import yaml
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.synthetic import SyntheticModelConfig

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.run_file import (
    LanguageModelRun,
    SyntheticRun,
    batch_size_of,
    load_run,
    parse_run,
)
from sae_lens_atm.training.synthetic_run import build_synthetic_model
from sae_lens_atm.yaml_files import shipped_config

SHIPPED = sorted(
    path.stem
    for path in shipped_config("demo").parent.glob("*.yaml")
    if path.stem != "demo" and not path.stem.startswith("compare-")
)


def lines_of(path, *overrides):
    with pytest.raises(SettingsError) as caught:
        load_run(path, overrides)
    return str(caught.value).splitlines()


def test_a_run_file_becomes_saelens_configs(synthetic_yaml):
    run = load_run(synthetic_yaml, ["sae.k=3", "lr=2e-3", "logger.wandb_project=mine"])
    assert isinstance(run, SyntheticRun)
    assert isinstance(run.runner.sae, ATMTrainingSAEConfig)
    assert (run.runner.sae.k, run.runner.lr, run.seed) == (3, 2e-3, 3)
    assert run.runner.logger.wandb_project == "mine"
    assert not run.runner.logger.log_to_wandb
    assert run.runner.checkpoint_path == "out/checkpoints"
    assert run.hierarchy is not None
    assert run.hierarchy.roots == 4


def test_language_model_run_file(language_model_yaml):
    run = load_run(language_model_yaml)
    assert isinstance(run, LanguageModelRun)
    assert isinstance(run.runner, LanguageModelSAERunnerConfig)
    assert run.runner.checkpoint_path == "out/checkpoints"
    assert run.runner.seed == 1
    assert batch_size_of(run) == 64


# Whole messages: tests/cli/test_messages.py
@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("runner=cloud", "runner"),
        ("sae.mask_rat=1", "sae.mask_rat"),
        ("trainig_samples=3", "trainig_samples"),
        ("hierarchy_model.rots=3", "hierarchy_model.rots"),
        ("logger.wandb_projct=x", "logger.wandb_projct"),
        ("sae.activation=odd", "sae.activation"),
        ("sae.k=many", "sae.k"),
        ("batch_size=1.5", "batch_size"),
        ("sae.mask_rate=-1", "sae.mask_rate"),
        ("sae.k=999", "sae.k"),
        ("hierarchy_model.coverage=1", "hierarchy_model.coverage"),
        ("sae.d_in=17", "sae.d_in"),
        ("sae.architecture=amt", "sae.architecture"),
        ("sae.architecture=[1]", "sae.architecture"),
        ("sae=atm", "sae"),
        ("output_path=null", "output_path"),
        ("output_path=''", "output_path"),
        ("sae.d_in=null", "sae.d_in"),
        ("sae.K=3", "sae.K"),
        ("batch_size=0", "batch_size"),
        ("training_samples=-5", "training_samples"),
        ("max_bad_batches=0", "max_bad_batches"),
        ("lr=-1", "lr"),
        ("lr_scheduler_name=cosine", "lr_scheduler_name"),
        ("device=tpux", "device"),
        ("sae.dtype=float12", "sae.dtype"),
        ("sae.schedule_steps=1000000000000000000000", "sae.schedule_steps"),
        ("sae.schedule=interleaved", "sae.schedule"),
        ("sae.k_start=4", "sae.k_start"),
        ("sae.activation=jumprelu", "sae.activation"),
        ("synthetic_model=x", "set either hierarchy_model or synthetic_model"),
        ("training_samples=10", "training_samples"),
        ("training_samples=1.5e0", "training_samples"),
        ("lr=.inf", "lr"),
        ("lr=.nan", "lr"),
        ("lr_end=.nan", "lr_end"),
        ("lr_end=-1", "lr_end"),
        ("adam_beta1=2", "adam_beta1"),
        ("adam_beta2=1.0", "adam_beta2"),
        ("n_restart_cycles=0", "n_restart_cycles"),
        ("seed=99999999999999999999", "seed"),
        ("seed=-1", "seed"),
        ("hierarchy_model.seed=-1", "hierarchy_model.seed"),
        ("hierarchy_model.mean_magnitude=.inf", "hierarchy_model.mean_magnitude"),
        ("hierarchy_model.depth=50", "hierarchy_model.depth"),
        ("hierarchy_model.depth=20", "hierarchy_model"),
        ("sae.decoder_init_norm=.nan", "sae.decoder_init_norm"),
        ("sae.decoder_init_norm=0", "sae.decoder_init_norm"),
        ("sae.d_sae=1e12", "sae.d_sae"),
        ("lr_warm_up_steps=-5", "lr_warm_up_steps"),
        ("lr_warm_up_steps=41", "lr_warm_up_steps"),
        ("lr_decay_steps=40", "lr_warm_up_steps"),
        ("n_checkpoints=-1", "n_checkpoints"),
        ("n_checkpoints=41", "n_checkpoints"),
        ("eval_samples=-1", "eval_samples"),
        ("eval_frequency=-1", "eval_frequency"),
        ("device=meta", "device"),
        ("sae.device=warp9", "sae.device"),
        ("sae={architecture: topk, d_in: 16, d_sae: 8, k: 2, device: warp9}", "sae.device"),
        ("sae={architecture: topk, d_in: 16, d_sae: 1e12, k: 2}", "sae.d_sae"),
        ("logger.wandb_log_frequency=0", "logger.wandb_log_frequency"),
    ],
)
def test_a_mistake_is_one_line_that_starts_with_the_field(synthetic_yaml, override, field):
    (line,) = lines_of(synthetic_yaml, override)
    assert line.startswith((f"{field} ", f"{field}: ", f"{field},"))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["lr_warm_up_steps=20", "lr_decay_steps=20"], "lr_warm_up_steps"),
        (["lr_decay_steps=5", "lr_end=0"], "lr_end"),
        (["lr_decay_steps=5", "lr_end=1"], "lr_end"),
        (["n_restart_cycles=39"], "n_restart_cycles"),
    ],
)
def test_schedules_must_fit_the_run(synthetic_yaml, settings, field):
    scheduler = "lr_scheduler_name=cosineannealingwarmrestarts"
    (line,) = lines_of(synthetic_yaml, scheduler, *settings)
    assert line.startswith(f"{field} ")


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ("architecture: topk, k: 41", "sae.k must be above 0 and at most sae.d_sae = 32, got 41"),
        ("architecture: batchtopk, k: -1.0", "sae.k must be above 0 and at most sae.d_sae = 32,"),
        ("architecture: standard, l1_coefficient: -1", "sae.l1_coefficient must be 0 or more, and"),
        ("architecture: standard, dtype: float12", "sae: Invalid dtype: float12. Must be one of"),
        (
            "architecture: jumprelu, jumprelu_bandwidth: 0",
            "sae.jumprelu_bandwidth must be above 0, and at most 1e6, got 0.0",
        ),
        (
            "architecture: jumprelu, jumprelu_sparsity_loss_mode: quadratic",
            "sae: cfg.target_l0 must be set for quadratic sparsity loss mode.",
        ),
        (
            "architecture: matryoshka_batchtopk, k: 2, matryoshka_widths: [8, 64]",
            "sae: cfg.matryoshka_widths must be strictly increasing.",
        ),
    ],
)
def test_mistakes_that_other_architectures_do_not_check(synthetic_yaml, sae, message):
    """SAELens' classes raised them after the data were made, in a step, or never."""
    (line,) = lines_of(synthetic_yaml, f"sae={{{sae}, d_in: 16, d_sae: 32}}")
    assert line.startswith(message)


def test_warm_up_and_decay_may_fill_the_run(synthetic_yaml):
    load_run(synthetic_yaml, ["lr_warm_up_steps=20", "lr_decay_steps=20"])


def test_language_model_runs_have_the_same_limits(language_model_yaml):
    (line,) = lines_of(language_model_yaml, "training_tokens=10")
    assert line == (
        "training_tokens must be at least train_batch_size_tokens = 64, which is one step, got 10"
    )
    (line,) = lines_of(language_model_yaml, "activations_mixing_fraction=1.5")
    assert line.startswith("activations_mixing_fraction must be in [0, 1]")


def test_whole_numbers_may_have_an_exponent(synthetic_yaml):
    run = load_run(synthetic_yaml, ["training_samples=1e5", "seed=2e0", "sae.parent_rows=1e1"])
    assert (run.runner.training_samples, run.seed, run.runner.sae.parent_rows) == (10**5, 2, 10)
    assert isinstance(run.seed, int)


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("sae.mask_rat=1", "mask_rate"),
        ("trainig_samples=3", "training_samples"),
        ("hierarchy_model.Roots=3", "roots"),
        ("logger.wandb_projct=x", "wandb_project"),
        ("sae.architecture=batchtop", "batchtopk"),
    ],
)
def test_a_misspelling_gets_a_suggestion(synthetic_yaml, override, suggestion):
    assert lines_of(synthetic_yaml, override)[0].endswith(f"did you mean {suggestion!r}?")


def test_every_mistake_is_reported(synthetic_yaml):
    lines = lines_of(synthetic_yaml, "batch_size=x", "lr=y")
    assert sorted(line.split()[0] for line in lines) == ["batch_size", "lr"]


def test_removed_fields_with_the_remaining_value_are_dropped(synthetic_yaml):
    old = [
        "sae.schedule=dual",
        "sae.mask_granularity=step",
        "sae.k_start=1",
        "sae.mask_ramp_steps=0",
    ]
    assert load_run(synthetic_yaml, old).runner.sae == load_run(synthetic_yaml).runner.sae


def test_other_architectures_have_no_removed_fields(synthetic_yaml):
    """`activation: jumprelu` was an option of ATM. Other architectures do not know the field."""
    other = ["sae={architecture: batchtopk, d_in: 16, d_sae: 32, k: 2, schedule: dual}"]
    assert lines_of(synthetic_yaml, *other) == ["sae.schedule: unknown key"]


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("synthetic_model.hierarchy.foo=1", "synthetic_model.hierarchy.foo"),
        ("synthetic_model.hierarchy=3", "synthetic_model.hierarchy"),
        ("synthetic_model.mean_firing_magnitudes=abc", "synthetic_model.mean_firing_magnitudes"),
        ("synthetic_model.firing_probability.generator_name=x", "synthetic_model"),
    ],
)
def test_mistakes_in_a_nested_model_are_one_line_too(override, field):
    (line,) = lines_of(shipped_config("sister-b"), override)
    assert line.startswith((f"{field} ", f"{field}: "))


def test_missing_field(synthetic_yaml):
    content = yaml.safe_load(synthetic_yaml.read_text())
    del content["sae"]["d_sae"]
    with pytest.raises(SettingsError, match=r"^sae\.d_sae: missing"):
        parse_run(content)


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("sweep-")])
def test_shipped_configs_are_valid(name):
    run = load_run(shipped_config(name))
    assert run.runner.sae.architecture() == "atm"
    # the schedule is laid out over the training that the file asks for
    assert run.runner.sae.schedule_steps == run.runner.total_training_steps


def test_a_schedule_given_is_kept(synthetic_yaml):
    text = synthetic_yaml.read_text().replace("schedule_steps: 40, ", "")
    synthetic_yaml.write_text(text)
    assert load_run(synthetic_yaml).runner.sae.schedule_steps == 40
    longer = load_run(synthetic_yaml, ["training_samples=6400"])
    assert longer.runner.sae.schedule_steps == 100
    given = load_run(synthetic_yaml, ["sae.schedule_steps=7"])
    assert given.runner.sae.schedule_steps == 7


def test_the_issue_s_configs_are_there():
    wanted = {"sister-a", "sister-b", "synthsaebench-16k", "gpt2-small", "pythia-160m"}
    gemmas = {"gemma-2-2b-l12-16k", "gemma-2-2b-l12-65k", "gemma-2-9b-l20-16k"}
    assert wanted | gemmas <= set(SHIPPED)


def test_sister_a_is_the_protocol():
    run = load_run(shipped_config("sister-a"))
    model = build_synthetic_model(run)
    assert (model.cfg.num_features, model.cfg.hidden_dim) == (256, 64)


def test_synthsaebench_is_the_published_model():
    run = load_run(shipped_config("synthsaebench-16k"))
    model = run.runner.synthetic_model
    assert isinstance(model, SyntheticModelConfig)
    assert (model.num_features, model.hidden_dim, model.seed) == (16384, 768, 42)
    assert model.firing_probability.to_dict() == {
        "generator_name": "zipfian",
        "exponent": 0.5,
        "max_prob": 0.4,
        "min_prob": 5e-4,
    }
    assert model.hierarchy.to_dict() == {
        "total_root_nodes": 128,
        "branching_factor": 4,
        "max_depth": 3,
        "mutually_exclusive_portion": 1.0,
        "mutually_exclusive_min_depth": 0,
        "mutually_exclusive_max_depth": None,
        "compensate_probabilities": True,
        "scale_children_by_parent": True,
    }
    assert model.mean_firing_magnitudes.to_dict() == {
        "generator_name": "linear",
        "start": 5.0,
        "end": 4.0,
    }
    assert model.std_firing_magnitudes.mean == model.std_firing_magnitudes.std == 0.5
    assert model.correlation.to_dict() == {"rank": 25, "correlation_scale": 0.1, "seed": None}
    assert (model.orthogonalization.num_steps, model.orthogonalization.lr) == (100, 3e-4)
    assert model.bias == 0.5
    assert run.runner.training_samples == 200_000_000


def test_a_comparison_is_no_run():
    (line,) = lines_of(shipped_config("demo"))
    assert line.startswith("architectures: ")
