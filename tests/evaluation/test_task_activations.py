import pytest
import torch
from sae_lens.load_model import load_model

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.task_activations import last_token_activations
from sae_lens_atm.training.run_file import load_run

TEXTS = ["w1", " ".join(f"w{i}" for i in range(12)), "w5 w6", "w3 w2 w1 w0", "w9"] * 3


@pytest.fixture
def run(language_model_yaml):
    return load_run(language_model_yaml).runner


@pytest.fixture
def model(run):
    return load_language_model(run)


def read(model, run, texts, max_tokens=128):
    places = []
    x = last_token_activations(model, ModelHook.of(run), texts, max_tokens, places.extend)
    assert sorted(places) == list(range(len(texts)))
    return x


def one(model, text, layer):
    """The activation on the last token of a text, of a model that reads nothing else."""
    words = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[0, *words]])  # 0 is <bos>
    with torch.no_grad():
        return model.model(tokens, output_hidden_states=True).hidden_states[layer + 1][0, -1]


def test_every_text_is_read_at_its_last_token(model, run):
    run.hook_name = "model.layers.0"
    model = load_language_model(run)
    x = read(model, run, TEXTS)
    assert x.shape == (len(TEXTS), 16)
    for row, text in zip(x, TEXTS, strict=True):
        torch.testing.assert_close(row, one(model, text, 0), atol=1e-5, rtol=1e-5)


def test_batches_of_any_size_give_the_same(model, run, monkeypatch):
    x = read(model, run, TEXTS)
    monkeypatch.setattr("sae_lens_atm.evaluation.task_activations._TOKENS_IN_BATCH", 13)
    torch.testing.assert_close(read(model, run, TEXTS), x, atol=1e-5, rtol=1e-5)


def test_a_long_text_keeps_its_end(model, run):
    words = [f"w{i}" for i in range(40)]
    long, end = read(model, run, [" ".join(words), " ".join(words[-6:])], 7)  # with <bos>
    torch.testing.assert_close(long, end, atol=1e-5, rtol=1e-5)
    (longer,) = read(model, run, [" ".join(words)], 8)
    assert not torch.allclose(long, longer, atol=1e-4)


def test_no_more_is_read_than_the_model_can(model, run):
    longest = model.model.config.max_position_embeddings
    words = [f"w{i % 50}" for i in range(3 * longest)]
    long, end = read(model, run, [" ".join(words), " ".join(words[1 - longest :])], 10_000)
    torch.testing.assert_close(long, end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bos", ["<bos>", None])
def test_a_text_without_tokens_counts(model, run, bos):
    model.tokenizer.bos_token = bos
    assert read(model, run, ["", "w1"]).isfinite().all()


def test_without_a_bos_only_the_text_is_read(model, run):
    with_bos = read(model, run, ["w1 w2"])
    model.tokenizer.bos_token = None
    assert not torch.allclose(read(model, run, ["w1 w2"]), with_bos, atol=1e-4)
    torch.testing.assert_close(read(model, run, ["<bos> w1 w2"]), with_bos, atol=1e-5, rtol=1e-5)


def test_only_the_layers_up_to_the_hook_run(model, run, monkeypatch):
    run.hook_name = "model.layers.0"
    model = load_model(run.model_class_name, run.model_name, "cpu", hook_names=[run.hook_name])

    def fail(*_args, **_kwargs):
        raise AssertionError

    monkeypatch.setattr(model.model.model.layers[1], "forward", fail)
    read(model, run, TEXTS)
