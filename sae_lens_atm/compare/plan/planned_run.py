"""One SAE of a comparison, as planned: what it is trained with, and where it is kept."""

import hashlib
import json
import math
from copy import copy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sae_lens_atm.compare.plan.l0_target import Knob
from sae_lens_atm.compare.report.results import Role
from sae_lens_atm.data.spelling.model import TOKENS, SpellingLMConfig
from sae_lens_atm.evaluation.first_letters import FirstLetterConfig
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun

TRAINER_FIELDS = (
    "lr",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "lr_end",
    "adam_beta1",
    "adam_beta2",
    "dead_feature_window",
)
"""In which SAEs may differ that are trained on the same activations."""
# What a run is filed under, or reports, without changing what is trained.
_FILING = ("output_path", "checkpoint_path", "logger", "n_checkpoints", "eval_frequency")
_EVALUATION = ("eval_samples", "n_eval_batches", "eval_batch_size_prompts", "run_final_eval")


_LONGEST_NAME = 100


class EntrySettings(BaseModel):
    """One of `architectures`."""

    model_config = ConfigDict(extra="forbid")
    architecture: str = ""
    """A name in SAELens' registry; the entry's own name if left out."""
    role: Role = "baseline"
    l0_knob: str | None = None
    """What sets the L0, where that is not clear."""
    trained: bool = True
    sae: dict[str, Any] = Field(default_factory=dict)
    """Fields of its training config beside those that all share."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Fields of the run that differ from what all share: learning rate, betas, batch size."""


@dataclass(frozen=True)
class Planned:
    """One SAE to train and evaluate."""

    entry: str
    settings: EntrySettings
    l0: float
    seed: int
    knob: Knob
    run: Run
    pool_batches: int | None = None
    lm: SpellingLMConfig | None = None
    """The language model that it is trained on, where that is made here."""
    first_letters: FirstLetterConfig | None = None

    @property
    def model_seed(self) -> int | None:
        return None if self.lm is None else self.lm.seed

    @property
    def seeds(self) -> str:
        return f"seed {self.seed}" if self.lm is None else f"model {self.lm.seed}, seed {self.seed}"

    @property
    def group(self) -> str:
        """The same for SAEs that are trained on the same activations."""
        own = {k: v for k, v in self.settings.run.items() if k not in TRAINER_FIELDS}
        return ", ".join([self.seeds, *(f"{name} {value}" for name, value in own.items())])

    @property
    def label(self) -> str:
        return f"{self.entry}, L0 {self.l0:g}, {self.seeds}"

    @property
    def training_key(self) -> str:
        """Changes with whatever would change the trained SAE."""
        config = _config_of(self.run)
        if self.lm is not None:  # not where it is kept
            config |= {"model_name": asdict(self.lm), "dataset_path": TOKENS}
        # A language model's SAEs train on what follows the tokens that are held out for evaluation.
        moot = _EVALUATION if isinstance(self.run, SyntheticRun) else ("run_final_eval",)
        for name in (*_FILING, *moot):
            config.pop(name, None)
        versions = [version(name) for name in ("sae-lens", "sae-lens-atm")]
        trained = [self.settings.trained, str(self.knob), self.l0, self.pool_batches]
        return hash_of([config, versions, trained])

    @property
    def evaluation_key(self) -> str:
        """Changes with whatever would change its figures."""
        config = _config_of(self.run)
        facts = [self.training_key, {name: config.get(name) for name in _EVALUATION}]
        return hash_of(facts + ([asdict(self.first_letters)] if self.first_letters else []))

    @property
    def data_key(self) -> str:
        """The same for runs that are trained on the same batches."""
        config = _config_of(self.run)
        names = ("hierarchy_model", "synthetic_model", "batch_size", "seed")
        different = min(self.pool_batches or math.inf, self.run.runner.total_training_steps)
        return hash_of([{name: config.get(name) for name in names}, different])

    @property
    def name(self) -> str:
        """A name for files, no other run's."""
        plain = "".join(c if c.isalnum() else "-" for c in self.entry)[:_LONGEST_NAME]
        return f"{plain}-l0-{self.l0:g}-seed-{self.seed}-{self.training_key}"

    @property
    def folder(self) -> str:
        """Where it is kept, under the comparison's folder."""
        return f"runs/{self.name}"


def spelling_lm_folder(output: Path, lm: SpellingLMConfig) -> Path:
    """Where a comparison keeps a language model that it makes."""
    return output / "models" / f"spelling-lm-{lm.seed}-{hash_of(asdict(lm))}"


def _config_of(run: Run) -> dict[str, Any]:
    """All that a run is made from, as plain values."""
    config: dict[str, Any] = dict(run.runner.to_dict())
    config["seed"] = run.seed
    if isinstance(run, SyntheticRun) and run.hierarchy is not None:
        config["hierarchy_model"] = asdict(run.hierarchy)
    return config


def settings_of(planned: Planned) -> dict[str, Any]:
    """What an entry is trained with, but for what differs from run to run (L0, seeds)."""
    config = _config_of(planned.run)
    names = (*TRAINER_FIELDS, *planned.settings.run)
    trainer = {name: config[name] for name in names if name in config}
    differs = ("metadata", None if planned.knob.steered else planned.knob.name)
    sae: dict[str, Any] = {
        name: value
        for name, value in config["sae"].items()
        if name not in differs and not name.endswith("_seed")
    }
    return {"sae": sae, "trainer": trainer, "trained": planned.settings.trained}


def hash_of(value: Any) -> str:
    """A short name of any plain value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def at(planned: Planned, folder: Path) -> Planned:
    """The same, its run kept in a folder."""
    runner: Any = copy(planned.run.runner)  # `replace` would run SAELens' checks on its own results
    runner.output_path, runner.checkpoint_path = str(folder / "sae"), str(folder / "checkpoints")
    if isinstance(planned.run, LanguageModelRun):
        return replace(planned, run=LanguageModelRun(runner, planned.seed))
    return replace(planned, run=replace(planned.run, runner=runner))
