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
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.compare import load_comparison
from sae_lens_atm.data.language_model import look_up_model, measure
from sae_lens_atm.training.preflight import memory as budget
from sae_lens_atm.training.preflight.lookups import look_up
from sae_lens_atm.training.preflight.memory import GIB, LanguageModel
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run, shipped_config

BATCH, D_IN, D_SAE = 512, 288, 2048  # in the proportions of Gemma-2-2b at 16k
SHIPPED = (
    "gemma-2-2b-l12-16k",
    "gemma-2-2b-l12-65k",
    "gemma-2-9b-l20-16k",
    "gpt2-small",
    "pythia-160m",
)
GEMMA_2B = LanguageModel(
    parameters=2_614_341_888,
    dtype=torch.bfloat16,
    layers=26,
    hidden=2304,
    intermediate=9216,
    heads=8,
    vocabulary=256_000,
    flops=2_133_327_872,
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


def one_step(cfg, step=0, autocast=True):
    """Bytes at the peak of a training step, and its products, half of the latents being dead."""
    sae = TrainingSAE.from_dict(cfg.to_dict())
    trainer = SAETrainer(
        SAETrainerConfig(100 * BATCH, BATCH, lr=1e-4, lr_end=1e-5, autocast=autocast), sae, iter(())
    )
    x = torch.randn(BATCH, D_IN)
    trainer.step(x)  # Adam makes its moments
    if hasattr(sae, "tracker"):
        sae.tracker.steps.fill_(step)
    trainer.n_forward_passes_since_fired[: D_SAE // 2] = 1e9
    with LiveBytes() as live, FlopCounterMode(display=False) as operations:
        trainer.step(x)
    return live.peak, operations.get_total_flops() / (2 * BATCH * D_IN * D_SAE)


@pytest.mark.parametrize(
    ("cfg", "step"),
    [
        (atm(), 5000),  # masks and parents at once
        (BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8), 0),
        (JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE), 0),
    ],
    ids=["atm", "batchtopk", "jumprelu"],
)
def test_a_step_holds_what_is_said(cfg, step):
    said = budget.step_bytes(cfg, BATCH)
    assert 0.8 * said < one_step(cfg, step)[0] < 1.1 * said


def test_products_are_those_of_real_steps():
    # of 10,000 steps: 100 without anything, masks to 60%, parents from 20%
    cfg = atm(parent_rows=128)
    phases = {0: 0.2, 5000: 0.4, 9000: 0.4}
    counted = 0.0
    for step, share in phases.items():
        # in the first phase masks are drawn from step 100 on
        counted += share * one_step(cfg, max(step, 150))[1]
    assert budget.products(cfg, BATCH) == pytest.approx(counted, abs=0.1)
    plain = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8)
    assert budget.products(plain, BATCH) == pytest.approx(one_step(plain)[1], abs=0.1)
    without = JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE)
    assert budget.products(without, BATCH) == pytest.approx(one_step(without)[1], abs=0.1)
    unmasked = atm(mask_rate=0, parent_weight=0)
    assert budget.products(unmasked, BATCH) == pytest.approx(one_step(unmasked)[1], abs=0.1)


def test_the_size_of_a_sae_by_hand():
    cfg = ATMTrainingSAEConfig(d_in=2304, d_sae=16384, k=80)
    size = budget.sae_size(cfg)
    assert size.parameters == 4 * (2 * 2304 * 16384 + 16384 + 2304)
    # inputs of the parents (float32), eight parents (int64), and small vectors
    extra = 4 * 2304 * 16384 + 8 * 8 * 16384
    assert size.state == pytest.approx(size.parameters + extra, rel=2e-3)
    assert size.resident == size.state + 2 * size.parameters
    assert next(TrainingSAE.from_dict(cfg.to_dict()).parameters()).device.type == "cpu"


def test_disk_is_what_a_run_leaves(language_model_yaml, tmp_path):
    run = load_run(language_model_yaml, ["n_checkpoints=2", "sae.d_sae=4096", "sae.k=8"])
    train(run)
    files = [f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file()]
    # one checkpoint more is allowed for, for an interruption
    more = budget.sae_size(run.runner.sae).checkpoint + budget.stream_bytes(run.runner)
    said = budget.disk(run.runner) - more
    assert sum(files) == pytest.approx(said, rel=0.03)


def test_a_checkpoint_holds_no_more_of_the_stream_than_is_said(language_model_yaml):
    for dtype, prefetch in (("float32", 0), ("bfloat16", 4)):
        own = f"model_from_pretrained_kwargs={{dtype: {dtype}}}"
        more = ["n_batches_in_buffer=64", "activations_mixing_fraction=0.5", "n_checkpoints=6"]
        more += [own, f"prefetch_llm_batches={prefetch}", f"output_path={dtype}"]
        run = load_run(language_model_yaml, more)
        train(run)
        files = Path(f"{dtype}/checkpoints").glob("*/activation_stream.safetensors")
        largest = max(file.stat().st_size for file in files)
        assert 0.5 < largest / budget.stream_bytes(run.runner) < 1.05


@pytest.mark.parametrize("prefetch", [0, 5])
def test_the_store_holds_what_is_said(language_model_yaml, prefetch):
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
    said = budget.store_bytes(run)
    assert 0.7 * said < live.peak <= said


def test_memory_and_time_of_gemma_by_hand():
    run = load_run(shipped_config("gemma-2-2b-l12-16k")).runner
    parts = budget.memory(run, GEMMA_2B)
    assert parts["LLM"] == 2 * 2_614_341_888
    tokens = 3 * (262_144 + 8192) + 8192 + 32 * 4096
    assert parts["activation store"] == 4 * 2304 * tokens
    # 500M tokens and the 1000 batches of the norm, at 30% of 312e12 operations a second
    seconds = budget.seconds(run, GEMMA_2B)
    assert seconds["LLM"] == pytest.approx((5e8 + 4_096_000) * 2_133_327_872 / (0.3 * 312e12))
    assert sum(parts.values()) < 0.5 * 80 * GIB
    slow = load_run(shipped_config("gemma-2-2b-l12-16k"), ["autocast=false"]).runner
    assert budget.seconds(slow, GEMMA_2B)["SAE"] == pytest.approx(16 * seconds["SAE"])


def test_logits_of_more_prompts_are_what_evaluation_needs_more_of():
    few, many = (
        load_run(shipped_config("gemma-2-2b-l12-16k"), [f"eval_batch_size_prompts={n}"]).runner
        for n in (1, 64)
    )
    assert "more in evaluation" not in budget.memory(few, GEMMA_2B)
    # three sets of logits in bfloat16 alone
    assert budget.memory(many, GEMMA_2B)["more in evaluation"] > 3 * 2 * 64 * 1024 * 256_000


def test_a_sum_is_described_by_its_parts():
    said = budget.describe({"a": 1 * GIB, "b": 2.5 * GIB}, GIB, "GiB")
    assert said == "3.5 GiB (b 2.5, a 1.0)"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_say_what_the_dry_run_says(name):
    path = shipped_config(name)
    comments = re.findall(r"^#(.*)$", path.read_text(), re.MULTILINE)
    said = " ".join(" ".join(comments).split())
    run = load_run(path).runner
    found = look_up(run)
    for fact in ("memory", "time", "disk"):
        assert f"{fact}: {found[fact].split(';')[0]}" in said
    model = measure(run, look_up_model(run, online=False))
    assert sum(budget.memory(run, model).values()) < 0.9 * 80e9  # so that it fits


def test_the_shipped_comparison_says_what_is_worked_out():
    path = shipped_config("compare-gemma-2-2b-l12-16k")
    said = path.read_text()
    planned = [p for p in load_comparison(path).planned if p.seed == 0 and p.settings.trained]
    runs = [p.run.runner for p in planned]
    saes = sum(budget.sae_size(run.sae).resident for run in runs) / GIB
    memory = budget.memory(runs[0], GEMMA_2B)
    rest = (sum(memory.values()) - memory["SAE with Adam"]) / GIB
    hours = [budget.seconds(run, GEMMA_2B) for run in runs]
    llm, trained = hours[0]["LLM"] / 3600, sum(h["SAE"] for h in hours) / 3600
    for text in (
        f"the {len(runs)} SAEs of a seed take {saes:.1f} GiB",
        f"{saes + rest:.1f} GiB",
        f"about {llm + trained:.1f} hours",
        f"(LLM {llm:.1f}, SAEs {trained:.1f})",
    ):
        assert text in " ".join(said.replace("#", "").split())
