"""The traffic that benchmarks/scaling.py counted in training steps."""

import json
from pathlib import Path

from tests.helpers import load_script

ROOT = Path(__file__).parents[1]


def test_the_traffic_counted_is_that_of_the_formula():
    scaling = load_script("benchmarks/scaling.py")
    found = json.loads((ROOT / "docs/scale/scaling.json").read_text())
    for shape, (_, *sizes) in scaling.SHAPES.items():
        for name, cfg in scaling.contenders(*sizes).items():
            assert found[f"{shape}, {name}"]["bytes"] == scaling.traffic(cfg)
