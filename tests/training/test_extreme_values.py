"""Each field of a run file at extreme values, alone: the run is refused, or trains two steps.

By default two values of each field of runner and hierarchy. HYPOTHESIS_PROFILE=long takes all
values, all architectures and runs on a language model: several minutes.
"""

import dataclasses
import os
import typing

import pytest
import yaml
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from tests.training.test_fuzz import (
    FIELDS,
    SIZES,
    check_content,
    content_of,
    fields_of,
    values_of,
)

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
long_only = pytest.mark.skipif(not LONG, reason="HYPOTHESIS_PROFILE=long runs it")
SHORT = [name for name in FIELDS if LONG or not name.startswith("sae.")]


@pytest.mark.parametrize("name", SHORT)
def test_a_field_of_a_synthetic_run(name, tmp_path):
    values = FIELDS[name] if LONG else (FIELDS[name][0], FIELDS[name][-1])
    for i, value in enumerate(values):
        content = content_of({name: value}, tmp_path / f"{i}/out")
        check_content(content, [name.rpartition(".")[2]])


OTHERS = sorted(SAE_TRAINING_CLASS_REGISTRY.keys() - {"atm"})


@long_only
@pytest.mark.parametrize("architecture", OTHERS)
def test_the_fields_of_another_architecture(architecture, tmp_path):
    config = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    names = {field.name for field in dataclasses.fields(config)}
    needed = {"k": 2, "matryoshka_widths": [8, 16]}
    sae = {"architecture": architecture, "d_in": 16, "d_sae": 32}
    sae |= {name: value for name, value in needed.items() if name in names}
    fields = fields_of(config)
    fields.pop("matryoshka_widths", None)
    for name, values in fields.items():
        for i, value in enumerate(values):
            content = content_of({}, tmp_path / f"{name}-{i}/out")
            content["sae"] = yaml.safe_load(yaml.safe_dump({**sae, name: value}))
            check_content(content, ["sae"])


# --- runs on a language model --------------------------------------------------------------------

LM_VALUES = {
    **SIZES,
    "model_name": ["", ".", "/nonexistent", None],
    "hook_name": ["", "nope", "model.layers.0", "model.layers.7", "model", "model.embed_tokens"],
    "hook_head_index": [None, -1, 0, 1, 7],
    "dataset_path": ["", "/nonexistent", None],
    "context_size": [-1, 0, 1, 2, 7, 16, 1000, 2**40],
    "seqpos_slice": [[None], [0, 8], [8, 0], [0, None], [1, 1], [3, 1000]],
    "train_batch_size_tokens": [-1, 0, 1, 2, 33, 64, 2**40],
    "n_batches_in_buffer": [-1, 0, 1, 2, 7, 2**40],
    "store_batch_size_prompts": [-1, 0, 1, 2, 7, 2**40],
    "n_eval_batches": [-1, 0, 1, 7],
    "eval_batch_size_prompts": [-1, 0, 1, 7, None],
    "llm_device": ["cpu", "meta", "warp9", ""],
    "act_store_device": ["cpu", "with_model", "meta", "warp9", ""],
    "cached_activations_path": [None, "", "nowhere"],
}
# Compilation takes minutes. The others are nested, or made by SAELens.
LM_LEFT_OUT = {
    *("compile_llm", "compile_sae", "llm_compilation_mode", "sae_compilation_mode"),
    *("sae", "logger", "metadata", "output_path", "sae_lens_version", "sae_lens_training_version"),
    *("model_kwargs", "model_from_pretrained_kwargs", "exclude_special_tokens"),
    *("resume_from_checkpoint", "hook_eval", "from_pretrained_path", "model_class_name"),
}
HINTS = typing.get_type_hints(LanguageModelSAERunnerConfig)
LM_FIELDS = [
    field.name
    for field in dataclasses.fields(LanguageModelSAERunnerConfig)
    if field.name not in LM_LEFT_OUT
]


@long_only
@pytest.mark.parametrize("name", LM_FIELDS)
def test_a_field_of_a_run_on_a_language_model(name, language_model_yaml, tmp_path):
    base = {**yaml.safe_load(language_model_yaml.read_text()), "max_bad_batches": 1}
    for i, value in enumerate(LM_VALUES.get(name, values_of(name, HINTS[name]))):
        folder = tmp_path / f"{i}"
        content = {**base, name: value, "output_path": str(folder / "out")}
        if name == "checkpoint_path" and value:
            content[name] = str(folder / value)
        keys = [name, "sae.d_in"] if name == "hook_name" else [name]
        check_content(yaml.safe_load(yaml.safe_dump(content)), keys)
