import json

from tests.cli.command import run

SMALL = {"words_per_letter": 6, "layers": 2, "d_model": 8, "heads": 2, "steps": 3}


def test_make_lm_makes_a_model_and_prints_its_probes(tmp_path):
    settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    result = run("make-lm", "lm", "--seed", "3", *settings, "--set", "dataset_rows=16")
    assert result.exit_code == 0, result.output
    assert "hook transformer.h.0, d_in 8" in result.output
    assert "letter probes on held-out words: mean F1 0." in result.output
    assert json.loads((tmp_path / "lm/spelling-lm.json").read_text())["seed"] == 3
    again = run("make-lm", "lm", "--seed", "4", *settings)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: FOLDER must be a new or an empty folder, got 'lm'")
