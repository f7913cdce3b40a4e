import re
import weakref
from pathlib import Path

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.compare import load_comparison
from sae_lens_atm.evaluation import next_token_loss
from sae_lens_atm.evaluation.language_model import HeldOutTokens, language_model_figures
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.preflight import memory
from sae_lens_atm.training.preflight.lookups import look_up
from sae_lens_atm.training.preflight.memory import GIB
from sae_lens_atm.training.preflight.model_facts import ModelShape, look_up_model, shape_of
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.training.supervise import supervise
from sae_lens_atm.yaml_files import shipped_config

BATCH, D_IN, D_SAE = 512, 288, 2048  # in the proportions of Gemma-2-2b at 16k
SHIPPED = (
    "gemma-2-2b-l12-16k",
    "gemma-2-2b-l12-65k",
    "gemma-2-9b-l20-16k",
    "gpt2-small",
    "pythia-160m",
)
GEMMA_2B = ModelShape(
    parameters=2_614_341_888,
    dtype=torch.bfloat16,
    layers=26,
    hidden=2304,
    intermediate=9216,
    heads=8,
    vocabulary=256_000,
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and not gone yet."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key):
        self.now -= self.known.pop(key, 0)


def atm(**fields):
    return ATMTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8, **fields)


def supervised_trainer(cfg):
    """A trainer under the hooks that every run has."""
    sae = TrainingSAE.from_dict(cfg.to_dict())
    settings = SAETrainerConfig(100 * BATCH, BATCH, lr=1e-4, lr_end=1e-5, autocast=True)
    trainer = SAETrainer(settings, sae, iter(()))
    return trainer, supervise(trainer, [BadBatchGuard(trainer), DeferredUpdates(trainer)])


EVERY = pytest.mark.parametrize(
    ("cfg", "step"),
    [
        (atm(), 5000),  # masks and parents at once
        (BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8), 0),
        (JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE), 0),
    ],
    ids=["atm", "batchtopk", "jumprelu"],
)


@EVERY
def test_a_step_allocates_what_is_computed(cfg, step):
    """With the masked pass, the pressure on children, and half of the latents dead."""
    trainer, supervision = supervised_trainer(cfg)
    x = torch.randn(BATCH, D_IN)
    with supervision:
        trainer.step(x)  # Adam makes its moments
        if hasattr(trainer.sae, "tracker"):
            trainer.sae.tracker.steps.fill_(step)
        trainer.n_forward_passes_since_fired[: D_SAE // 2] = 1e9
        with LiveBytes() as live:
            trainer.step(x)
    computed = memory.step_bytes(cfg, BATCH)
    assert 0.8 * computed < live.peak < 1.1 * computed


@EVERY
def test_between_steps_a_run_holds_what_is_computed(cfg, step):
    """Weights, averages, moments, counters, and the copies of counters for bad batches."""
    with LiveBytes() as live:
        trainer, supervision = supervised_trainer(cfg)
        x = torch.randn(BATCH, D_IN)
        with supervision:
            if hasattr(trainer.sae, "tracker"):
                trainer.sae.tracker.steps.fill_(step)
            trainer.step(x)
            held = live.now - x.nbytes
    assert held == pytest.approx(memory.sae_size(cfg).resident, rel=0.01)


def test_the_size_of_a_sae_by_hand():
    cfg = ATMTrainingSAEConfig(d_in=2304, d_sae=16384, k=80)
    size = memory.sae_size(cfg)
    assert size.parameters == 4 * (2 * 2304 * 16384 + 16384 + 2304)
    # inputs of the parents (float32), eight parents (int64), and small vectors
    extra = 4 * 2304 * 16384 + 8 * 8 * 16384
    assert size.state == pytest.approx(size.parameters + extra, rel=2e-3)
    assert size.resident == size.state + 2 * size.parameters + 4 * 4 * 16384
    assert next(TrainingSAE.from_dict(cfg.to_dict()).parameters()).device.type == "cpu"


def test_disk_is_what_a_run_leaves(language_model_yaml, tmp_path):
    run = load_run(language_model_yaml, ["n_checkpoints=2", "sae.d_sae=4096", "sae.k=8"])
    train(run)
    files = [f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file()]
    # one checkpoint more is allowed for, for an interruption
    more = memory.sae_size(run.runner.sae).checkpoint + memory.stream_bytes(run.runner)
    more += memory.latent_history_bytes(run.runner)
    computed = memory.disk(run.runner) - more
    assert sum(files) == pytest.approx(computed, rel=0.03)


def test_the_largest_stream_of_a_checkpoint(language_model_yaml):
    for dtype, prefetch in (("float32", 0), ("bfloat16", 4)):
        own = f"model_from_pretrained_kwargs={{dtype: {dtype}}}"
        more = ["n_batches_in_buffer=64", "activations_mixing_fraction=0.5", "n_checkpoints=6"]
        more += [own, f"prefetch_llm_batches={prefetch}", f"output_path={dtype}"]
        run = load_run(language_model_yaml, more)
        train(run)
        files = Path(f"{dtype}/checkpoints").glob("*/activation_stream.safetensors")
        largest = max(file.stat().st_size for file in files)
        assert 0.5 < largest / memory.stream_bytes(run.runner) < 1.05


@pytest.mark.parametrize("prefetch", [0, 5])
def test_the_store_holds_what_is_computed(language_model_yaml, prefetch):
    more = ["n_batches_in_buffer=64", "train_batch_size_tokens=128", "store_batch_size_prompts=16"]
    run = load_run(language_model_yaml, [*more, "activations_mixing_fraction=0.5"]).runner
    run.prefetch_llm_batches = prefetch
    llm_batch, buffer = 16 * 16, 64 * 16

    def activations():
        while True:
            yield torch.randn(llm_batch, 16)

    queue = []
    with LiveBytes() as live:
        batches = mixing_buffer(buffer, 128, activations(), 0.5)
        for _ in range(60):
            queue = [*queue, next(batches)][-max(prefetch, 1) :]
    computed = memory.store_bytes(run)
    assert 0.7 * computed < live.peak <= computed


def test_the_memory_of_gemma_by_hand():
    run = load_run(shipped_config("gemma-2-2b-l12-16k")).runner
    parts = memory.memory(run, GEMMA_2B)
    assert parts["LLM"] == 2 * 2_614_341_888
    tokens = 3 * (262_144 + 8192) + 8192 + 32 * 4096
    assert parts["activation store"] == 4 * 2304 * tokens
    assert sum(parts.values()) < 0.5 * 80 * GIB


def test_evaluation_for_wandb_on_many_prompts_needs_more_for_logits():
    few, many, after = (
        load_run(
            shipped_config("gemma-2-2b-l12-16k"),
            [f"eval_batch_size_prompts={n}", f"logger.log_to_wandb={wandb}"],
        ).runner
        for n, wandb in ((1, "true"), (64, "true"), (64, "false"))
    )
    assert "more in evaluation" not in memory.memory(few, GEMMA_2B)
    # three sets of logits in bfloat16 alone
    assert memory.memory(many, GEMMA_2B)["more in evaluation"] > 3 * 2 * 64 * 1024 * 256_000
    assert "more in evaluation" not in memory.memory(after, GEMMA_2B)


def test_the_evaluation_after_training_holds_what_is_computed(language_model_yaml, monkeypatch):
    """And no logits of all positions, 40 times as many."""
    vocabulary, rows = 4000, torch.randint(0, 4000, (25, 16))
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=16, d_head=8, d_vocab=vocabulary, act_fn="gelu"
    )
    model, run = HookedTransformer(cfg), load_run(language_model_yaml).runner
    shape = ModelShape(0, torch.float32, 1, 16, 64, 2, vocabulary)
    for module in (memory, next_token_loss):
        monkeypatch.setattr(module, "LOGITS", 10 * vocabulary)
        monkeypatch.setattr(module, "TOKENS", 400)
    sae = TrainingSAE.from_dict(run.sae.to_dict()).eval()
    sae.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"
    with LiveBytes() as live:
        language_model_figures(sae, model, HeldOutTokens([rows], 16, 25), run)
    computed = memory.evaluation_bytes(run, shape)
    assert 0.4 * computed < live.peak <= computed


def test_a_sum_and_its_parts_as_text():
    text = memory.describe({"a": 1 * GIB, "b": 2.5 * GIB})
    assert text == "3.5 GiB (b 2.5, a 1.0)"
    assert memory.describe({"a": 2**20, "b": 2**19}) == "1.5 MiB (a 1.0, b 0.5)"


def test_free_memory():
    assert memory.available_bytes("cpu") > 0
    assert memory.available_bytes(None) == pytest.approx(memory.available_bytes("cpu"), rel=0.5)
    assert memory.available_bytes("meta") is None


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (90, "90 B"),
        (3 * 2**9, "1.5 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (5 * 2**31, "10.0 GiB"),
        (2**51, "2,048.0 TiB"),
    ],
)
def test_sizes_as_text(amount, text):
    assert memory.size_text(amount) == text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_comments_of_shipped_files_are_what_the_dry_run_prints(name):
    path = shipped_config(name)
    comments = re.findall(r"^#(.*)$", path.read_text(), re.MULTILINE)
    written = " ".join(" ".join(comments).split())
    run = load_run(path).runner
    facts = look_up(run)
    for fact in ("memory", "disk"):
        assert f"{fact}: {facts[fact].split(';')[0]}" in written
    shape = shape_of(run, look_up_model(run, online=False))
    assert sum(memory.memory(run, shape).values()) < 0.9 * 80e9  # so that it fits


def test_the_comment_of_the_shipped_comparison_is_computed():
    path = shipped_config("compare-gemma-2-2b-l12-16k")
    planned = [p for p in load_comparison(path).planned if p.seed == 0 and p.settings.trained]
    runs = [p.run.runner for p in planned]
    saes = sum(memory.sae_size(run.sae).resident for run in runs) / GIB
    parts = memory.memory(runs[0], GEMMA_2B)
    rest = (sum(parts.values()) - parts["SAE with Adam"]) / GIB
    written = " ".join(path.read_text().replace("#", "").split())
    assert f"the {len(runs)} SAEs of a seed take {saes:.1f} GiB" in written
    assert f"{saes + rest:.1f} GiB with the rest" in written
