"""The curve of a run: figures and times recorded at some of its training steps."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.synthetic import SyntheticModel
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import cosine_similarities
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.report.results import Curve, Importance
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.data.synthetic import children_of
from sae_lens_atm.evaluation.synthetic import bits_saved_by, decoder_of_activations, is_signed
from sae_lens_atm.metrics import Absorption, decoder_cosine
from sae_lens_atm.metrics.absorption import LEARNED_COSINE
from sae_lens_atm.sae.forward_pass import mean_l0
from sae_lens_atm.training.hooks import StepTimer
from sae_lens_atm.training.latent_history import LatentHistory
from sae_lens_atm.training.supervise import Hook, Step

HISTORY = "history.pt"
"""The recorder's file in a checkpoint."""
ALIVE_WINDOW = 100
"""Steps in which a latent must fire to count in `decoder_cosine` of a curve."""
EV_TOLERANCE = 0.005
"""Largest change of explained variance in the last tenth of training that counts as converged."""
DEAD_TOLERANCE = 0.02
"""The same for the share of dead latents."""
HELD_OUT_SAMPLES = 2048
"""Number of samples on which the curves are measured."""


class HeldOutBatch:
    """Samples on which an SAE is evaluated during training. It is not trained on them.

    Args:
        x: inputs, shape ``(samples, d_in)``.
        features: the true features of a synthetic model, shape ``(samples, features)``.
        model: that synthetic model.
    """

    def __init__(self, x: Tensor, features: Tensor | None = None, model: Any = None) -> None:
        self.x = x
        self._features = features
        self._model: SyntheticModel | None = model
        hierarchy = model.hierarchy if model is not None else None
        self._children = children_of(hierarchy) if hierarchy is not None else {}

    @torch.no_grad()
    def evaluate(self, sae: Any, scaler: ActivationScaler) -> dict[str, float]:
        """Return explained variance, saved bits and, if the true hierarchy is known, absorption.

        Args:
            sae: the SAE, in training.
            scaler: scales the samples as those of training. Whitened, they have other directions
                than the features, and absorption is left out.
        """
        training, x = sae.training, scaler(self.x)
        sae.eval()
        acts = sae.encode(x).to_dense()
        calculator = ExplainedVarianceCalculator()
        calculator.add_batch(sae.decode(acts), x)
        figures = {"explained_variance": calculator.compute()}
        if sae.cfg.reshape_activations == "none":
            figures["saved_bits"] = bits_saved_by(sae, x, acts)
        if self._model is not None and self._features is not None and self._has_truth(scaler):
            vectors = self._model.feature_dict.feature_vectors
            decoder, signed = decoder_of_activations(sae), is_signed(sae)
            metric = Absorption(decoder, vectors, self._children, signed=signed)
            metric.update(acts, self._features * (scaler.scaling_factor or 1.0))
            figures["absorption_fraction"] = metric.compute().fraction
        sae.train(training)
        return figures

    def _has_truth(self, scaler: ActivationScaler) -> bool:
        return bool(self._children) and scaler.whitening is None


class CurveRecorder(Hook):
    """Records figures at some steps of a training."""

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        points: list[int],
        timer: StepTimer,
        held_out: HeldOutBatch | None = None,
        controller: L0Controller | None = None,
    ) -> None:
        """
        Args:
            trainer: the trainer to observe.
            points: numbers of steps after which the SAE is evaluated.
            timer: measures the steps. Checkpoints hold its measurements.
            held_out: the samples to evaluate on. None takes the batch of the step.
            controller: controls the L0, if the run needs one. It comes before this hook.
        """
        self._trainer, self._points = trainer, set(points)
        self._timer, self._held_out, self._controller = timer, held_out, controller
        self._curve: dict[str, list[float]] = {"steps": []}
        self._batch = torch.empty(0)
        self._seconds_before = 0.0
        self._memory_before = peak_resident_mib()
        self.peak_memory_mib = float("nan")
        """Peak memory of the training steps. On a CPU it is the growth of the process up to the
        first recorded step."""
        self._started = time.perf_counter()

    @override
    def wrap_step(self, step: Step) -> Step:
        def step_and_keep_batch(batch: Tensor) -> TrainStepOutput:
            self._batch = batch
            return step(batch)

        return step_and_keep_batch

    @override
    def after_step(self, output: TrainStepOutput) -> None:
        step = self._trainer.n_training_steps + 1
        if step not in self._points:
            return
        self._measure_memory()
        sae = self._trainer.sae
        held_out = self._held_out
        if held_out is None:
            held_out = HeldOutBatch(self._batch.to(sae.device))
        figures = {
            "steps": step,
            **held_out.evaluate(sae, self._trainer.activation_scaler),
            "l0": float(mean_l0(output.feature_acts)),
            "dead_latents": float(self._trainer.dead_neurons.sum()),
            "decoder_cosine": decoder_cosine(sae.W_dec, self._fired_lately()),
        }
        if self._controller is not None:
            figures["coefficient"] = self._controller.value
        for name, value in figures.items():
            self._curve.setdefault(name, []).append(value)
        if sae.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(sae.device)

    def _fired_lately(self) -> Tensor:
        return self._trainer.n_forward_passes_since_fired < ALIVE_WINDOW

    def _measure_memory(self) -> None:
        device = self._trainer.sae.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**20
            before = self.peak_memory_mib
            self.peak_memory_mib = peak if math.isnan(before) else max(peak, before)
        elif len(self._curve["steps"]) == 0:
            self.peak_memory_mib = peak_resident_mib() - self._memory_before

    @property
    def step_ms(self) -> float:
        """Median time of a training step, in milliseconds."""
        return self._timer.median_ms

    @property
    def seconds(self) -> float:
        """Time of the whole training, in seconds, with reading batches and evaluating."""
        return self._seconds_before + time.perf_counter() - self._started

    def curve(self) -> Curve:
        """Return the figures at the recorded steps."""
        return Curve.model_validate(self._curve)

    @override
    def on_checkpoint(self, folder: Path) -> None:
        state = {
            "seen": self._curve,
            "durations": self._timer.seconds,
            "seconds": self.seconds,
            "peak_memory_mib": self.peak_memory_mib,
            "controller": self._controller.state_dict() if self._controller else {},
        }
        torch.save(state, folder / HISTORY)

    def load(self, folder: Path) -> None:
        """Restore the state of recorder, timer and controller from a checkpoint."""
        state = torch.load(folder / HISTORY, weights_only=True)
        self._curve, self._timer.seconds = state["seen"], state["durations"]
        self._seconds_before, self.peak_memory_mib = state["seconds"], state["peak_memory_mib"]
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])


def importance_of_groups(latents: LatentHistory, groups: dict[str, list[int]]) -> Importance | None:
    """Return the quartiles of importance of groups of latents, at the recorded steps.

    Args:
        latents: what was recorded.
        groups: names and latents. Empty groups are left out.

    Returns:
        None for an SAE without importance.
    """
    if not latents.steps:
        return None
    scores, levels = latents.importance, torch.tensor([0.25, 0.5, 0.75])
    quartiles = {
        name: scores[:, members].quantile(levels, 1).T.tolist()
        for name, members in groups.items()
        if members
    }
    return Importance(
        steps=latents.steps,
        threshold=list[float | None](latents.thresholds),
        groups=quartiles,
        latents={name: len(groups[name]) for name in quartiles},
    )


def curve_facts(planned: PlannedRun) -> dict[str, str]:
    """Return what `training.html` of a run says above the curves."""
    return {"run": planned.label, "architecture": planned.run.runner.sae.architecture()}


def still_moving(curve: Curve, d_sae: int, decay_steps: int = 0) -> bool:
    """Return whether explained variance or dead latents changed in the last tenth of training.

    Explained variance is also compared over the last tenth before the learning rate decays, since
    nothing changes at the end of the decay.

    Args:
        curve: the curve of the run.
        d_sae: number of latents.
        decay_steps: number of steps at the end in which the learning rate decays.
    """
    last = curve.steps[-1]

    def change(values: list[float | None], end: float) -> float:
        up_to_end = [i for i, step in enumerate(curve.steps) if step <= end]
        before = [i for i in up_to_end if curve.steps[i] <= end - 0.1 * last]
        if not before:
            return 0.0
        first, second = values[before[-1]], values[up_to_end[-1]]
        return abs(second - first) if first is not None and second is not None else 0.0

    ends = (last, last - decay_steps)
    return (
        max(change(curve.explained_variance, end) for end in ends) > EV_TOLERANCE
        or change(curve.dead_latents, last) > DEAD_TOLERANCE * d_sae
    )


def feature_groups(model: SyntheticModel, decoder: Tensor) -> dict[str, list[int]]:
    """Return the latents of roots, parents and last children, by name of the group.

    The latent of a feature is the one with the largest cosine, if that is above LEARNED_COSINE.
    """
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


def peak_resident_mib() -> float:
    """Return the peak memory of this process in MiB, or NaN on systems that do not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
