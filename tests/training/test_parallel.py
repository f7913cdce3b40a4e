import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, JumpReLUSAE, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from sae_lens_atm.errors import Interrupted, NonFiniteBatchError, RankLostError
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.parallel import AcrossRanks, RankExchange
from sae_lens_atm.training.ranks import joined
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run, parse_run
from sae_lens_atm.training.supervise import supervise
from tests.conftest import CONTEXT
from tests.helpers import PRESETS
from tests.training.processes import run_on

ROOT = Path(__file__).parents[2]
STEPS, BATCH, D_IN, D_SAE = 10, 24, 8, 24


def run_of(**fields):
    return parse_run(
        {
            "runner": "synthetic",
            "hierarchy_model": {"hidden_dim": D_IN, "roots": 4, "lone_features": 4, "depth": 1},
            "batch_size": BATCH,
            "training_samples": STEPS * BATCH,
            **fields,
            "sae": {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", **fields["sae"]},
        }
    )


# --- one step on several ranks is one step of one process ----------------------------------------


ATM = {
    "architecture": "atm",
    "k": 2.3,
    "mask_warm_up_steps": 2,
    "schedule_steps": STEPS,
    "mask_end": 0.8,
    "parent_start": 0.3,
    "parent_tau": 0.2,
    "l1_coefficient": 0.01,
}
CASES = {
    **{preset: {**ATM, **fields} for preset, fields in PRESETS.items()},
    "dense": {**ATM, "kernels": "dense"},
    "frequency penalty": {**ATM, "frequency_penalty": 0.5, "frequency_penalty_end": 0.7},
    "budgets": {**ATM, "k": 4.3, "budget_weight": 0.5, "budget_end": 0.7},
    "per sample": {**ATM, "per_sample_end": 0.5},
    "mean norm": {**ATM, "normalize_activations": "expected_average_only_in"},
    "whitening": {**ATM, "normalize_activations": "covariance_whitening"},
    "batchtopk": {"architecture": "batchtopk", "k": 2.3},
    "matryoshka": {"architecture": "matryoshka_batchtopk", "k": 2, "matryoshka_widths": [6, 24]},
    "jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.1, "jumprelu_bandwidth": 0.5},
    "standard": {"architecture": "standard"},
}


def batches(ranks):
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 2, BATCH, dtype=torch.float64)[:, None]  # shares that differ
    while True:
        batch = torch.randn(BATCH, D_IN, dtype=torch.float64, generator=generator)
        yield scale * batch if ranks is None else ranks.own_rows(scale * batch)


def trained(fields, ranks=None, compiled=False, autocast=False):
    """Train some steps, and return everything that they change."""
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(run_of(sae=fields).runner.sae.to_dict())
    if compiled:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="eager")
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        autocast=autocast,
        lr=1e-2,
        lr_end=1e-3,
        lr_warm_up_steps=2,
        lr_decay_steps=4,
        train_batch_size_samples=BATCH,
        dead_feature_window=0,
        feature_sampling_window=2000,
        n_batches_for_norm_estimate=3,
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=batches(ranks))
    if ranks is None:
        trainer.fit()
    else:
        context = AcrossRanks(ranks)
        guard = BadBatchGuard(trainer, 10, ranks.max_over_ranks)
        hooks = [RankExchange(trainer, ranks, context), guard, DeferredUpdates(trainer, context)]
        with supervise(trainer, hooks):
            trainer.fit()
    moments = trainer.optimizer.state_dict()["state"]
    return {
        **sae.state_dict(),
        **{f"adam {i}": moment["exp_avg_sq"] for i, moment in moments.items()},
        "silent for": trainer.n_forward_passes_since_fired,
        "fired": trainer.act_freq_scores,
        "counted": torch.tensor([trainer.n_training_samples, trainer.n_frac_active_samples]),
    }


def trained_all(cases, **options):
    with joined(run_of(sae=ATM)) as ranks:
        return {name: trained(fields, ranks, **options) for name, fields in cases.items()}


FOUR = ("default", "whitening")


@pytest.fixture(scope="module")
def on_two():
    return run_on(2, trained_all, CASES)


@pytest.fixture(scope="module")
def on_four():
    return run_on(4, trained_all, {name: CASES[name] for name in FOUR})


def assert_all_are(alone, on_ranks, name):
    first = on_ranks[0][name]
    for rank in on_ranks:
        for what, tensor in on_ranks[rank][name].items():
            assert torch.equal(tensor, first[what]), (rank, what)
    assert alone.keys() == first.keys()
    for what, tensor in alone.items():
        near = torch.testing.assert_close
        near(first[what], tensor, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(on_two, name):
    assert_all_are(trained(CASES[name]), on_two, name)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_are_one_process(on_four, name):
    assert_all_are(trained(CASES[name]), on_four, name)


def test_the_cases_contain_what_could_go_wrong():
    state = trained(CASES["default"])
    assert (state["parent_tracker.parents"] >= 0).any()
    assert (state["silent for"] > 0).any()
    assert state["topk_threshold"] > 0


def compiled_and_rounded():
    with joined(run_of(sae=ATM)) as ranks:
        return {
            "compiled": trained(ATM, ranks, compiled=True),
            "autocast": trained({**ATM, "dtype": "float32"}, ranks, autocast=True),
            "rounded": trained({**ATM, "dtype": "bfloat16"}, ranks),
        }


@pytest.fixture(scope="module")
def others():
    return run_on(2, compiled_and_rounded)


def test_compiled_ranks_are_one_process(others):
    assert_all_are(trained(ATM), others, "compiled")


@pytest.mark.parametrize("name", ["autocast", "rounded"])
def test_ranks_agree_to_the_bit_in_low_precision(others, name):
    for what, tensor in others[0][name].items():
        assert torch.equal(tensor, others[1][name][what]), what


# --- stopping, losing a rank, going on -----------------------------------------------------------


RUN = {"sae": {k: v for k, v in ATM.items() if k != "schedule_steps"}, "run_final_eval": False}


def files(folder):
    return {
        **load_file(Path(folder) / "sae_weights.safetensors"),
        **load_file(Path(folder) / "sparsity.safetensors"),
    }


def losing_a_rank(which, where):
    """Train until one rank dies in the sixth step."""

    def die(*_):
        os._exit(9)

    def on_step(trainer, _):
        if trainer.n_training_steps + 1 == 5 and os.environ["RANK"] == str(which):
            if where == "gradients":  # some gradients are averaged by then
                list(trainer.sae.parameters())[2].register_post_accumulate_grad_hook(die)
            else:  # all ranks have accepted the batch, and one has changed its threshold
                trainer.sae.update_averages = die

    with pytest.raises(RankLostError) as caught:
        train(run_of(**RUN, output_path="several"), on_step=on_step)
    return str(caught.value)


def stopping_rank_one():
    def stop(trainer, _):
        if trainer.n_training_steps + 1 == 8 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(run_of(**RUN, output_path="several"), resume="several", on_step=stop)
    return caught.value.signal_number


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The result of one process that is not stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train(run_of(**RUN, output_path=str(folder)))
    return files(folder)


def test_a_lost_rank_a_signal_and_other_numbers_of_ranks_change_nothing(straight, tmp_path):
    messages = run_on(4, losing_a_rank, 3, "gradients", lost=[3])
    for rank, message in messages.items():
        assert "another process of this training has ended" in message
        assert message.endswith("saved several/checkpoints/120") == (rank == 0)
    assert [p.name for p in Path("several/checkpoints").iterdir()] == ["120"]

    assert run_on(2, stopping_rank_one) == {0: signal.SIGTERM, 1: signal.SIGTERM}
    assert newest_checkpoint("several").name == "192"

    train(run_of(**RUN, output_path="several"), resume="several")
    found = files("several")
    for what, tensor in straight.items():
        torch.testing.assert_close(found[what], tensor)
    assert not list(tmp_path.glob("**/.*.partial"))


def test_a_rank_lost_while_averages_are_exchanged_undoes_the_step(straight):
    (message,) = run_on(2, losing_a_rank, 1, "averages", lost=[1]).values()
    assert message.endswith("saved several/checkpoints/120")
    train(run_of(**RUN, output_path="several"), resume="several")
    found = files("several")
    for what, tensor in straight.items():
        torch.testing.assert_close(found[what], tensor)


def with_bad_batches(which, fields):
    """Training where some batches have a NaN in their last row, which is the last rank's."""
    batches, served = SyntheticActivationIterator.next_batch, []

    def poisoned(self):
        served.append(batches(self))
        if len(served) in which:
            served[-1][-1, 2] = float("nan")
        return served[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticActivationIterator, "next_batch", poisoned)
        try:
            result = train(run_of(**{**RUN, **fields}))
        except NonFiniteBatchError as error:
            return str(error)
        return result.skipped_batches, len(served), result.sae.state_dict()


@pytest.mark.parametrize(
    ("which", "sae"),
    [([4, 5, 8], {}), ([2, 1003], {"normalize_activations": "expected_average_only_in"})],
)
def test_a_bad_batch_of_one_rank_is_skipped_by_all(which, sae):
    sae = {**RUN["sae"], **sae}
    alone = with_bad_batches(which, {"output_path": "alone", "sae": sae})
    assert alone[0] == len(which)
    for found in run_on(2, with_bad_batches, which, {"output_path": "bad", "sae": sae}).values():
        assert found[:2] == alone[:2]
        for what, tensor in alone[2].items():
            torch.testing.assert_close(found[2][what], tensor)


def test_too_many_bad_batches_of_one_rank_stop_all():
    fields = {"output_path": "bad", "max_bad_batches": 2}
    for message in run_on(2, with_bad_batches, [3, 5, 6], fields).values():
        assert message.startswith("2 bad batches in a row at step 3: ")
        assert message.endswith("saved bad/checkpoints/72")
    assert newest_checkpoint("bad").name == "72"


# --- a language model ----------------------------------------------------------------------------


def rows_of_a_language_model(path, resume, until):
    """The first tokens of the rows that this rank trains on: which rows they are."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        tokens = ActivationsStore.get_batch_tokens

        def listen(self, *args, **kwargs):
            batch = tokens(self, *args, **kwargs)
            rows.extend(batch[:, 0].tolist())
            return batch

        def stop(trainer, _):
            if trainer.n_training_steps + 1 == until:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(ActivationsStore, "get_batch_tokens", listen)
        run = load_run(path)
        if until is None:
            result = train(run, resume=resume)
            return rows, result.sae.state_dict(), result.figures
        with pytest.raises(Interrupted):
            train(run, resume=resume, on_step=stop)
    return rows


def test_ranks_of_a_language_model_read_rows_of_their_own(language_model_yaml):
    context = [[4 + (i + j) % 60 for j in range(CONTEXT - 1)] for i in range(400)]
    rows = [{"tokens": [i % 64, *row]} for i, row in enumerate(context)][:64]
    Dataset.from_list(rows).save_to_disk("tokens")
    text = language_model_yaml.read_text()
    text = re.sub("dataset_path: .*", "dataset_path: tokens", text)
    text = text.replace("is_dataset_tokenized: false", "is_dataset_tokenized: true")
    text = text.replace("training_tokens: 2560", "training_tokens: 640")
    Path("run.yaml").write_text(text)
    # Batches of 64 tokens are 4 rows of 16; a rank's store asks for 4 rows at once.
    found = run_on(2, rows_of_a_language_model, "run.yaml", None, 4)
    assert found[0] == list(range(0, 16, 2))
    assert found[1] == list(range(1, 16, 2))
    ends = run_on(4, rows_of_a_language_model, "run.yaml", "out", None)
    for rank in range(4):
        served, state, figures = ends[rank]
        assert served[:4] == list(range(16 + rank, 32, 4))
        assert (figures != {}) == (rank == 0)
        for what, tensor in state.items():
            assert torch.equal(tensor, ends[0][1][what]), what
    assert type(SAE.load_from_disk("out")) is JumpReLUSAE


# --- as it is started ----------------------------------------------------------------------------


def workers_of(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in listed.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the workers")
def test_torchrun_with_a_killed_worker_leaves_a_checkpoint(synthetic_yaml):
    settings = ["training_samples=1280000", "run_final_eval=false"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "sae_lens_atm", "train", str(synthetic_yaml)]
    for setting in settings:
        command += ["--set", setting]
    process = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path.cwd(),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step "):
            os.kill(workers_of(process)[1], signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "2, with 32 of each batch" in "".join(lines)
    errors_shown = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(errors_shown) == 1
    assert "another process of this training has ended" in errors_shown[0]
    checkpoint = newest_checkpoint("out")
    assert errors_shown[0].endswith(f"saved {checkpoint}")
    seen = []
    run = load_run(synthetic_yaml, ["run_final_eval=false", *settings])

    def stop(trainer, _):
        seen.append(trainer.n_training_samples)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(run, resume=checkpoint, on_step=stop)
    assert seen == [int(checkpoint.name) + 64]
