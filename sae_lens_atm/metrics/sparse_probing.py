"""K-sparse probing: logistic probes of a few latents, on tasks with two classes.

Split, choice of latents and probes are those of the package sae-probes 0.4.2:

- Half of the rows of each part are of each class. All rows but 100, at most 1024, are for training.
  All others but one are for testing.
- Latents are divided by their mean absolute activation where they fire. The k latents whose means
  on the two classes differ most are probed.
- A probe is scikit-learn's logistic regression with an L1 penalty; for the model's own activations,
  with an L2 penalty. Of ten penalties, the one with the highest AUC on the last training rows is
  used. The probe is then trained again on all training rows.
"""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Labels = NDArray[np.int64]
"""0 or 1 for each row."""
Rows = NDArray[np.int64]
MIN_SAMPLES = 256
"""With fewer rows, sae-probes chooses the penalty in another way."""
_MOST_TRAINING_ROWS, _LEAST_TEST_ROWS, _MOST_VALIDATION_ROWS = 1024, 100, 100
_INVERSE_PENALTIES: list[float] = np.logspace(5, -5, 10).tolist()
_MAX_ITERATIONS = 1000
_SMALL = 1e-6
_RESAMPLES = 2000


class ProbeScores(NamedTuple):
    """Scores of a probe on the test rows."""

    auc: float
    accuracy: float
    f1: float
    """Averaged over the two classes, weighted by their rows."""


class Split(NamedTuple):
    """The rows of a task on which probes are trained and tested."""

    train: Rows
    test: Rows


def split_rows(labels: Labels, most: int | None, seed: int) -> Split:
    """Draw training and test rows, half of them of each class.

    Args:
        labels: the class of each row. Half of the rows must be of each class.
        most: the largest number of rows. None for all.
        seed: seed of the draw.
    """
    size = len(labels) if most is None else min(most, len(labels))
    training = min(size - _LEAST_TEST_ROWS, _MOST_TRAINING_ROWS)
    randomness = np.random.RandomState(seed)  # the generator of sae-probes
    left = [np.flatnonzero(labels == label) for label in (1, 0)]

    def draw(number: int) -> Rows:
        parts: list[Rows] = []
        for i, wanted in enumerate((number - number // 2, number // 2)):
            parts.append(randomness.choice(left[i], size=wanted, replace=False))
            left[i] = np.setdiff1d(left[i], parts[-1])
        return np.concatenate(parts)

    train, test = draw(training), draw(size - training - 1)
    return Split(randomness.permutation(train), randomness.permutation(test))


def latents_by_difference(acts: Tensor, labels: Tensor) -> Tensor:
    """Return all latents, first those whose means on the two classes differ most.

    Args:
        acts: activations, shape ``(rows, d_sae)``.
        labels: 0 or 1, shape ``(rows,)``.
    """
    scale = acts.abs().sum(0) / ((acts != 0).sum(0) + _SMALL)
    acts = acts / (scale + _SMALL)
    difference = acts[labels == 1].mean(0) - acts[labels == 0].mean(0)
    return difference.abs().argsort(descending=True)


def probe_scores(
    train: Tensor,
    train_labels: Labels,
    test: Tensor,
    test_labels: Labels,
    penalty: Literal["l1", "l2"],
    seed: int,
) -> ProbeScores:
    """Train a logistic probe, and return its scores.

    Args:
        train: shape ``(rows, width)``, float32.
        train_labels: 0 or 1 for each row, in random order. The last rows choose the penalty.
        test: shape ``(rows, width)``.
        test_labels: 0 or 1 for each row.
        penalty: of the weights.
        seed: seed of scikit-learn's solver.
    """
    metrics = importlib.import_module("sklearn.metrics")
    x, y = train.numpy(), train_labels
    fitted = len(x) - min(len(x) // 5, _MOST_VALIDATION_ROWS)

    def fit(inverse: float, x: Any, y: Labels) -> Any:
        return _fit(x, y, penalty, inverse, seed)

    def auc(probe: Any, x: Any, y: Labels) -> float:
        return float(metrics.roc_auc_score(y, probe.predict_proba(x)[:, 1]))

    held_out = [
        auc(fit(inverse, x[:fitted], y[:fitted]), x[fitted:], y[fitted:])
        for inverse in _INVERSE_PENALTIES
    ]
    order = np.random.RandomState(seed).permutation(len(x))
    probe = fit(_INVERSE_PENALTIES[int(np.argmax(held_out))], x[order], y[order])
    found = probe.predict(test.numpy())
    return ProbeScores(
        auc(probe, test.numpy(), test_labels),
        float(metrics.accuracy_score(test_labels, found)),
        float(metrics.f1_score(test_labels, found, average="weighted")),
    )


def _fit(x: Any, y: Labels, penalty: str, inverse: float, seed: int) -> Any:
    linear = importlib.import_module("sklearn.linear_model")
    options: dict[str, Any] = {"penalty": "l1", "solver": "saga"} if penalty == "l1" else {}
    probe = linear.LogisticRegression(
        C=inverse, random_state=seed, max_iter=_MAX_ITERATIONS, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged, and `penalty` is deprecated
        return probe.fit(x, y)


def interval_over_tasks(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Return the 95% interval of the mean over resampled tasks, a percentile bootstrap.

    The same seed resamples the same tasks, so that intervals of several SAEs are comparable.
    """
    drawn = np.random.default_rng(seed).choice(np.array(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return float(low), float(high)
