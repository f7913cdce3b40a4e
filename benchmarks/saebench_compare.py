"""Compare this package's absorption of an SAE with SAEBench's, for each word and letter.

    export PYTHONPATH=sae_lens_atm/saebench
    python benchmarks/saebench_compare.py MODEL_FOLDER SAE_FOLDER words.json probe.safetensors
    ENVIRONMENT/bin/python benchmarks/saebench_agreement.py \\
        MODEL_FOLDER SAE_FOLDER words.json probe.safetensors found.json
    python benchmarks/saebench_compare.py \\
        MODEL_FOLDER SAE_FOLDER words.json probe.safetensors found.json

The first command draws words and trains probes for both implementations. The second runs in
SAEBench's environment, and writes SAEBench's scores and prompts. The third uses the same prompts.

Two things are compared: the calculator alone, with SAEBench's main latents, and the whole metric,
with main latents of this package. The L1 probes that choose main latents have different random
starts.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from inside.models import hooked_name, load_model
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from sae_lens_atm.evaluation.first_letters import (
    SMALL_MODEL,
    look_at_first_letters,
    residual_stream,
)
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.letter_words import letter_of
from sae_lens_atm.metrics.first_letter import PROBE_F1, absorbed, first_letter_scores
from sae_lens_atm.metrics.probes import Probe, Words, f1_scores

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def give(model_folder, words_file, probe_file, hook):
    """Write the words and the probes for both implementations."""
    model = load_model(model_folder, "cpu", torch.float32)
    letters = look_at_first_letters(model, hook, SMALL_MODEL)
    words = {"train": letters.words[0], "test": letters.words[1]}
    Path(words_file).write_text(json.dumps(words), encoding="utf-8")
    save_file({"weight": letters.probe.weight, "bias": letters.probe.bias}, probe_file)


def main(model_folder, sae_folder, words_file, probe_file, found_file=None):
    hook = ModelHook(hooked_name(SAE.load_from_disk(sae_folder).cfg.metadata.hook_name))
    if found_file is None:
        give(model_folder, words_file, probe_file, hook)
        return
    found = json.loads(Path(found_file).read_text(encoding="utf-8"))
    given = json.loads(Path(words_file).read_text(encoding="utf-8"))
    model = load_model(model_folder, "cpu", torch.float32)
    sae = SAE.load_from_disk(sae_folder)
    sae.fold_W_dec_norm()
    tensors = load_file(probe_file)
    probe = Probe(tensors["weight"], tensors["bias"])

    def words(half):
        prompts = [found["prompts"][half][word] for word in given[half]]
        letters = torch.tensor([letter_of(word) for word in given[half]])
        return Words(residual_stream(model, hook, prompts), letters)

    train, test = words("train"), words("test")
    by_word = {row["word"]: row for row in found["words"]}
    # SAEBench draws new prompts for the words on which it measures absorption.
    prompts = [
        by_word[word]["prompt"] if word in by_word else found["prompts"]["test"][word]
        for word in given["test"]
    ]
    asked = residual_stream(model, hook, prompts)
    with torch.no_grad():
        acts = sae.encode(asked)
        cosine = torch.nn.functional.normalize(sae.W_dec, dim=-1) @ (
            torch.nn.functional.normalize(probe.weight, dim=-1).T
        )
    differing = 0
    for i, word in enumerate(given["test"]):
        if word not in by_word:
            continue
        row, c = by_word[word], int(test.letter[i])
        main_latents = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
        main_latents[found["letters"][LETTERS[c]]["split_latents"]] = True
        direction = torch.nn.functional.normalize(probe.weight[c], dim=0)
        fraction, full = absorbed(
            acts[i : i + 1], asked[i : i + 1] @ direction, cosine[:, c], main_latents
        )
        same = abs(fraction.item() - row["absorption_fraction"]) < 1e-4
        differing += not same or bool(full) != row["absorption_full"]
    print(f"calculator: {len(by_word)} words, {differing} with different scores")

    yes = probe.score(test.x) > 0
    f1 = f1_scores(yes, torch.nn.functional.one_hot(test.letter, 26).bool())
    with torch.no_grad():
        scores = first_letter_scores(
            train._replace(x=sae.encode(train.x)),
            test._replace(x=sae.encode(test.x)),
            acts,
            asked,
            sae.W_dec,
            probe,
            yes,
            f1 > PROBE_F1,
            seed=0,
            batch_size=128,
        )
    theirs = [row for row in found["letters"].values() if row["f1_probe"] > PROBE_F1]
    same = sum(
        scores.main_latents[i].nonzero().squeeze(1).tolist()
        == sorted(found["letters"][letter]["split_latents"])
        for i, letter in enumerate(LETTERS)
        if letter in found["letters"]
    )
    print(f"main latents: the same for {same} of {len(found['letters'])} letters")
    k1 = fmean(row["f1_by_k"][0] for row in theirs)
    splits = fmean(len(row["split_latents"]) for row in theirs)
    print(f"{'':22}{'SAEBench':>10}{'ours':>10}")
    for label, their, name in (
        ("absorption, fraction", found["mean"]["absorption_fraction"], "absorption_fraction"),
        ("absorption, full", found["mean"]["absorption_full"], "absorption_full"),
        ("best latent, F1", k1, "k1_f1"),
        ("main latents", splits, "feature_splits"),
    ):
        print(f"{label:22}{their:10.4f}{scores.figures[name]:10.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
