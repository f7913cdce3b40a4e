"""The model card of a repo of SAEs, with one section for each SAE.

The section stands between two comments. The rest of the card does not change. The facts of a
section are collected here, its text is in `model_card.md.j2`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from huggingface_hub import RepoCard
from sae_lens import SAE
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.metrics.figures import FIGURES
from sae_lens_atm.metrics.figures import figure as figure_info
from sae_lens_atm.page import templates
from sae_lens_atm.sae.active import active_settings
from sae_lens_atm.sae.config import ATMTrainingSAEConfig

_HEAD = """
# Sparse autoencoders

For [SAELens](https://github.com/decoderesearch/SAELens), uploaded with sae-lens-atm.
"""
_TRAINING = {
    "training_tokens": "tokens",
    "training_samples": "samples",
    "train_batch_size_tokens": "tokens per batch",
    "batch_size": "samples per batch",
    "context_size": "context",
    "lr": "learning rate",
    "lr_scheduler_name": "learning rate, schedule",
    "lr_warm_up_steps": "learning rate, warm-up steps",
    "lr_decay_steps": "learning rate, decay steps",
    "adam_beta1": "Adam's beta 1",
    "adam_beta2": "Adam's beta 2",
    "seed": "seed",
}
_BETTER = {1: "more", -1: "less", 0: "-"}
# Figures of SAELens on language models that a comparison does not report.
_SAELENS_BETTER = {
    "explained_variance_legacy": "more",
    "cossim": "more",
    "ce_loss_with_sae": "less",
    "kl_div_with_sae": "less",
    "l2_ratio": "1",
    "relative_reconstruction_bias": "1",
}


class _Figure(NamedTuple):
    name: str
    value: str
    better: str


@dataclass(frozen=True)
class Described:
    """An SAE and facts about it, without private ones."""

    sae: SAE[Any]
    runner: Mapping[str, Any]
    """The configuration of its training run; empty if it was not saved."""
    figures: Mapping[str, Any]
    figures_from: str
    folder: Path
    """Where the SAE is saved. Paths in its metadata may be relative to a folder above."""

    def hub_id(self, name: str | None) -> str | None:
        """Return a name in the metadata if it is an id on the Hub, and not a local path."""
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name or "")
        bases = (Path(), *self.folder.absolute().parents)
        return name if is_id and not any((base / is_id[0]).exists() for base in bases) else None

    def hub_model(self) -> str | None:
        """Return the Hub's id of the model, from that or one of TransformerLens' short names."""
        name = self.sae.cfg.metadata.model_name
        try:
            return self.hub_id(get_official_model_name(name or ""))
        except ValueError:
            return self.hub_id(name)


def section(described: Described, repo_id: str, revision: str, sae_id: str) -> str:
    """Return the section of one SAE, in Markdown."""
    sae, metadata = described.sae, described.sae.cfg.metadata
    details: dict[str, Any] = metadata.training_architecture_details or {}
    trained_as = metadata.training_architecture
    uses_k = details.get("activation", "batchtopk") == "batchtopk"  # other activations ignore it
    window = described.runner.get("dead_feature_window")
    steps = f"last {window:,} steps" if isinstance(window, int) else "end"
    facts = {
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "data": metadata.dataset_path or _synthetic(described.runner),
        "d_in, d_sae": f"{sae.cfg.d_in}, {sae.cfg.d_sae}",
        "trained as": trained_as,
        "k": details.get("k", getattr(sae.cfg, "k", None)) if uses_k else None,
        "saved as": f"{sae.cfg.architecture()}, {sae.cfg.dtype}",
        "L0 at the end of training": metadata.l0,
        f"dead latents, {steps} of training": metadata.num_dead_features,
        "SAELens": metadata.sae_lens_training_version,
    }
    training = {label: described.runner.get(key) for key, label in _TRAINING.items()}
    training["seed"] = described.runner.get("seed") and str(described.runner["seed"])
    package = type(sae).__module__.partition(".")[0]
    environment = templates("sae_lens_atm.hub", autoescape=False)
    environment.filters["cell"] = _cell
    text = environment.get_template("model_card.md.j2").render(
        sae_id=sae_id,
        repo_id=repo_id,
        revision=revision,
        facts=_without_none(facts),
        training=_without_none(training),
        atm=_settings_of_atm(details) if trained_as == "atm" else None,
        figures=_figures(described.figures),
        figures_from=described.figures_from,
        package=package,
        stock=package == "sae_lens",
        architecture=sae.cfg.architecture(),
        dtype=sae.cfg.dtype.removeprefix("torch."),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def card_metadata(described: Described) -> dict[str, Any]:
    """Return the metadata of the card. Lists are added to those that the card has."""
    metadata = described.sae.cfg.metadata
    tags = ["saelens", "sae-lens-atm", "sparse-autoencoder", "mechanistic-interpretability"]
    if metadata.training_architecture == "atm":
        tags += ["adaptive-temporal-masking", "arxiv:2510.08855"]
    base, data = described.hub_model(), described.hub_id(metadata.dataset_path)
    return {
        "library_name": "saelens",
        "tags": tags,
        **({"base_model": [base]} if base else {}),
        **({"datasets": [data]} if data else {}),
    }


def updated_card(old: str | None, sae_id: str, text: str, metadata: Mapping[str, Any]) -> str:
    """Return a card with the section of one SAE added or replaced.

    Other sections, other text and other metadata are kept.

    Args:
        old: the present card, or None.
        sae_id: the SAE's folder in the repo.
        text: its section.
        metadata: metadata to add.

    Raises:
        SettingsError: the metadata of the present card cannot be read.
    """
    content = _HEAD if old is None else old
    if not content.lstrip().startswith("---"):
        content = f"---\n{{}}\n---\n{content}"  # RepoCard warns if there is no metadata
    try:
        card = RepoCard(content)
    except (ValueError, yaml.YAMLError) as error:
        raise SettingsError(
            "README.md of the repo: the metadata at its top is not a YAML mapping: correct it first"
        ) from error
    for key, value in metadata.items():
        if isinstance(value, list):
            card.data[key] = _joined(card.data.get(key), cast(list[str], value))
        elif key not in card.data:
            card.data[key] = value
    start, end = f"<!-- sae-lens-atm writes this: {sae_id} -->", f"<!-- end of {sae_id} -->"
    ours = f"{start}\n{text}\n{end}"
    marked = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    card.text, replaced = marked.subn(lambda _: ours, card.text, count=1)
    if not replaced:
        card.text = f"{card.text.rstrip()}\n\n{ours}\n"
    return str(card)


def _joined(old: Any, new: list[str]) -> list[Any]:
    before: list[Any] = [] if old is None else old if isinstance(old, list) else [old]
    return [*before, *(value for value in new if value not in before)]


def _figures(figures: Mapping[str, Any]) -> list[_Figure]:
    finite = {k: v for k, v in figures.items() if isinstance(v, int | float) and math.isfinite(v)}
    order = [*(k for k in FIGURES if k in finite), *(k for k in finite if k not in FIGURES)]
    return [
        _Figure(
            figure_info(name).label,
            f"{finite[name]:,}" if isinstance(finite[name], int) else f"{finite[name]:.4g}",
            _SAELENS_BETTER.get(name, _BETTER[figure_info(name).better]),
        )
        for name in order
    ]


def _synthetic(runner: Mapping[str, Any]) -> str | None:
    model: Any = runner.get("synthetic_model")
    if model is None:
        return None
    if isinstance(model, str):
        return f"synthetic model {model}"
    return (
        f"a synthetic model of {model['num_features']} features in {model['hidden_dim']} dimensions"
    )


def _settings_of_atm(details: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that ATM adds to SAELens', as far as they have an effect."""
    active = active_settings(details)
    return {k: active[k] for k in ATMTrainingSAEConfig.__annotations__ if k in active}


def _without_none(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _cell(value: Any) -> str:
    """Return a value for a cell of a table, without line breaks and bars."""
    text = (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return " ".join(text.split()).replace("|", r"\|")
