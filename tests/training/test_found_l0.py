import pytest

from sae_lens_atm.training.found_l0 import key_of

CONTENT = {"model_name": "gpt2", "dataset_path": "you/text", "sae": {"d_in": 8, "d_sae": 16}}


@pytest.mark.parametrize(
    "changed",
    [
        {"dataset_path": "you/other"},
        {"exclude_special_tokens": True},
        {"seqpos_slice": [1]},
        {"prepend_bos": False},
        {"sae": {"d_in": 8, "d_sae": 32}},
    ],
)
def test_an_l0_is_of_its_data_and_widths(changed):
    assert key_of(CONTENT | changed, "topk") != key_of(CONTENT, "topk")
    assert key_of(CONTENT, "atm") != key_of(CONTENT, "topk")
    assert key_of(CONTENT | {"training_tokens": 9, "device": "cpu"}, "topk") == key_of(
        CONTENT, "topk"
    )


def test_other_content_at_a_path_is_other_data(tmp_path):
    (tmp_path / "text.txt").write_text("one")
    content = CONTENT | {"dataset_path": str(tmp_path)}
    before = key_of(content, "topk")
    (tmp_path / "text.txt").write_text("two")
    assert key_of(content, "topk") != before
