import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens import SAE, JumpReLUSAE, TrainingSAE, upload_saes_to_huggingface
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.training import upload_saes_to_huggingface as upload_module
from safetensors.torch import load_file

from sae_lens_atm import ATMSAE, ATMTrainingSAE
from tests.helpers import ACTIVATIONS, make_sae, state_equal, train

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(params=ACTIVATIONS)
def sae(request):
    return train(make_sae(activation=request.param), 40).eval()


def same(a, b, x):
    return torch.equal(a.encode(x), b.encode(x)) and torch.equal(a(x), b(x))


def test_training_object_saved_and_reloaded_are_one_sae(sae, tmp_path):
    x = torch.randn(100, 8)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "checkpoint")

    inference = SAE.load_from_disk(tmp_path / "inference")
    assert type(inference) is JumpReLUSAE
    assert same(sae, inference, x)

    checkpoint = SAE.load_from_disk(tmp_path / "checkpoint")
    assert isinstance(checkpoint, ATMSAE)
    assert same(sae, checkpoint, x)
    assert torch.equal(checkpoint.importance, sae.importance)

    training = TrainingSAE.load_from_disk(tmp_path / "checkpoint").eval()
    assert isinstance(training, ATMTrainingSAE)
    assert same(sae, training, x)
    # SAELens' loader casts the float64 threshold of batchtopk to the SAE's float32
    rounded = {n: t.float() if t.dtype == torch.float64 else t for n, t in sae.state_dict().items()}
    assert state_equal(
        {n: t.to(rounded[n].dtype) for n, t in training.state_dict().items()}, rounded
    )
    assert training.cfg.to_dict() == sae.cfg.to_dict()

    checkpoint.save_model(tmp_path / "again")
    again = SAE.load_from_disk(tmp_path / "again")
    assert same(sae, again, x)
    assert torch.equal(again.importance, sae.importance)


def test_inference_weights_hold_no_training_state(sae, tmp_path):
    weights, cfg = sae.save_inference_model(tmp_path)
    assert load_file(weights).keys() == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    saved = json.loads(cfg.read_text())
    assert saved["architecture"] == "jumprelu"
    assert saved["metadata"]["training_architecture"] == "atm"
    details = saved["metadata"]["training_architecture_details"]
    assert details["activation"] == sae.cfg.activation
    quantiles = saved["metadata"]["importance_quantiles"]
    assert quantiles["1.0"] == pytest.approx(sae.importance.max().item())


@every_activation
def test_bfloat16_saves_and_loads_as_itself(activation, tmp_path):
    sae = train(make_sae(activation=activation, dtype="bfloat16"), 30).eval()
    x = torch.randn(32, 8)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "checkpoint")
    for name in ("inference", "checkpoint"):
        loaded = SAE.load_from_disk(tmp_path / name)
        assert loaded.W_enc.dtype == torch.bfloat16
        assert same(sae, loaded, x)
    # SAELens' loader casts all tensors to the SAE's dtype: types must come back, values nearly
    training = TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    for name, buffer in training.tracker.named_buffers():
        original = sae.tracker.get_buffer(name)
        assert buffer.dtype == original.dtype
        torch.testing.assert_close(buffer, original, rtol=0.01, atol=1e-6)


def test_casting_to_bfloat16_and_back_keeps_state_exact(sae):
    exact = {n: b.clone() for n, b in sae.named_buffers()}
    sae.to(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    sae.to(torch.float32)
    for name, buffer in sae.named_buffers():
        assert buffer.dtype == exact[name].dtype, name
        assert torch.equal(buffer, exact[name]), name


def test_casting_an_inference_sae_keeps_its_importance(sae, tmp_path):
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert loaded.importance.dtype == torch.float32
    torch.testing.assert_close(loaded.importance, sae.importance, rtol=0.02, atol=1e-3)


def test_resuming_loads_the_state_exactly(sae, tmp_path):
    sae.save_model(tmp_path)
    fresh = ATMTrainingSAE(sae.cfg)
    fresh.load_weights_from_checkpoint(tmp_path)
    assert state_equal(fresh.state_dict(), sae.state_dict())


def test_training_goes_on_after_loading_as_if_it_had_not_stopped(tmp_path):
    batches = torch.randn(40, 64, 8)
    straight = train(make_sae(), 20, data=lambda step: batches[step])
    straight.save_model(tmp_path)
    loaded = make_sae()
    loaded.load_weights_from_checkpoint(tmp_path)
    for sae in (straight, loaded):  # each with a new optimiser: only the SAE's state is compared
        train(sae, 20, data=lambda step: batches[20 + step])
    assert state_equal(straight.state_dict(), loaded.state_dict())


def test_hub_upload_of_an_object_comes_back_as_atm(sae, tmp_path, monkeypatch):
    """What `upload_saes_to_huggingface` would send is what `SAE.from_pretrained` reads."""
    hub = tmp_path / "hub"

    class Api:
        def repo_info(self, *_):
            return None

        def upload_folder(self, folder_path, path_in_repo, allow_patterns, **_):
            (hub / path_in_repo).mkdir(parents=True)
            for name in allow_patterns:
                if (folder_path / name).exists():
                    (hub / path_in_repo / name).write_bytes((folder_path / name).read_bytes())

    def download(repo_id, filename, **_):
        assert repo_id == "someone/saes"
        if not (hub / filename).exists():
            raise LocalEntryNotFoundError(filename)  # the one of them that needs no HTTP response
        return str(hub / filename)

    monkeypatch.setattr(upload_module, "HfApi", Api)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    upload_saes_to_huggingface({"layer_0": sae}, "someone/saes", add_default_readme=False)

    loaded = SAE.from_pretrained("someone/saes", "layer_0")
    assert isinstance(loaded, ATMSAE)
    assert same(sae, loaded, torch.randn(16, 8))
    assert torch.equal(loaded.importance, sae.importance)


def test_a_checkpoint_without_its_provenance_is_a_clear_error(sae, tmp_path):
    _, cfg = sae.save_model(tmp_path)
    content = json.loads(cfg.read_text())
    del content["metadata"]["training_architecture_details"]
    cfg.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="training_architecture_details"):
        SAE.load_from_disk(tmp_path)


def test_meta_device(sae):
    sae.cfg.device = "meta"
    meta = ATMTrainingSAE(sae.cfg)
    assert all(t.is_meta for t in meta.state_dict().values())
    meta.load_state_dict(sae.state_dict(), assign=True)
    assert state_equal(meta.state_dict(), sae.state_dict())


def test_parents_that_were_rounded_are_found_again(tmp_path):
    sae = train(make_sae(d_sae=1000, dtype="bfloat16", parent_start=0.0), 3)
    sae.parent_tracker.parents[5, 0] = 999
    sae.save_model(tmp_path)
    loaded = train(TrainingSAE.load_from_disk(tmp_path), 3)
    assert (loaded.parent_tracker.parents < 1000).all()
