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
from safetensors.torch import load_file, save_file

from sae_lens_atm import ATMSAE, ATMTrainingSAE, ATMTrainingSAEConfig
from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model
from sae_lens_atm.errors import CheckpointError, Interrupted, SettingsError
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.training.watch import StopFlag
from tests.conftest import CONTEXT
from tests.helpers import ACTIVATIONS, SCHEDULES, make_sae, step_input

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


def stop_after(steps, stop, how=None):
    def on_step(trainer, _):
        if trainer.n_training_steps + 1 == steps:
            (how or stop.request)()

    return on_step


def trained_files(folder):
    return {
        **load_file(folder / "sae_weights.safetensors"),
        **load_file(folder / "sparsity.safetensors"),
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_resumed_equals_straight_bit_for_bit(synthetic_yaml, tmp_path, activation, schedule):
    settings = [f"sae.activation={activation}", f"sae.schedule={schedule}", "run_final_eval=false"]
    train(load_run(synthetic_yaml, [*settings, "output_path=straight"]))

    run = load_run(synthetic_yaml, [*settings, "output_path=stopped"])
    stop = StopFlag()
    with pytest.raises(Interrupted) as caught:
        train(run, on_step=stop_after(17, stop), stop=stop)
    assert caught.value.checkpoint.name == str(17 * 64)
    torch.manual_seed(12345)  # a new process
    train(load_run(synthetic_yaml, [*settings, "output_path=stopped"]), resume="stopped")
    assert equal(trained_files(tmp_path / "straight"), trained_files(tmp_path / "stopped"))


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
    assert equal(trained_files(tmp_path / "out"), trained_files(tmp_path / "again"))


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
    train(load_run(synthetic_yaml, ["run_final_eval=false"]))
    for resume in (None, "out"):
        with pytest.raises(SettingsError, match="output_path out already holds a finished SAE"):
            train(load_run(synthetic_yaml), resume=resume)
    (tmp_path / "out/cfg.json").unlink()
    train(load_run(synthetic_yaml, ["output_path=b", "n_checkpoints=1", "run_final_eval=false"]))
    (tmp_path / "b/cfg.json").unlink()
    with pytest.raises(SettingsError, match=r"b/checkpoints holds checkpoints .*--resume b/checkp"):
        train(load_run(synthetic_yaml, ["output_path=b"]))


def test_unwritable_output(synthetic_yaml, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="output_path file/out is not writable"):
        train(load_run(synthetic_yaml, ["output_path=file/out"]))


def test_checkpoints_that_do_not_fit_or_are_damaged(synthetic_yaml, tmp_path):
    train(load_run(synthetic_yaml, ["n_checkpoints=1", "run_final_eval=false"]))
    checkpoint = newest_checkpoint("out")

    def message(*overrides, resume=checkpoint):
        with pytest.raises(CheckpointError) as caught:
            train(load_run(synthetic_yaml, [*overrides, "output_path=x"]), resume=resume)
        return str(caught.value)

    assert "d_sae is 48 in this run and 32 in" in message("sae.d_sae=48")
    assert "activation is 'relu' in this run and 'batchtopk' in" in message("sae.activation=relu")
    assert "nowhere does not exist" in message(resume="nowhere")
    assert "holds no complete checkpoint" in message(resume=tmp_path)
    assert "k is 3.0 in this run and 2.0 in" in message("sae.k=3")
    assert "mask_rate is 9.0 in this run and 1.0 in" in message("sae.mask_rate=9")
    (checkpoint / "manifest.json").unlink()  # as in SAELens' own checkpoints
    for name in ("trainer_state.pt", "random_state.pt"):
        content = (checkpoint / name).read_bytes()
        for damaged in (content[: len(content) // 2], b"", b"\xff" * 100):
            (checkpoint / name).write_bytes(damaged)
            assert "is damaged" in message()
        (checkpoint / name).write_bytes(content)
    weights = checkpoint / "sae_weights.safetensors"
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        assert "is damaged" in message()
    weights.write_bytes(content)
    state = load_file(weights)
    save_file({**state, "W_dec": state["W_dec"][:5].clone()}, weights)
    assert "has shape (5, 16), not (32, 16)" in message()
    (checkpoint / "cfg.json").write_text("{")
    assert "is damaged" in message()


def test_a_half_written_checkpoint_is_never_taken_for_one(synthetic_yaml, tmp_path):
    train(load_run(synthetic_yaml, ["n_checkpoints=2", "run_final_eval=false"]))
    folder = tmp_path / "out/checkpoints"
    newest = newest_checkpoint("out")
    newest.rename(folder / f".{newest.name}.partial")
    with pytest.warns(
        UserWarning, match="1728.partial is no whole checkpoint, skipped: it was being"
    ):
        assert newest_checkpoint("out").name == "896"
    (folder / "896/trainer_state.pt").unlink()
    with (
        pytest.raises(CheckpointError, match="no complete checkpoint"),
        pytest.warns(
            UserWarning, match="896 is no whole checkpoint, skipped: trainer_state.pt is m"
        ),
    ):
        newest_checkpoint("out")
    with pytest.raises(CheckpointError, match=r"896 is damaged \(trainer_state.pt is missing"):
        newest_checkpoint(folder / "896")


def test_the_newest_checkpoint_is_the_one_of_most_samples(synthetic_yaml, tmp_path):
    train(load_run(synthetic_yaml, ["n_checkpoints=2", "run_final_eval=false"]))
    os.utime(tmp_path / "out/checkpoints/896")
    assert newest_checkpoint("out").name == "1728"


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
        with pytest.raises(SettingsError, match=f"{name} is 'cuda:1': this machine has no CUDA"):
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
        path.mkdir()
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
    assert result.figures["ce_loss_with_sae"] > 0
    sae = SAE.load_from_disk(tmp_path / "out")
    assert type(sae) is JumpReLUSAE
    assert sae.cfg.metadata.hook_name == "model.layers.1"
    assert sae.cfg.metadata.training_architecture == "atm"
    assert result.sae.tracker.steps.item() == 40


def test_language_model_run_is_interrupted_and_resumed(
    language_model_yaml, token_dataset, tmp_path
):
    # Bit for bit where SAELens' own state allows it: token rows, a buffer of one batch, no mixing.
    token_dataset.save_to_disk("tokens")
    settings = ["dataset_path=tokens", "is_dataset_tokenized=true", "n_batches_in_buffer=4"]
    train(load_run(language_model_yaml, [*settings, "output_path=straight"]))
    stop = StopFlag()
    stopped = load_run(language_model_yaml, [*settings, "output_path=stopped"])
    with pytest.raises(Interrupted):
        train(stopped, on_step=stop_after(17, stop), stop=stop)
    checkpoint = newest_checkpoint("stopped")
    assert isinstance(SAE.load_from_disk(checkpoint), ATMSAE)
    again = load_run(language_model_yaml, [*settings, "output_path=stopped"])
    train(again, resume="stopped")
    assert equal(trained_files(tmp_path / "straight"), trained_files(tmp_path / "stopped"))


def test_language_model_run_with_prefetching_stops_too(language_model_yaml):
    stop = StopFlag()
    run = load_run(language_model_yaml, ["prefetch_llm_batches=true"])
    with pytest.raises(Interrupted):
        train(run, on_step=stop_after(5, stop), stop=stop)
    assert newest_checkpoint("out").name == str(5 * 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sae.d_in=17", "sae.d_in is 17: allowed is 16, the hook's width"),
        ("hook_name=model.layers.9", "model.layers.9"),
        ("model_name=./nowhere", r"cannot load model_name './nowhere'"),
        ("dataset_path=./nowhere", r"dataset_path './nowhere'"),
        ("dataset_path=''", "dataset_path: missing"),
        ("n_batches_in_buffer=3", "n_batches_in_buffer is 3: times context_size 16 it must reach"),
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
    assert saes["paper"].draw_mask(1).probability.max() > 0


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_compiled_training_is_one_graph_and_agrees_with_eager(activation, schedule):
    fields = {"activation": activation, "schedule": schedule, "mask_warm_up_steps": 0}
    eager, compiled = make_sae(**fields), make_sae(**fields)
    compiled.load_state_dict(eager.state_dict())
    compiled.training_forward_pass = torch.compile(
        compiled.training_forward_pass, backend="eager", fullgraph=True
    )
    batches, dead = torch.randn(5, 32, 8), torch.zeros(24, dtype=torch.bool)
    for sae in (eager, compiled):
        for x in batches:
            sae.training_forward_pass(step_input(x, dead)).loss.backward()
    torch.testing.assert_close(compiled.W_dec.grad, eager.W_dec.grad)
    torch.testing.assert_close(compiled.importance, eager.importance)
    assert compiled.tracker.steps.item() == 5
