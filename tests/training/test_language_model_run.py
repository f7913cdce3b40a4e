"""The shipped run files from loader to evaluation, on tiny models in folders of the real names."""

import json
import math
import random
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, JumpReLUSAE
from sae_lens.training.activations_store import ActivationsStore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

from sae_lens_atm import ATMSAE
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.yaml_files import shipped_config
from tests.conftest import CONTEXT
from tests.training.runs import resumes_bit_for_bit, stopped_after

WIDTH = 16
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran", "after", "bright", "things"]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


class Family(NamedTuple):
    file: str
    folder: str
    config: object
    bos: str
    eos: str


GEMMA = Family(
    "gemma-2-2b-l12-16k",
    "google/gemma-2-2b",
    Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=8, pad_token_id=None),
    "<bos>",
    "<eos>",
)
GPT2 = Family(
    "gpt2-small",
    "gpt2",
    GPT2Config(vocab_size=300, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=64, n_ctx=64),
    "<|endoftext|>",
    "<|endoftext|>",
)
PYTHIA = Family(
    "pythia-160m",
    "EleutherAI/pythia-160m-deduped",
    GPTNeoXConfig(**SHAPE),
    "<|endoftext|>",
    "<|endoftext|>",
)
# In the class that the run file names first, then by the other loader.
PATHS = {
    "gemma-2": (GEMMA, "AutoModelForCausalLM", "model.layers.1"),
    "gpt2": (GPT2, "HookedTransformer", "blocks.1.hook_resid_post"),
    "pythia": (PYTHIA, "HookedTransformer", "blocks.1.hook_resid_post"),
    "gpt2, transformers": (GPT2, "AutoModelForCausalLM", "transformer.h.1"),
    "pythia, transformers": (PYTHIA, "AutoModelForCausalLM", "gpt_neox.layers.1"),
}
SMALL = [
    "device=cpu",
    "sae.device=cpu",
    f"sae.d_in={WIDTH}",
    "sae.d_sae=64",
    "sae.k=4",
    "sae.mask_warm_up_steps=5",
    f"context_size={CONTEXT}",
    "training_tokens=2560",
    "train_batch_size_tokens=64",
    "store_batch_size_prompts=4",
    "n_batches_in_buffer=8",
    "prefetch_llm_batches=2",
    "n_batches_for_norm_estimate=5",
    "lr_warm_up_steps=5",
    "lr_decay_steps=10",
    "n_checkpoints=1",
    "eval_batch_size_prompts=4",
    "n_eval_batches=2",
    "output_path=out",
]
EXACT = ["activations_mixing_fraction=0", "n_batches_in_buffer=4", "prefetch_llm_batches=0"]


def text(seed, rows=300):
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(5, 40))) for _ in range(rows)]


def save_tokenizer(family, folder):
    """A byte-level BPE; Gemma's puts <bos> first by itself, the others' put nothing."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([family.bos, family.eos, "<pad>"]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text(0), trainer)
    adds_bos = family is GEMMA
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bpe.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token="<pad>",
        name_or_path=family.folder,
        add_bos_token=adds_bos,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in which the names of models and data sets are those of the Hub."""
    root = tmp_path_factory.mktemp("hub")
    for family in (GEMMA, GPT2, PYTHIA):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(family.config)
        for parameter in model.parameters():  # at 0.02 a random model is all but the identity
            if parameter.dim() == 2:
                parameter.data.mul_(20)
        model.save_pretrained(root / family.folder)
        tokenizer = save_tokenizer(family, root / family.folder)
        ids = [t for row in text(1) for t in tokenizer(row)["input_ids"]]
        rows = [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT, CONTEXT)]
        tokens = Dataset.from_list([{"input_ids": row} for row in rows])
        tokens.save_to_disk(root / f"tokens/{family.folder}")
        if family is GPT2:
            tokens.save_to_disk(root / "apollo-research/Skylion007-openwebtext-tokenizer-gpt2")
    pile = root / "monology/pile-uncopyrighted/train"
    pile.mkdir(parents=True)
    lines = (json.dumps({"text": row, "meta": {"set": "x"}}) for row in text(2))
    (pile / "00.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(params=PATHS)
def path(request, hub, tmp_path):
    for entry in hub.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return PATHS[request.param]


@pytest.fixture
def served(monkeypatch):
    """The tokens that SAELens' store hands to the model, batch by batch."""
    batches = []
    get_batch_tokens = ActivationsStore.get_batch_tokens

    def listen(self, *args, **kwargs):
        batches.append(get_batch_tokens(self, *args, **kwargs))
        return batches[-1]

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", listen)
    return batches


def settings(path, *more):
    family, loader, hook = path
    return load_run(
        shipped_config(family.file),
        [
            *SMALL,
            f"model_name={family.folder}",
            f"model_class_name={loader}",
            f"hook_name={hook}",
            *more,
        ],
    )


def hidden_states(family, run, tokens):
    """After block 1, by transformers alone."""
    given = run.runner.model_from_pretrained_kwargs
    dtype = given.get("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(family.folder, dtype=dtype)
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[2]


def explained_variance(x, reconstruction):
    x, reconstruction = x.double(), reconstruction.double()
    return 1 - (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()


def test_a_shipped_run_file_from_loader_to_evaluation(path, served):
    run = settings(path, "training_tokens=12800", "lr=1e-2")
    result = train(run)
    assert all(math.isfinite(value) for value in result.figures.values())
    assert {"explained_variance", "l0", "ce_loss_score"} <= result.figures.keys()

    saved = SAE.load_from_disk("out")
    assert type(saved) is JumpReLUSAE
    assert saved.cfg.normalize_activations == "none"
    assert saved.cfg.metadata.hook_name == path[2]
    # The last tokens are those of the evaluation. Here through transformers and the saved SAE.
    tokens = served[-1]
    assert tokens.shape == (8, CONTEXT)
    x = hidden_states(path[0], run, tokens).flatten(0, 1).float()
    assert torch.equal(saved.encode(x), result.sae.eval().encode(x))
    if run.runner.exclude_special_tokens:
        special = torch.tensor([0, 1, 2] if path[0] is GEMMA else [0, 1])
        x = x[~torch.isin(tokens.flatten(), special)]
    with torch.no_grad():
        found = explained_variance(x, saved(x))
    assert found.item() == pytest.approx(result.figures["explained_variance"], abs=2e-3)
    assert found > 0.2  # it learned something, in the units of the model

    checkpoint = newest_checkpoint("out")
    assert isinstance(SAE.load_from_disk(checkpoint), ATMSAE)
    scaler = json.loads((checkpoint / "activation_scaler.json").read_text())
    assert abs(math.log(scaler["scaling_factor"])) > 0.1  # so that folding it mattered


def test_resumed_equals_straight_bit_for_bit(path):
    family = path[0]
    exact = [*EXACT, f"dataset_path=tokens/{family.folder}", "streaming=false"]
    exact += ["is_dataset_tokenized=true", "exclude_special_tokens=false", "n_eval_batches=1"]
    resumes_bit_for_bit(lambda output: settings(path, *exact, f"output_path={output}"))


@pytest.mark.parametrize("path", ["gemma-2"], indirect=True)
def test_a_prefetching_run_resumes_where_it_stopped(path, served):
    more = ["prefetch_llm_batches=8"]
    stopped_after(17, settings(path, *more))
    before = list(served)
    served.clear()
    result = train(settings(path, *more), resume="out")
    assert result.sae.tracker.steps.item() == 40
    # The batches of the estimate and of 17 steps are not served again; what the thread fetched
    # while the checkpoint was written may be.
    rows = {tuple(row.tolist()) for batch in before[: 5 + 17] for row in batch}
    again = {tuple(row.tolist()) for batch in served for row in batch}
    assert len(rows) > 64
    assert not rows & again


@pytest.mark.parametrize("path", ["gemma-2"], indirect=True)
def test_gemma_is_loaded_in_bfloat16(path):
    given = settings(path).runner.model_from_pretrained_kwargs
    assert AutoModelForCausalLM.from_pretrained(GEMMA.folder, **given).dtype == torch.bfloat16
