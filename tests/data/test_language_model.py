from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from sae_lens import LanguageModelSAETrainingRunner

from sae_lens_atm.data.language_model import (
    check_hook,
    load_language_model,
    saved_dataset,
    set_metadata,
)
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.run_file import load_run


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"])
def test_a_hook_of_the_width_of_the_sae(language_model_yaml, hooked_model, hook):
    check_hook(load_run(language_model_yaml, [f"hook_name={hook}"]).runner, hooked_model)


def test_heads_are_joined_or_one_is_chosen(language_model_yaml, hooked_model):
    hook = "hook_name=blocks.0.attn.hook_z"
    check_hook(load_run(language_model_yaml, [hook]).runner, hooked_model)  # 2 heads of 8
    one = load_run(language_model_yaml, [hook, "hook_head_index=1", "sae.d_in=8"]).runner
    check_hook(one, hooked_model)


def test_a_hook_that_is_not_there_gets_similar_names(language_model_yaml, hooked_model):
    cfg = load_run(language_model_yaml, ["hook_name=blocks.1.hook_resid_pst"]).runner
    with pytest.raises(SettingsError, match=r"^hook_name .*blocks\.1\.hook_resid_post"):
        check_hook(cfg, hooked_model)


def test_another_width_is_refused(language_model_yaml, hooked_model):
    cfg = load_run(language_model_yaml, ["hook_name=blocks.1.hook_resid_post", "sae.d_in=8"]).runner
    with pytest.raises(SettingsError, match=r"^sae\.d_in must be 16"):
        check_hook(cfg, hooked_model)


@pytest.mark.parametrize("head", [-1, 2])
def test_a_head_that_is_not_there(language_model_yaml, hooked_model, head):
    cfg = load_run(language_model_yaml, [f"hook_head_index={head}", "sae.d_in=8"]).runner
    cfg.hook_name = "blocks.0.attn.hook_z"
    with pytest.raises(SettingsError, match=rf"^hook_head_index must be from 0 to 1, got {head}"):
        check_hook(cfg, hooked_model)
    cfg.hook_name = "blocks.1.hook_resid_post"
    with pytest.raises(SettingsError, match=r"^hook_head_index must be None, as the hook has no"):
        check_hook(cfg, hooked_model)


def test_a_module_whose_output_is_no_tensor(language_model_yaml):
    cfg = load_run(language_model_yaml, ["hook_name=model"]).runner
    with pytest.raises(SettingsError, match=r"^hook_name is 'model': its output is not a tensor"):
        load_language_model(cfg)


def test_a_chat_format_needs_a_template(language_model_yaml):
    cfg = load_run(language_model_yaml, ["use_chat_formatting=true"]).runner
    with pytest.raises(SettingsError, match=r"^use_chat_formatting must be False, as the tokenize"):
        load_language_model(cfg)


def test_the_metadata_is_that_of_saelens_runner(language_model_yaml):
    settings = ["sequence_separator_token=eos", "disable_concat_sequences=true"]
    cfg = load_run(language_model_yaml, settings).runner
    ours, theirs = (
        SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace())) for _ in range(2)
    )
    set_metadata(ours, cfg)
    runner = SimpleNamespace(sae=theirs, cfg=cfg)
    LanguageModelSAETrainingRunner._set_sae_metadata(runner)
    assert vars(ours.cfg.metadata) == vars(theirs.cfg.metadata)


def test_saved_datasets(tmp_path):
    rows = Dataset.from_list([{"tokens": [1, 2]}])
    rows.save_to_disk(tmp_path / "rows")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for name in ("rows", "splits"):
        assert saved_dataset(str(tmp_path / name))["tokens"] == [[1, 2]]
    assert saved_dataset(str(tmp_path)) is None
    assert saved_dataset("someone/something") is None
