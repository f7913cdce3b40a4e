"""Stores a model's activations on the tasks of sae-probes. All SAEs of a model and hook share them.

    FOLDER/sae-probes/KEY/TASK.safetensors   activations and labels
    FOLDER/sae-probes/KEY/TASK.json          scores of a probe on the activations

The key is a hash of everything that determines the activations, except the list of tasks. A file is
complete or absent. A damaged one is made again.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sae_lens import LanguageModelSAERunnerConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_atm.data.activation_cache import TASKS_FOLDER
from sae_lens_atm.data.model_identity import model_identity
from sae_lens_atm.data.probing_tasks import choose_tasks, installed_version, read_task
from sae_lens_atm.evaluation.hooked_reading import ModelHook
from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.evaluation.task_activations import last_token_activations
from sae_lens_atm.files import check_writable, hash_of, read_json, saving, turn, write_json
from sae_lens_atm.metrics.sparse_probing import (
    MIN_SAMPLES,
    Labels,
    ProbeScores,
    probe_scores,
    split_rows,
)

_VERSION = 1  # of the files
_CHARACTERS_IN_TOKEN = 4  # about; for the progress alone


@dataclass(frozen=True)
class SaeProbesConfig:
    """Settings for the tasks of sae-probes. The defaults take minutes on a CPU.

    Args:
        tasks: number of tasks, at even distances in the list of sae-probes; or a list of names; or
            "all", which are 113.
        k: numbers of latents that are probed.
        max_samples: the largest number of texts of a task. None is up to 5000, as in sae-probes.
        max_tokens: the model reads at most so many tokens of a text, the last ones. 1024 in
            sae-probes.
        seed: seed of the splits and the probes. 42 in sae-probes.
    """

    tasks: int | list[str] | Literal["all"] = 16
    k: list[int] = field(default_factory=lambda: [1, 5])
    max_samples: int | None = 1500
    max_tokens: int = 128
    seed: int = 42

    def __post_init__(self) -> None:
        if isinstance(self.tasks, int) and self.tasks < 1:
            raise ValueError(f"tasks must be above 0, got {self.tasks}")
        for name in ("tasks", "k"):
            values: Any = getattr(self, name)
            if isinstance(values, list) and not _each_once(values):
                raise ValueError(f"{name} must have at least one value, each once, got {values!r}")
        if min(self.k) < 1:
            raise ValueError(f"k must be above 0, got {self.k!r}")
        if self.max_samples is not None and self.max_samples < MIN_SAMPLES:
            raise ValueError(f"max_samples must be at least {MIN_SAMPLES}, got {self.max_samples}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be above 0, got {self.max_tokens}")


def _each_once(values: Sequence[Any]) -> bool:
    return 0 < len(values) == len(set(values))


class TaskActivations(NamedTuple):
    """A model's activations on the texts of a task, on the CPU."""

    train: Tensor
    """Shape ``(rows, d_in)``."""
    train_labels: Labels
    test: Tensor
    test_labels: Labels


class TaskStore:
    """The activations of a run's model, on disk.

    Args:
        run: model and hook.
        cfg: the settings.
        folder: the activations are in its folder `sae-probes`.
    """

    def __init__(
        self, run: LanguageModelSAERunnerConfig[Any], cfg: SaeProbesConfig, folder: Path
    ) -> None:
        self.tasks = choose_tasks(cfg.tasks)
        self.cfg = cfg
        self._run = run
        settings = [cfg.max_samples, cfg.max_tokens, cfg.seed]
        key = hash_of([model_identity(run), settings, [installed_version(), _VERSION]])
        self._home = folder / TASKS_FOLDER / key

    def missing(self) -> list[str]:
        """Return the tasks that are not stored."""
        return [task for task in self.tasks if not _is_whole(self._file(task))]

    def fill(self, load: Callable[[], Any], on_batch: OnBatch = ignore_batch) -> None:
        """Compute and store what is missing.

        Args:
            load: returns the language model with its tokenizer. It is called only if something is
                missing.
            on_batch: is called before each batch with the characters of text done and all of them,
                and while another process computes the same. It may raise an error to stop.

        Raises:
            SettingsError: the folder cannot be written.
            SaveError: a file cannot be written.
        """
        if not self.missing():
            return
        check_writable("the folder of sae_probes", self._home)
        self._home.mkdir(parents=True, exist_ok=True)
        with turn(self._home / ".lock", lambda: on_batch(0, 1)):
            missing = self.missing()  # another process may have computed it meanwhile
            if missing:
                self._compute(missing, load(), on_batch)

    def _compute(self, tasks: Sequence[str], model: Any, on_batch: OnBatch) -> None:
        texts: dict[str, list[str]] = {}
        labels: dict[str, tuple[Labels, Labels]] = {}
        for name in tasks:
            task = read_task(name)
            train, test = split_rows(task.labels, self.cfg.max_samples, self.cfg.seed)
            texts[name] = [task.texts[row] for row in (*train, *test)]
            labels[name] = task.labels[train], task.labels[test]
        longest = _CHARACTERS_IN_TOKEN * self.cfg.max_tokens
        hook = ModelHook.of(self._run)
        every = sum(min(len(text), longest) for rows in texts.values() for text in rows)
        done = 0
        for name, (train_labels, test_labels) in labels.items():
            rows = texts[name]

            def on_texts(places: Sequence[int], rows: Sequence[str] = rows) -> None:
                nonlocal done
                on_batch(done, every)
                done += sum(min(len(rows[place]), longest) for place in places)

            x = last_token_activations(model, hook, rows, self.cfg.max_tokens, on_texts)
            tensors = {
                "train": x[: len(train_labels)].contiguous(),
                "train_labels": torch.from_numpy(train_labels),
                "test": x[len(train_labels) :].contiguous(),
                "test_labels": torch.from_numpy(test_labels),
            }
            file = self._file(name)
            self._raw_file(name).unlink(missing_ok=True)
            partial = file.with_name(f".{file.name}.partial")
            with saving(self._home):
                save_file(tensors, partial, {"hook_name": self._run.hook_name})
                partial.replace(file)

    def read(self, task: str) -> TaskActivations:
        """Return the stored activations of a task."""
        found = load_file(self._file(task))
        return TaskActivations(
            found["train"],
            found["train_labels"].numpy(),
            found["test"],
            found["test_labels"].numpy(),
        )

    def raw_scores(self, task: str) -> ProbeScores:
        """Return the scores of a probe on the activations themselves. They are stored, too."""
        file = self._raw_file(task)
        with suppress(ValueError, TypeError):  # damaged
            if file.exists():
                return ProbeScores(**read_json(file))
        found = self.read(task)
        parts = found._replace(train=found.train.float(), test=found.test.float())
        write_json(file, probe_scores(*parts, "l2", self.cfg.seed)._asdict())
        return ProbeScores(**read_json(file))  # as rounded in the file

    def _file(self, task: str) -> Path:
        return self._home / f"{task}.safetensors"

    def _raw_file(self, task: str) -> Path:
        return self._home / f"{task}.json"


def _is_whole(file: Path) -> bool:
    """Return whether a file is there, with as many bytes as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
