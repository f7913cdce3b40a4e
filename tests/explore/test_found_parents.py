from sae_lens_atm.explore.found_parents import found_in_training
from sae_lens_atm.training.run import train as train_run
from sae_lens_atm.training.run_file import load_run
from tests.helpers import make_sae, train


def test_a_training_form_has_its_parents(tmp_path):
    sae = make_sae()
    sae.parent_tracker.parents[3, 0] = 5
    sae.save_model(tmp_path / "kept")
    found = found_in_training(str(tmp_path / "kept"))
    assert found is not None
    assert found.parents[3, 0] == 5
    assert found.checkpoint == "kept"


def test_the_newest_checkpoint_of_a_run_has_them(synthetic_yaml):
    run = load_run(synthetic_yaml, ["save_final_checkpoint=true", "sae.parent_start=0"])
    train_run(run)
    found = found_in_training("out")
    assert found is not None
    assert found.checkpoint == "final_2560"
    assert found.parents.shape == (32, 8)


def test_other_saes_have_none(tmp_path):
    sae = train(make_sae(), 3)
    sae.save_inference_model(tmp_path / "inference")
    assert found_in_training(str(tmp_path / "inference")) is None
    assert found_in_training("you/your-saes:layer_12") is None
    without = make_sae(parent_weight=0.0)
    without.save_model(tmp_path / "without")
    assert found_in_training(str(tmp_path / "without")) is None
