import json
import math
import os
import signal
import threading

import pytest
import torch
import wandb
from sae_lens import (
    SAE,
    JumpReLUSAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.synthetic import (
    FeatureDictionary,
    SyntheticModel,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)

from sae_lens_atm import ATMSAE, ATMTrainingSAE, ATMTrainingSAEConfig
from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model
from sae_lens_atm.errors import CheckpointError, Interrupted, SettingsError
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.conftest import CONTEXT
from tests.helpers import ACTIVATIONS, PRESETS, state_equal
from tests.training.runs import (
    resumes_bit_for_bit,
    stop_after,
    stopped_after,
    synthetic_run,
    trained_files,
)

QUIET = LoggingConfig(log_to_wandb=False)
TINY = {
    "model_name": "tiny",
    "context_size": CONTEXT,
    "training_tokens": 1920,
    "train_batch_size_tokens": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 4,
    "logger": QUIET,
}


# --- our runs ------------------------------------------------------------------------------------


def test_synthetic_run_saves_a_stock_sae_and_its_figures(synthetic_yaml, tmp_path):
    run = load_run(synthetic_yaml)
    result = train(run)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
        "eval_stats.json",
        ".lock",
        "history.jsonl",
        "latents.safetensors",
        "training.html",
    }
    assert type(SAE.load_from_disk(out)) is JumpReLUSAE
    assert result.sae.tracker.steps.item() == 40
    assert 0 <= result.figures["absorption_full"] <= 1
    assert result.figures["l0"] > 0
    for name, value in json.loads((out / "eval_stats.json").read_text()).items():
        assert value == result.figures[name] or math.isnan(result.figures[name])
    config = json.loads((out / "runner_cfg.json").read_text())
    assert (config["output_path"], config["seed"]) == ("out", 3)
    assert config["hierarchy_model"]["roots"] == 4


def test_the_synthetic_model_can_be_saved_beside_it(synthetic_yaml):
    run = load_run(synthetic_yaml, ["save_synthetic_model=true", "eval_samples=100"])
    train(run)
    saved = SyntheticModel.load_from_disk("out/synthetic_model")
    expected = build_hierarchy_model(run.hierarchy).feature_dict.feature_vectors
    assert torch.equal(saved.feature_dict.feature_vectors, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bfloat16_sae_trains(synthetic_yaml, activation):
    settings = ["sae.dtype=bfloat16", f"sae.activation={activation}", "run_final_eval=false"]
    result = train(load_run(synthetic_yaml, settings))
    assert result.sae.W_dec.dtype == torch.bfloat16
    assert all(p.isfinite().all() for p in result.sae.parameters())


@pytest.mark.parametrize("architecture", ["atm", "batchtopk"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_an_sae_of_any_dtype_is_evaluated(synthetic_yaml, architecture, dtype):
    content = synthetic_yaml.read_text()
    if architecture != "atm":
        content = content.replace(", schedule_steps: 40, mask_warm_up_steps: 5", "")
    synthetic_yaml.write_text(content.replace("atm", architecture))
    figures = train(load_run(synthetic_yaml, [f"sae.dtype={dtype}"])).figures
    single = train(load_run(synthetic_yaml, ["output_path=single"])).figures
    assert figures.keys() == single.keys() > {"mcc", "absorption_full"}
    for name in ("explained_variance", "mcc"):
        assert figures[name] == pytest.approx(single[name], abs=0.1)


def test_evaluation_does_not_meet_the_samples_of_training_again(synthetic_yaml, monkeypatch):
    # Every sample of either passes through the feature dictionary.
    rows, forward = [], FeatureDictionary.forward

    def listen(self, features):
        rows.append(features[(features > 0).sum(1) >= 2])
        return forward(self, features)

    monkeypatch.setattr(FeatureDictionary, "forward", listen)
    train(load_run(synthetic_yaml))
    trained = {tuple(row.tolist()) for batch in rows[:40] for row in batch}
    evaluated = {tuple(row.tolist()) for batch in rows[40:] for row in batch}
    assert len(trained) > 500
    assert len(evaluated) > 200
    assert not trained & evaluated


def test_the_plain_architectures_train_from_the_same_file(synthetic_yaml):
    content = synthetic_yaml.read_text()
    synthetic_yaml.write_text(
        content.replace("atm", "batchtopk").replace(
            ", schedule_steps: 40, mask_warm_up_steps: 5", ""
        )
    )
    assert train(load_run(synthetic_yaml)).sae.cfg.architecture() == "batchtopk"


@pytest.mark.parametrize("preset", PRESETS)
def test_resumed_equals_straight(preset):
    fields = {f"sae.{name}": value for name, value in PRESETS[preset].items()}
    resumes_bit_for_bit(lambda output: synthetic_run(output, **fields))


def test_resuming_from_a_periodic_checkpoint_is_exact_and_saves_no_checkpoint_twice(
    synthetic_yaml, tmp_path
):
    settings = ["n_checkpoints=3", "run_final_eval=false"]
    train(load_run(synthetic_yaml, settings))
    checkpoints = sorted(int(p.name) for p in (tmp_path / "out/checkpoints").iterdir())
    assert checkpoints == [704, 1344, 1984]

    again = load_run(synthetic_yaml, [*settings, "output_path=again"])
    seen = []
    train(
        again,
        resume=tmp_path / "out/checkpoints/704",
        on_step=lambda trainer, _: seen.append(trainer.n_training_steps),
    )
    assert seen == list(range(11, 40))
    assert sorted(int(p.name) for p in (tmp_path / "again/checkpoints").iterdir()) == [1344, 1984]
    assert state_equal(trained_files("out"), trained_files("again"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_handlers_as_they_were(synthetic_yaml, number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = StopFlag()
    with pytest.raises(Interrupted) as caught:
        train(
            load_run(synthetic_yaml),
            on_step=stop_after(9, stop, lambda: os.kill(os.getpid(), number)),
            stop=stop,
        )
    assert caught.value.signal_number == number
    assert newest_checkpoint("out").name == str(9 * 64)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_outside_the_main_thread(synthetic_yaml):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(load_run(synthetic_yaml))))
    thread.start()
    thread.join()
    assert results[0].sae.tracker.steps.item() == 40


def test_nothing_finished_is_overwritten(synthetic_yaml, tmp_path):
    run = load_run(synthetic_yaml, ["run_final_eval=false", "n_checkpoints=1"])
    train(run)
    for resume in (None, "out"):
        with pytest.raises(SettingsError, match=r"^output_path out "):
            train(run, resume=resume)
    (tmp_path / "out/cfg.json").unlink()
    with pytest.raises(SettingsError, match=r"out/checkpoints .*--resume"):
        train(run)


def test_two_runs_do_not_share_a_folder(synthetic_yaml):
    errors = []

    def start_another(trainer, _):
        if trainer.n_training_steps == 20:
            try:
                train(load_run(synthetic_yaml, ["seed=9"]))
            except SettingsError as error:
                errors.append(str(error))

    result = train(load_run(synthetic_yaml), on_step=start_another)
    (error,) = errors
    assert error.startswith("output_path is out: another process is writing there")
    saved = json.loads((result.output_path / "runner_cfg.json").read_text())
    assert saved["seed"] == 3


@pytest.mark.parametrize("extra", [0, 640], ids=["before its end", "beyond its end"])
@pytest.mark.parametrize("stop_at", [None, 44])
def test_an_extended_run_is_the_longer_run(tmp_path, extra, stop_at):
    """The decay of lr moves to the new end."""
    settings = {"n_checkpoints": 4, "sae.schedule_steps": 40}
    total = 2560 + 640 + extra
    train(synthetic_run("straight", training_samples=total, **settings))
    train(synthetic_run("longer", **settings))
    stops = [] if stop_at is None else [stop_at]
    for more in (640, 640 + extra):
        for at in stops if more == 640 else ():
            stop = StopFlag()
            run = synthetic_run("longer", **settings)
            with pytest.raises(Interrupted):
                train(run, "longer", stop_after(at, stop), stop, extend=more)
        train(synthetic_run("longer", **settings), resume="longer", extend=more)
        if not extra:
            break
    assert state_equal(trained_files("straight"), trained_files("longer"))
    saved = json.loads((tmp_path / "longer/runner_cfg.json").read_text())
    assert saved["training_samples"] == total


def test_a_run_whose_lr_has_decayed_cannot_be_extended(synthetic_yaml):
    settings = ["n_checkpoints=0", "save_final_checkpoint=true", "run_final_eval=false"]
    train(load_run(synthetic_yaml, settings))
    with pytest.raises(CheckpointError, match="no complete checkpoint before lr decays"):
        train(load_run(synthetic_yaml, settings), resume="out", extend=640)
    with pytest.raises(CheckpointError, match="cannot extend out/checkpoints/final_2560: lr has"):
        train(load_run(synthetic_yaml, settings), "out/checkpoints/final_2560", extend=640)
    cosine = load_run(synthetic_yaml, [*settings, "lr_scheduler_name=cosineannealing"])
    with pytest.raises(SettingsError, match=r"^lr_scheduler_name must be 'constant'"):
        train(cosine, resume="out", extend=640)


def test_unwritable_output(synthetic_yaml, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^output_path file/out "):
        train(load_run(synthetic_yaml, ["output_path=file/out"]))


def test_the_sae_is_left_as_saelens_made_it(synthetic_yaml):
    sae = train(load_run(synthetic_yaml, ["run_final_eval=false"])).sae
    assert not {"training_forward_pass", "context"} & set(vars(sae))
    assert not any(p._post_accumulate_grad_hooks for p in sae.parameters())


def test_a_second_signal_does_not_spoil_the_saving(synthetic_yaml, monkeypatch):
    save = ATMTrainingSAE.save_model

    def interrupted_save(self, path):
        os.kill(os.getpid(), signal.SIGINT)
        return save(self, path)

    monkeypatch.setattr(ATMTrainingSAE, "save_model", interrupted_save)
    stop = StopFlag()
    with pytest.raises(Interrupted):
        train(
            load_run(synthetic_yaml),
            on_step=stop_after(9, stop, lambda: os.kill(os.getpid(), signal.SIGINT)),
            stop=stop,
        )
    assert newest_checkpoint("out").name == str(9 * 64)


def test_a_signal_while_the_result_is_saved_does_not_lose_it(synthetic_yaml, monkeypatch):
    save = ATMTrainingSAE.save_inference_model

    def interrupted_save(self, path):
        os.kill(os.getpid(), signal.SIGINT)
        return save(self, path)

    monkeypatch.setattr(ATMTrainingSAE, "save_inference_model", interrupted_save)
    train(load_run(synthetic_yaml, ["run_final_eval=false"]))
    assert type(SAE.load_from_disk("out")) is JumpReLUSAE


def test_a_device_that_is_not_there(synthetic_yaml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("device", "sae.device"):
        with pytest.raises(SettingsError, match=f"^{name} .*cuda:1"):
            train(load_run(synthetic_yaml, [f"{name}=cuda:1"]))


def test_dying_while_saving_keeps_the_older_checkpoint(synthetic_yaml, monkeypatch):
    saved = ATMTrainingSAE.save_model

    def full_disk(self, path):
        if self.tracker.steps.item() > 20:
            raise OSError(28, "No space left on device")
        return saved(self, path)

    monkeypatch.setattr(ATMTrainingSAE, "save_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(load_run(synthetic_yaml, ["n_checkpoints=2"]))
    assert newest_checkpoint("out").name == "896"


def test_dying_while_saving_the_result_leaves_no_half_of_it(synthetic_yaml, tmp_path, monkeypatch):
    def full_disk(_, path):
        (path / "cfg.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ATMTrainingSAE, "save_inference_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(load_run(synthetic_yaml))
    assert not (tmp_path / "out/cfg.json").exists()


def test_wandb_offline_logs_the_mask(synthetic_yaml, tmp_path, monkeypatch):
    logged = {}

    def listen(trainer, _):  # wandb.init has put its own function in place by now
        if trainer.n_training_steps == 0:
            log = wandb.log
            monkeypatch.setattr(wandb, "log", lambda v, **k: (logged.update(v), log(v, **k)))

    settings = ["logger.log_to_wandb=true", "logger.wandb_log_frequency=5"]
    settings += ["logger.eval_every_n_wandb_logs=2", "eval_frequency=1", "eval_samples=200"]
    train(load_run(synthetic_yaml, settings), on_step=listen)
    for name in ("importance_threshold", "masked_fraction", "mask_probability", "mask_c"):
        assert isinstance(logged[f"metrics/{name}"], float)
    assert logged["metrics/alive_latents"] == 32
    assert {"weights/importance", "synthetic/mcc", "losses/masked_mse_loss"} <= logged.keys()
    assert any((tmp_path / "wandb").glob("offline-run-*"))


# --- a language model ----------------------------------------------------------------------------


def test_a_tiny_gemma_2_from_disk(language_model_yaml, tmp_path):
    result = train(load_run(language_model_yaml))
    assert list(result.figures) == [
        *("l0", "explained_variance", "mse", "cosine", "shrinkage", "ce_loss_score"),
        *("kl_div_score", "dead_latents", "evaluated_samples", "dead_window"),
        *("decoder_cosine", "decoder_projection", "saved_bits", "description_length"),
    ]
    sae = SAE.load_from_disk(tmp_path / "out")
    assert type(sae) is JumpReLUSAE
    assert sae.cfg.metadata.hook_name == "model.layers.1"
    assert sae.cfg.metadata.training_architecture == "atm"
    assert result.sae.tracker.steps.item() == 40


def test_a_language_model_run_is_stopped_and_resumed(language_model_yaml, token_dataset):
    token_dataset.save_to_disk("tokens")
    settings = ["dataset_path=tokens", "is_dataset_tokenized=true", "n_batches_in_buffer=4"]

    def load(output):
        return load_run(language_model_yaml, [*settings, f"output_path={output}"])

    resumes_bit_for_bit(load)
    assert isinstance(SAE.load_from_disk(newest_checkpoint("stopped")), ATMSAE)


def test_a_language_model_run_with_prefetching_stops(language_model_yaml):
    run = load_run(language_model_yaml, ["prefetch_llm_batches=true"])
    assert stopped_after(5, run) == newest_checkpoint("out")
    assert newest_checkpoint("out").name == str(5 * 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sae.d_in=17", "^sae.d_in .*17"),
        ("hook_name=model.layers.9", "model.layers.9"),
        ("model_name=./nowhere", r"^model_name is './nowhere': no such folder"),
        ("dataset_path=./nowhere", r"dataset_path is './nowhere'"),
        ("dataset_path=''", "^dataset_path"),
        ("n_batches_in_buffer=3", "^n_batches_in_buffer .*3"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_training(
    language_model_yaml, override, message
):
    with pytest.raises(SettingsError, match=message) as caught:
        train(load_run(language_model_yaml, [override]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_normalised_training_folds_into_the_saved_sae(language_model_yaml, tmp_path, normalization):
    settings = [f"sae.normalize_activations={normalization}", "n_batches_for_norm_estimate=5"]
    result = train(load_run(language_model_yaml, settings))
    sae = SAE.load_from_disk(tmp_path / "out")
    assert sae.cfg.normalize_activations == "none"
    x = torch.randn(32, 16)
    assert torch.equal(sae(x), result.sae.eval()(x))


# --- SAELens' runners as they are ----------------------------------------------------------------


def language_model_config(**fields):
    return LanguageModelSAERunnerConfig(
        sae=ATMTrainingSAEConfig(d_in=16, d_sae=48, k=4, mask_warm_up_steps=5),
        hook_name="blocks.1.hook_resid_post",
        verbose=False,
        **TINY,
        **fields,
    )


def test_language_model_runner(hooked_model, token_dataset, tmp_path):
    cfg = language_model_config(output_path="sae", n_checkpoints=1)
    sae = LanguageModelSAETrainingRunner(
        cfg, override_model=hooked_model, override_dataset=token_dataset
    ).run()
    assert isinstance(sae, ATMTrainingSAE)
    loaded = SAE.load_from_disk(tmp_path / "sae")
    x = torch.randn(16, 16)
    assert torch.equal(loaded(x), sae.eval()(x))
    (checkpoint,) = (tmp_path / cfg.checkpoint_path).iterdir()
    assert isinstance(SAE.load_from_disk(checkpoint), ATMSAE)


def test_multi_sae_runner(hooked_model, token_dataset):
    saes = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={
                "atm": ATMTrainingSAEConfig(d_in=16, d_sae=48, k=4, mask_warm_up_steps=5),
                "paper": ATMTrainingSAEConfig.paper(16, 48, mask_warm_up_steps=5),
                "topk": TopKTrainingSAEConfig(d_in=16, d_sae=48, k=4),
            },
            hook_names="blocks.1.hook_resid_post",
            output_path=None,
            checkpoint_path=None,
            **TINY,
        ),
        override_model=hooked_model,
        override_dataset=token_dataset,
    ).run()
    assert saes["atm"].tracker.steps.item() == saes["paper"].tracker.steps.item() == 30
    assert saes["paper"].draw_mask().probability.max() > 0


def test_synthetic_runner(tmp_path):
    model = build_hierarchy_model(HierarchyModelConfig(hidden_dim=16, roots=4, depth=1))
    result = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=model.cfg,
            sae=ATMTrainingSAEConfig(d_in=16, d_sae=32, k=2, mask_warm_up_steps=5),
            training_samples=1920,
            batch_size=64,
            eval_samples=500,
            output_path="sae",
            checkpoint_path=None,
            logger=QUIET,
        ),
        override_synthetic_model=model,
    ).run()
    assert result.final_eval is not None
    assert type(SAE.load_from_disk(tmp_path / "sae")) is JumpReLUSAE
