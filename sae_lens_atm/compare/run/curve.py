"""What is seen of a run along the way: its curve, its importance scores, the time of its steps."""

import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities
from torch import Tensor

from sae_lens_atm.compare.plan.l0_target import L0Controller, mean_l0
from sae_lens_atm.compare.report.results import Curve, Importance
from sae_lens_atm.data.synthetic import children_of
from sae_lens_atm.evaluation.synthetic import is_signed
from sae_lens_atm.metrics import Absorption
from sae_lens_atm.metrics.absorption import LEARNED_COSINE
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE

HISTORY = "history.pt"
"""The file of a history, in the checkpoint that it goes with."""
EV_TOLERANCE = 0.005
"""Explained variance that changed by more over the last tenth of training was still moving."""
DEAD_TOLERANCE = 0.02
"""So was a dead count that changed by more than this share of the latents."""


class Probe:
    """Samples held out from training, at which a SAE is looked at again and again."""

    def __init__(self, x: Tensor, features: Tensor | None = None, model: Any = None) -> None:
        self.x = x
        self._features = features
        self._model: SyntheticModel | None = model
        hierarchy = model.hierarchy if model is not None else None
        self._children = children_of(hierarchy) if hierarchy is not None else {}

    @torch.no_grad()
    def look(self, sae: Any) -> dict[str, float]:
        """Explained variance of the SAE, and with a known hierarchy absorption."""
        training = sae.training
        sae.eval()
        acts = sae.encode(self.x).to_dense()
        calculator = ExplainedVarianceCalculator()
        calculator.add_batch(sae.decode(acts), self.x)
        seen = {"explained_variance": calculator.compute()}
        if self._children and self._model is not None and self._features is not None:
            vectors = self._model.feature_dict.feature_vectors
            metric = Absorption(sae.W_dec, vectors, self._children, signed=is_signed(sae))
            metric.update(acts, self._features)
            seen["absorption_fraction"] = metric.compute().fraction
        sae.train(training)
        return seen


class History:
    """Watches one trainer; call `after_step` after every step.

    Args:
        trainer: whose steps are timed from now on.
        points: steps after which the SAE is looked at.
        probe: what it is looked at with; None: the batch of that very step.
        controller: what turns its L0, if anything has to.
    """

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        points: list[int],
        probe: Probe | None,
        controller: L0Controller | None,
    ) -> None:
        self._trainer = trainer
        self._points = set(points)
        self._probe = probe
        self.controller = controller
        self._seen: dict[str, list[float]] = {"steps": []}
        self._importance: list[Tensor] = []
        self._thresholds: list[float] = []
        self._durations: list[float] = []
        self._batch = torch.empty(0)
        self._seconds_before = 0.0
        self._memory_before = peak_resident_mib()
        self.peak_memory_mib = float("nan")
        """Of the training steps alone: the most on a GPU; else what the process grew by up to the
        first look."""
        self._started = time.perf_counter()
        step = trainer.step

        def timed(batch: Tensor) -> TrainStepOutput:
            _wait_for(trainer.sae.device)
            start = time.perf_counter()
            output = step(batch)
            _wait_for(trainer.sae.device)
            self._durations.append(time.perf_counter() - start)
            self._batch = batch
            return output

        trainer.step = timed  # pyright: ignore[reportAttributeAccessIssue]

    def after_step(self, output: TrainStepOutput) -> None:
        """Turn the L0, and look at the SAE where it is time to."""
        if self.controller is not None:
            self.controller.after_step(output)
        step = self._trainer.n_training_steps + 1
        if step not in self._points:
            return
        self._take_memory()
        sae = self._trainer.sae
        probe = self._probe or Probe(self._trainer.activation_scaler(self._batch.to(sae.device)))
        seen = {
            "steps": step,
            **probe.look(sae),
            "l0": mean_l0(output),
            "dead_latents": float(self._trainer.dead_neurons.sum()),
        }
        if self.controller is not None:
            seen["coefficient"] = self.controller.value
        for name, value in seen.items():
            self._seen.setdefault(name, []).append(value)
        if isinstance(sae, ATMTrainingSAE):
            mask = sae.draw_mask()
            self._importance.append(mask.importance.detach().cpu())
            self._thresholds.append(mask.threshold.item())
        if sae.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(sae.device)

    def _take_memory(self) -> None:
        device = self._trainer.sae.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**20
            known = self.peak_memory_mib
            self.peak_memory_mib = peak if math.isnan(known) else max(peak, known)
        elif len(self._seen["steps"]) == 0:
            self.peak_memory_mib = peak_resident_mib() - self._memory_before

    @property
    def step_ms(self) -> float:
        """Median time of a training step."""
        return 1000 * median(self._durations) if self._durations else float("nan")

    @property
    def seconds(self) -> float:
        """Time of the whole training, reading batches and looking at the SAE included."""
        return self._seconds_before + time.perf_counter() - self._started

    def curve(self) -> Curve:
        return Curve.model_validate(self._seen)

    def importance(self, groups: dict[str, list[int]]) -> Importance | None:
        """Quartiles of each group of latents along the way; None for a SAE without importance."""
        if not self._importance:
            return None
        scores = torch.stack(self._importance)
        levels = torch.tensor([0.25, 0.5, 0.75])
        quartiles = {
            name: scores[:, latents].quantile(levels, 1).T.tolist()
            for name, latents in groups.items()
            if latents
        }
        return Importance(
            steps=[int(step) for step in self._seen["steps"]],
            threshold=list[float | None](self._thresholds),
            groups=quartiles,
            latents={name: len(groups[name]) for name in quartiles},
        )

    def save(self, path: Path) -> None:
        """Keep all of it, for a run that will be resumed."""
        state = {
            "seen": self._seen,
            "importance": self._importance,
            "thresholds": self._thresholds,
            "durations": self._durations,
            "seconds": self.seconds,
            "peak_memory_mib": self.peak_memory_mib,
            "controller": self.controller.state_dict() if self.controller else {},
        }
        partial = path.with_name(f".{path.name}.partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self._seen, self._durations = state["seen"], state["durations"]
        self._importance, self._thresholds = state["importance"], state["thresholds"]
        self._seconds_before, self.peak_memory_mib = state["seconds"], state["peak_memory_mib"]
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def still_moving(curve: Curve, d_sae: int, decay_steps: int = 0) -> bool:
    """Whether explained variance or dead latents changed over the last tenth of training.

    Explained variance over the last tenth before the learning rate decays, too: at its end
    everything stands still.
    """
    last = curve.steps[-1]

    def change(values: list[float | None], end: float) -> float:
        seen = [i for i, step in enumerate(curve.steps) if step <= end]
        before = [i for i in seen if curve.steps[i] <= end - 0.1 * last]
        if not before:
            return 0.0
        first, second = values[before[-1]], values[seen[-1]]
        return abs(second - first) if first is not None and second is not None else 0.0

    ends = (last, last - decay_steps)
    return (
        max(change(curve.explained_variance, end) for end in ends) > EV_TOLERANCE
        or change(curve.dead_latents, last) > DEAD_TOLERANCE * d_sae
    )


def curve_points(steps: int, points: int) -> list[int]:
    """Evenly spaced steps, the last one included."""
    return sorted({max(round(steps * i / points), 1) for i in range(1, points + 1)})


def feature_groups(model: SyntheticModel, decoder: Tensor) -> dict[str, list[int]]:
    """The latents of parents and of children: of each feature, the one of cosine above 0.8."""
    if model.hierarchy is None:
        return {}
    children = children_of(model.hierarchy)
    below = {child for members in children.values() for child in members}
    cosine = cosine_similarities(model.feature_dict.feature_vectors.detach(), decoder.detach())
    best = cosine.max(1)
    groups: dict[str, list[int]] = {"roots": [], "parents below a root": [], "last children": []}
    for feature in sorted(children.keys() | below):
        if best.values[feature] > LEARNED_COSINE:
            name = "roots" if feature not in below else "parents below a root"
            name = name if feature in children else "last children"
            groups[name].append(int(best.indices[feature]))
    return groups


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_resident_mib() -> float:
    """The most memory that this process ever held; NaN where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
