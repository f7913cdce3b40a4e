import json

import numpy as np
import torch
from sae_lens.saes.sae import SAEMetadata

from sae_lens_atm.saebench.inside.plain import to_json


def test_numbers_and_metadata_of_other_libraries_are_written():
    results = {
        "numpy": np.float32(0.5),
        "torch": torch.tensor(2),
        "several": torch.zeros(2),
        "metadata": SAEMetadata(model_name="gpt2", hook_name="blocks.1.hook_resid_post"),
        "other": torch.float32,
        "plain": [1, None, "a"],
    }
    found = json.loads(to_json(results))
    assert found["numpy"] == 0.5
    assert found["torch"] == 2
    assert found["metadata"]["model_name"] == "gpt2"
    assert found["other"] == "torch.float32"
    assert found["plain"] == [1, None, "a"]
    assert isinstance(found["several"], str)
