import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TQDM_DISABLE"] = "1"  # tests look at what is on stderr

import pytest
import torch
from datasets import Dataset
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(60))]
CONTEXT = 16

torch.set_num_threads(1)
settings.register_profile("ours", deadline=None, derandomize="HYPOTHESIS_PROFILE" not in os.environ)
settings.load_profile("ours")


@pytest.fixture(autouse=True)
def _seed_and_place(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A tiny random Gemma-2 and its tokenizer, on disk as `from_pretrained` wants them."""
    folder = tmp_path_factory.mktemp("gemma-2-tiny")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        name_or_path=str(folder),
        add_bos_token=True,
    ).save_pretrained(folder)
    Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Text, as `Dataset.save_to_disk` writes it."""
    words = random.Random(0).choices(VOCABULARY[len(SPECIAL) :], k=8000)
    rows = [{"text": " ".join(words[i : i + 40])} for i in range(0, 8000, 40)]
    folder = tmp_path_factory.mktemp("text")
    Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="session")
def token_dataset():
    rows = random.Random(1)
    return Dataset.from_list(
        [{"tokens": [0, *rows.choices(range(4, 64), k=CONTEXT - 1)]} for _ in range(400)]
    )


@pytest.fixture(scope="session")
def hooked_model():
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=16,
            n_ctx=CONTEXT,
            d_head=8,
            n_heads=2,
            d_vocab=64,
            act_fn="gelu",
            device="cpu",
        )
    )
    torch.manual_seed(0)  # TransformerLens seeds the global generator as it likes
    return model


@pytest.fixture
def synthetic_yaml(tmp_path):
    """A run file of a few steps on a small hierarchy."""
    path = tmp_path / "run.yaml"
    path.write_text(
        """
runner: synthetic
seed: 3
hierarchy_model: {hidden_dim: 16, roots: 4, lone_features: 4, depth: 1}
sae: {architecture: atm, d_in: 16, d_sae: 32, k: 2, schedule_steps: 40, mask_warm_up_steps: 5}
training_samples: 2560
batch_size: 64
lr: 1e-3
lr_warm_up_steps: 1
lr_decay_steps: 1
eval_samples: 1000
output_path: out
"""
    )
    return path


@pytest.fixture
def language_model_yaml(tmp_path, gemma_folder, text_folder):
    """A run file of a few steps on the tiny Gemma-2."""
    path = tmp_path / "gemma.yaml"
    path.write_text(
        f"""
runner: language_model
seed: 1
model_name: {gemma_folder}
model_class_name: AutoModelForCausalLM
hook_name: model.layers.1
dataset_path: {text_folder}
is_dataset_tokenized: false
streaming: false
context_size: {CONTEXT}
training_tokens: 2560
train_batch_size_tokens: 64
store_batch_size_prompts: 4
n_batches_in_buffer: 4
n_eval_batches: 1
activations_mixing_fraction: 0
sae: {{architecture: atm, d_in: 16, d_sae: 64, k: 4, schedule_steps: 40, mask_warm_up_steps: 5}}
output_path: out
"""
    )
    return path


@pytest.fixture
def comparison_yaml(tmp_path):
    """A comparison of a few steps on a small hierarchy."""
    path = tmp_path / "small.yaml"
    path.write_text(
        """
runner: synthetic
hierarchy_model: {hidden_dim: 16, roots: 4, lone_features: 4, depth: 1}
seeds: [0, 1]
l0: [2, 3]
sae: {d_in: 16, d_sae: 32}
training_samples: 2560
batch_size: 64
lr: 1e-2
eval_samples: 500
curve_points: 4
output_path: out
architectures:
  atm: {role: candidate, sae: {schedule_steps: 40, mask_warm_up_steps: 5}}
  topk: {}
  jumprelu: {sae: {l0_coefficient: 0.01}, run: {lr: 3e-3}}
  untrained: {architecture: topk, role: control, trained: false}
quick: {seeds: [0], l0: [2], training_samples: 640}
"""
    )
    return path


@pytest.fixture
def language_model_comparison_yaml(tmp_path, gemma_folder, text_folder):
    """A comparison of a few steps on the tiny Gemma-2."""
    path = tmp_path / "small-gemma.yaml"
    path.write_text(
        f"""
runner: language_model
model_name: {gemma_folder}
model_class_name: AutoModelForCausalLM
hook_name: model.layers.1
dataset_path: {text_folder}
is_dataset_tokenized: false
streaming: false
context_size: {CONTEXT}
training_tokens: 1280
train_batch_size_tokens: 64
store_batch_size_prompts: 4
n_batches_in_buffer: 4
n_eval_batches: 2
seeds: [0, 1]
l0: [4]
sae: {{d_in: 16, d_sae: 64}}
curve_points: 4
output_path: out
architectures:
  atm: {{role: candidate, sae: {{schedule_steps: 20, mask_warm_up_steps: 5}}}}
  batchtopk: {{run: {{lr: 1e-3}}}}
  gated: {{sae: {{l1_coefficient: 0.1}}}}
  untrained: {{architecture: topk, role: control, trained: false}}
"""
    )
    return path
