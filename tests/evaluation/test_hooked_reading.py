import pytest
import torch

from sae_lens_atm.evaluation.hooked_reading import ModelHook, activations_at, activations_of

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
PLACES = [2, 1, 0]


def alone(model, name, row, place):
    _, cache = model.run_with_cache(torch.tensor([row]), names_filter=[name])
    return cache[name][0, place]


@pytest.mark.parametrize("layer", [0, 1])
def test_each_row_is_read_at_its_place(hooked_model, layer):
    name = f"blocks.{layer}.hook_resid_post"
    found = activations_at(hooked_model, ModelHook(name), ROWS, PLACES)
    assert found.shape == (3, 16)
    for x, row, place in zip(found, ROWS, PLACES, strict=True):
        torch.testing.assert_close(x, alone(hooked_model, name, row, place), atol=1e-5, rtol=1e-5)


def test_a_head_and_all_heads(hooked_model):
    name = "blocks.1.attn.hook_z"
    one = activations_at(hooked_model, ModelHook(name, head_index=1), ROWS, PLACES)
    every = activations_at(hooked_model, ModelHook(name), ROWS, PLACES)
    assert one.shape == (3, 8)
    assert every.shape == (3, 16)
    torch.testing.assert_close(one, every[:, 8:])


@pytest.mark.parametrize("head", [None, 1])
def test_each_row_is_read_at_all_its_tokens(hooked_model, head):
    name = "blocks.1.attn.hook_z"
    found = activations_of(hooked_model, ModelHook(name, head), ROWS)
    assert [x.shape for x in found] == [(len(row), 16 if head is None else 8) for row in ROWS]
    for x, row in zip(found, ROWS, strict=True):
        for place in range(len(row)):
            heads = alone(hooked_model, name, row, place)
            expected = heads.flatten() if head is None else heads[head]
            torch.testing.assert_close(x[place], expected, atol=1e-5, rtol=1e-5)


def test_layers_above_the_hook_do_not_run(hooked_model, monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError

    monkeypatch.setattr(hooked_model.blocks[1], "forward", fail)
    activations_at(hooked_model, ModelHook("blocks.0.hook_resid_post"), ROWS, PLACES)


def test_autocast_computes_in_bfloat16(hooked_model):
    name = "blocks.0.hook_resid_post"
    full = activations_at(hooked_model, ModelHook(name), ROWS, PLACES)
    rough = activations_at(hooked_model, ModelHook(name, autocast=True), ROWS, PLACES)
    assert not torch.equal(full, rough)
    torch.testing.assert_close(rough.float(), full, atol=0.1, rtol=0.1)
