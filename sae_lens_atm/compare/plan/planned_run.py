"""The plan of one SAE in a comparison: its settings and its folder."""

import math
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sae_lens_atm.compare.plan.l0_target import L0Parameter
from sae_lens_atm.compare.report.results import FOUND_LEVEL, Role
from sae_lens_atm.data.model_identity import source_identity
from sae_lens_atm.data.spelling.model import TOKENS, SpellingLMConfig
from sae_lens_atm.evaluation.contrastive_stories import ContrastiveStoriesConfig
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.evaluation.task_store import SaeProbesConfig
from sae_lens_atm.files import hash_of
from sae_lens_atm.training.checkpoints import run_config
from sae_lens_atm.training.run_file import Run, SyntheticRun

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
"""Fields that may differ between SAEs that are trained on the same activations."""
# Fields that change neither the trained SAE nor its figures: paths, logging, checkpoints.
_STORAGE_FIELDS = ("output_path", "checkpoint_path", "logger", "n_checkpoints", "eval_frequency")
_EVALUATION_FIELDS = ("eval_samples", "n_eval_batches", "eval_batch_size_prompts", "run_final_eval")
_LONGEST_NAME = 100


class EntrySettings(BaseModel):
    """One value of `architectures` in a comparison file."""

    model_config = ConfigDict(extra="forbid")
    architecture: str = ""
    """Name in SAELens' registry. The default is the entry's own name."""
    role: Role = "baseline"
    l0_parameter: str | None = None
    """Parameter that sets the L0, where the architecture leaves a choice."""
    trained: bool = True
    sae: dict[str, Any] = Field(default_factory=dict)
    """Fields of the SAE's training config, on top of the shared ones."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Fields of the run that differ from the shared ones: learning rate, betas, batch size."""


@dataclass(frozen=True)
class PlannedRun:
    """One SAE to train and evaluate."""

    entry: str
    settings: EntrySettings
    l0: float
    seed: int
    l0_parameter: L0Parameter
    run: Run
    pool_batches: int | None = None
    lm: SpellingLMConfig | None = None
    """The language model that the comparison makes and the SAE is trained on, if there is one."""
    first_letters: FirstLetterConfig | None = None
    sae_probes: SaeProbesConfig | None = None
    contrastive_stories: ContrastiveStoriesConfig | None = None
    is_found: bool = False
    """Whether the L0 is the one that the search found for this entry."""

    @property
    def level(self) -> float:
        """The L0 under which results are shown together: `FOUND_LEVEL`, or the target L0."""
        return FOUND_LEVEL if self.is_found else self.l0

    @property
    def model_seed(self) -> int | None:
        """Seed of the language model that the comparison makes, if there is one."""
        return None if self.lm is None else self.lm.seed

    @property
    def seeds(self) -> str:
        """The seeds of the language model and of the SAE, as text."""
        return f"seed {self.seed}" if self.lm is None else f"model {self.lm.seed}, seed {self.seed}"

    @property
    def group(self) -> str:
        """Name of the group of SAEs that are trained on the same activations."""
        own = {k: v for k, v in self.settings.run.items() if k not in TRAINER_FIELDS}
        return ", ".join([self.seeds, *(f"{name} {value}" for name, value in own.items())])

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.entry}, L0 {self.l0:g}, {self.seeds}"

    @cached_property
    def training_key(self) -> str:
        """Hash of everything that affects the trained SAE."""
        config = _with_content_of_paths(run_config(self.run))
        if self.lm is not None:  # the config of the model, not its path
            config |= {"model_name": asdict(self.lm), "dataset_path": TOKENS}
        # On a language model, training starts after the tokens that are held out for evaluation.
        # Their number therefore affects the SAE.
        synthetic = isinstance(self.run, SyntheticRun)
        ignored = _EVALUATION_FIELDS if synthetic else ("run_final_eval",)
        for name in (*_STORAGE_FIELDS, *ignored):
            config.pop(name, None)
        versions = [version(name) for name in ("sae-lens", "sae-lens-atm")]
        target = [self.settings.trained, str(self.l0_parameter), self.l0, self.pool_batches]
        cached = getattr(self.run, "activations", None)
        target += [] if cached is None else [cached.tokens, cached.dtype]
        return hash_of([config, versions, target])

    @property
    def evaluation_key(self) -> str:
        """Hash of everything that affects the figures."""
        config = run_config(self.run)
        values = [self.training_key, {name: config.get(name) for name in _EVALUATION_FIELDS}]
        optional = (self.first_letters, self.sae_probes, self.contrastive_stories)
        measured = [asdict(cfg) for cfg in optional if cfg is not None]
        return hash_of(values + measured)

    @property
    def data_key(self) -> str:
        """Hash of everything that affects the training batches."""
        config = _with_content_of_paths(run_config(self.run))
        names = ("hierarchy_model", "synthetic_model", "batch_size", "seed")
        different = min(self.pool_batches or math.inf, self.run.runner.total_training_steps)
        return hash_of([{name: config.get(name) for name in names}, different])

    @property
    def name(self) -> str:
        """Unique name of the run's folder."""
        plain = "".join(c if c.isalnum() else "-" for c in self.entry)[:_LONGEST_NAME]
        return f"{plain}-l0-{self.l0:g}-seed-{self.seed}-{self.training_key}"

    @property
    def folder(self) -> str:
        """Folder of the run, relative to the comparison's folder."""
        return f"runs/{self.name}"


def _with_content_of_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the fingerprints of local data in place of their paths."""
    sources = ("model_name", "dataset_path", "synthetic_model")
    paths = {name: config[name] for name in sources if isinstance(config.get(name), str)}
    return config | {name: source_identity(path) for name, path in paths.items()}


def spelling_lm_folder(output: Path, lm: SpellingLMConfig) -> Path:
    """Return the folder of a language model that a comparison makes."""
    return output / "models" / f"spelling-lm-{lm.seed}-{hash_of(asdict(lm))}"


def settings_of(planned: PlannedRun) -> dict[str, Any]:
    """Return the training settings of an entry, without those that differ between its runs."""
    config = run_config(planned.run)
    names = (*TRAINER_FIELDS, *planned.settings.run)
    trainer = {name: config[name] for name in names if name in config}
    parameter = planned.l0_parameter
    differs = ("metadata", None if parameter.controlled else parameter.name)
    sae: dict[str, Any] = {
        name: value
        for name, value in config["sae"].items()
        if name not in differs and not name.endswith("_seed")
    }
    return {"sae": sae, "trainer": trainer, "trained": planned.settings.trained}


def stored_in(planned: PlannedRun, folder: Path) -> PlannedRun:
    """Return the plan with the SAE and its checkpoints in another folder."""
    runner: Any = copy(planned.run.runner)  # `replace` would repeat SAELens' checks
    runner.output_path, runner.checkpoint_path = str(folder / "sae"), str(folder / "checkpoints")
    return replace(planned, run=replace(planned.run, runner=runner))
