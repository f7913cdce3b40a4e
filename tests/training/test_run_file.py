import pytest
import yaml
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.synthetic import SyntheticModelConfig

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.run_file import (
    LanguageModelRun,
    SyntheticRun,
    apply_overrides,
    load_run,
    parse_run,
    shipped_config,
)
from sae_lens_atm.training.synthetic_run import build_synthetic_model

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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("runner=cloud", ["runner is 'cloud': allowed is one of synthetic, language_model"]),
        ("sae.schedul=dual", ["sae.schedul: unknown key, did you mean 'schedule'?"]),
        ("trainig_samples=3", ["trainig_samples: unknown key, did you mean 'training_samples'?"]),
        (
            "hierarchy_model.rots=3",
            ["hierarchy_model.rots: unknown key, did you mean 'roots'?"],
        ),
        (
            "logger.wandb_projct=x",
            ["logger.wandb_projct: unknown key, did you mean 'wandb_project'?"],
        ),
        ("sae.schedule=odd", ["sae.schedule is 'odd': input should be 'dual', 'interleaved' or "]),
        ("sae.k=many", ["sae.k is 'many': input should be a valid number"]),
        ("batch_size=1.5", ["batch_size is 1.5: input should be a valid integer"]),
        ("sae.mask_rate=-1", ["sae.mask_rate is -1.0: allowed is 0 or more, and finite"]),
        ("sae.k=999", ["sae.k is 999.0: allowed is in (0, d_sae = 32]"]),
        ("hierarchy_model.coverage=1", ["hierarchy_model.coverage is 1.0: allowed is in (0, 1)"]),
        ("sae.d_in=17", ["sae.d_in is 17: allowed is 16, the hidden_dim of the synthetic model"]),
        ("sae.architecture=amt", ["sae.architecture is 'amt': allowed is one of "]),
        ("sae=atm", ["sae is 'atm': allowed is a mapping with an architecture"]),
        ("output_path=null", ["output_path is None: allowed is a folder"]),
        ("sae.d_in=null", ["sae.d_in is None: input should be a valid integer"]),
        ("synthetic_model=x", ["one of hierarchy_model and synthetic_model must be given"]),
        ("sae.K=3", ["sae.K: unknown key"]),
        ("hierarchy_model.Roots=3", ["hierarchy_model.Roots: unknown key, did you mean 'roots'?"]),
        ("batch_size=0", ["batch_size is 0: allowed is more than 0"]),
        ("training_samples=-5", ["training_samples is -5: allowed is more than 0"]),
        ("lr=-1", ["lr is -1.0: allowed is more than 0"]),
        ("lr_scheduler_name=cosine", ["lr_scheduler_name is 'cosine': allowed is one of constant"]),
        ("device=tpux", ["device is 'tpux': allowed is a device of torch"]),
        ("output_path=''", ["output_path is '': allowed is a folder"]),
        ("sae.architecture=[1]", ["sae.architecture is [1]: allowed is one of"]),
        ("sae.dtype=float12", ["sae.dtype is 'float12': allowed is one of"]),
        (
            "sae.schedule_steps=1000000000000000000000",
            ["sae.schedule_steps is 1000000000000000000000:"],
        ),
        ("nonsense", ["--set 'nonsense': allowed is key=value"]),
        ("lr=[", ["--set 'lr=[': the value is not YAML"]),
    ],
)
def test_each_mistake_is_one_line(synthetic_yaml, override, expected):
    lines = lines_of(synthetic_yaml, override)
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_every_mistake_is_reported(synthetic_yaml):
    lines = lines_of(synthetic_yaml, "batch_size=x", "lr=y")
    assert sorted(line.split()[0] for line in lines) == ["batch_size", "lr"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("synthetic_model.hierarchy.foo=1", "synthetic_model.hierarchy.foo: unknown key"),
        ("synthetic_model.hierarchy=3", "synthetic_model.hierarchy is 3: "),
        ("synthetic_model.mean_firing_magnitudes=abc", "synthetic_model.mean_firing_magnitudes is"),
        (
            "synthetic_model.firing_probability.generator_name=x",
            "synthetic_model: Unknown name: 'x'",
        ),
    ],
)
def test_mistakes_in_a_nested_model_are_one_line_too(override, expected):
    (line,) = lines_of(shipped_config("sister-b"), override)
    assert line.startswith(expected)


def test_misspelt_architecture_gets_a_suggestion(synthetic_yaml):
    assert "did you mean 'batchtopk'?" in lines_of(synthetic_yaml, "sae.architecture=batchtop")[0]


def test_missing_field(synthetic_yaml):
    content = yaml.safe_load(synthetic_yaml.read_text())
    del content["sae"]["d_sae"]
    with pytest.raises(SettingsError, match=r"sae\.d_sae: missing, and has no default"):
        parse_run(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is not YAML"), ("- 1", "holds list: allowed is a mapping"), ("\x00", "not YAML")],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    lines = lines_of(path)
    assert len(lines) == 1
    assert message in lines[0]
    assert "cannot read" in lines_of(tmp_path / "missing.yaml")[0]


def test_overrides_make_a_copy_and_new_branches():
    content = {"sae": {"k": 1}}
    assert apply_overrides(content, ["sae.k=2", "logger.run_name=x"]) == {
        "sae": {"k": 2},
        "logger": {"run_name": "x"},
    }
    assert content == {"sae": {"k": 1}}


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


def test_unknown_shipped_config():
    with pytest.raises(SettingsError, match="allowed is a path or one of compare-gemma"):
        shipped_config("nope")


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
    assert lines_of(shipped_config("demo")) == [
        "architectures: this is a comparison, for `sae-lens-atm compare`"
    ]
