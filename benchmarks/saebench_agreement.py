"""Run SAEBench's absorption eval on one SAE with a given probe and given words.

    PYTHONPATH=sae_lens_atm/saebench ENVIRONMENT/bin/python benchmarks/saebench_agreement.py \\
        MODEL_FOLDER SAE_FOLDER words.json probe.safetensors found.json

`sae-lens-atm saebench --env ENVIRONMENT` makes the environment. The files replace what SAEBench
would draw at random. `words.json` holds the lists of words `train` and `test`, and optionally
`template`, `token_position`, `seed`, `batch_size` and `epochs` (of the L1 probe).
`probe.safetensors` holds `weight` (26, d_model) and `bias` (26,).

The probes on latents, the choice of latents, the examples in the prompts and the calculator are
SAEBench's. The output has one entry for each word and the prompts, so that another implementation
can use the same prompts.
"""

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with CUDA, SAEBench rounds the probe to bfloat16

import numpy as np
import torch
from inside.models import load_model, load_sae
from sae_bench.evals.absorption import common, feature_absorption
from sae_bench.evals.absorption.k_sparse_probing import run_k_sparse_probing_experiment
from sae_bench.evals.absorption.main import _aggregate_results_df
from sae_bench.evals.absorption.probing import (
    LinearProbe,
    create_dataset_probe_training,
    gen_and_save_df_acts_probing,
    save_probe_and_data,
)
from sae_bench.evals.absorption.prompting import (
    VERBOSE_FIRST_LETTER_TEMPLATE,
    VERBOSE_FIRST_LETTER_TOKEN_POS,
    first_letter_formatter,
)
from sae_bench.evals.absorption.vocab import LETTERS
from sae_bench.sae_bench_utils.general_utils import _standardize_sae_cfg
from safetensors.torch import load_file

MAX_K = 10
F1_JUMP = 0.03
MIN_PROBE_F1 = 0.6
NAME = "sae"


@dataclass
class Given:
    """Values that SAEBench would draw at random."""

    train: list[str]
    test: list[str]
    template: str = VERBOSE_FIRST_LETTER_TEMPLATE
    token_position: int = VERBOSE_FIRST_LETTER_TOKEN_POS
    seed: int = 42
    batch_size: int = 128
    epochs: int = 50


def prompts_of(words, given):
    """Return SAEBench's prompts for one half of the words, with examples from that half."""
    prompts, _ = create_dataset_probe_training(
        words, first_letter_formatter(), 1, given.template, train_test_fraction=1.0
    )
    return prompts


def place_probe(model, probe_file, given, layer, folder):
    """Store the probe and its data in the folder from which SAEBench loads a probe."""
    train, test = prompts_of(given.train, given), prompts_of(given.test, given)
    place = folder / f"{model.cfg.model_name}" / f"layer_{layer}"
    hook = f"blocks.{layer}.hook_resid_post"
    _, _, x_train, x_test = gen_and_save_df_acts_probing(
        model, train, test, place, hook, position_idx=given.token_position
    )
    tensors = load_file(probe_file)
    probe = LinearProbe(model.cfg.d_model, len(LETTERS))
    with torch.no_grad():
        probe.weights.copy_(tensors["weight"])
        probe.biases.copy_(tensors["bias"])
    data = {"X_train": torch.from_numpy(x_train), "X_test": torch.from_numpy(x_test)}
    for name, prompts in (("y_train", train), ("y_test", test)):
        data[name] = torch.tensor([letter for _, letter in prompts])
    save_probe_and_data(probe, data, place)
    return {
        half: {prompt.word: prompt.base for prompt, _ in prompts}
        for half, prompts in (("train", train), ("test", test))
    }


def absorption(model, sae, probe_file, given, folder):
    """Run SAEBench's two experiments: the main latents of each letter, and their absorption."""
    layer = sae.cfg.hook_layer
    random.seed(given.seed)
    torch.manual_seed(given.seed)
    prompts = place_probe(model, probe_file, given, layer, folder / "probes")
    shared = {
        "model": model,
        "sae": sae,
        "layer": layer,
        "sae_name": NAME,
        "max_k_value": MAX_K,
        "prompt_template": given.template,
        "prompt_token_pos": given.token_position,
        "device": "cpu",
        "probes_dir": folder / "probes",
    }
    metrics = run_k_sparse_probing_experiment(
        **shared,
        experiment_dir=folder / "k",
        f1_jump_threshold=F1_JUMP,
        k_sparse_probe_batch_size=given.batch_size,
        k_sparse_probe_num_epochs=given.epochs,
    )
    scores = common.load_experiment_df(
        "k_sparse_probing", folder / "k" / NAME / f"layer_{layer}_{NAME}_raw_results.parquet"
    )
    feature_absorption.get_alpha_tokens = lambda _tokenizer: [*given.train, *given.test]
    words = feature_absorption.run_feature_absortion_experiment(
        **shared,
        experiment_dir=folder / "absorption",
        sparse_probing_experiment_dir=folder / "k",
        feature_split_f1_jump_threshold=F1_JUMP,
    )
    return prompts, metrics, scores, words


def by_letter(metrics, words):
    """Return the scores that SAEBench's `run_eval` averages, and their intermediate values."""
    rates = {row["letter"]: row for _, row in _aggregate_results_df(words).iterrows()}
    letters = {}
    for _, row in metrics.iterrows():
        rate = rates.get(row["letter"], {})
        letters[row["letter"]] = {
            "f1_probe": row["f1_probe"],
            "f1_by_k": [row[f"f1_sparse_sae_{k}"] for k in range(1, MAX_K + 1)],
            "latents_by_l1_weight": row[f"sparse_sae_k_{MAX_K}_feats"],
            "split_latents": row["split_feats"],
            "probe_true_positives": rate.get("num_probe_true_positives", 0),
            "absorption_fraction": rate.get("mean_absorption_fraction"),
            "absorption_full": rate.get("full_absorption_rate"),
        }
    return letters


def by_word(scores, words):
    """Return one entry for each word that the probe classifies correctly."""
    probe = {
        row["token"]: row[f"score_probe_{row['answer_letter']}"] for _, row in scores.iterrows()
    }
    return [
        {
            "word": row["token"],
            "letter": row["letter"],
            "prompt": row["prompt"],
            "probe_score": probe[row["token"]],
            "split_activations": row["split_feat_acts"],
            "top_latents": row["projection_feats"],
            "top_projections": row["probe_projections"],
            "absorption_fraction": row["absorption_fraction"],
            "absorption_full": row["is_full_absorption"],
        }
        for _, row in words.iterrows()
    ]


def main(model_folder, sae_folder, words_file, probe_file, found_file):
    given = Given(**json.loads(Path(words_file).read_text(encoding="utf-8")))
    model = load_model(model_folder, "cpu", torch.float32)
    sae = load_sae(Path(sae_folder), "cpu", torch.float32)
    _standardize_sae_cfg(sae.cfg)
    with tempfile.TemporaryDirectory() as folder:
        prompts, metrics, scores, words = absorption(model, sae, probe_file, given, Path(folder))
    letters = by_letter(metrics, words)
    counted = [
        letter
        for letter in letters.values()
        if letter["f1_probe"] > MIN_PROBE_F1 and letter["absorption_full"] is not None
    ]
    found = {
        "versions": {name: version(name) for name in ("sae-bench", "sae-lens", "torch")},
        "settings": {k: v for k, v in vars(given).items() if k not in ("train", "test")},
        "letters_counted": len(counted),
        "mean": {
            name: float(np.mean([letter[name] for letter in counted]))
            for name in ("absorption_fraction", "absorption_full")
        },
        "letters": letters,
        "words": by_word(scores, words),
        "prompts": prompts,
    }
    plain = partial(json.dumps, default=lambda value: value.tolist())
    Path(found_file).write_text(plain(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
