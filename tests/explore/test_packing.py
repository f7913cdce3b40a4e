from typing import NamedTuple

import numpy as np
import pytest

from sae_lens_atm.explore.packing import pack, unpack


class Pair(NamedTuple):
    one: object
    other: object


def test_content_is_restored():
    content = {
        "text": ["</script>", "\N{SNOWMAN}", "\x00"],
        "pair": Pair(np.arange(5, dtype=np.uint8), None),
        "matrix": np.array([[1.5, -2], [0, 4]], dtype=np.float32),
        "list": [np.zeros(0, dtype=np.uint32), 3, float("nan")],
    }
    found = unpack(pack(content))
    assert found["text"] == content["text"]
    assert found["pair"]["one"].tolist() == [0, 1, 2, 3, 4]
    assert found["pair"]["other"] is None
    assert found["matrix"].tolist() == [[1.5, -2], [0, 4]]
    assert found["list"][0].tolist() == []
    assert found["list"][1:] == [3, None]


def test_the_text_is_plain_base64():
    assert pack({"a": "</script>"}).isascii()
    assert "<" not in pack({"a": "</script>"})


def test_an_array_that_javascript_lacks_is_refused():
    with pytest.raises(TypeError, match="no typed array for int64"):
        pack({"a": np.zeros(3, dtype=np.int64)})
