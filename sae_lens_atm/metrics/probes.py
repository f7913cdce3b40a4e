"""Linear probes: SAEBench's one-against-rest probes, and logistic regressions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_NEWTON_STEPS = 50


class Words(NamedTuple):
    """Vectors of words: inputs of an SAE, or its activations."""

    x: Tensor
    """The vectors, shape ``(words, width)``."""
    letter: Tensor
    """First letters, 0 to 25, shape ``(words,)``."""


class Probe(NamedTuple):
    """Linear probes, one for each letter or other class."""

    weight: Tensor
    """Shape ``(probes, width)``."""
    bias: Tensor

    def score(self, x: Tensor) -> Tensor:
        """Return the scores, shape ``(rows, probes)``; a positive score predicts the class."""
        return x @ self.weight.T + self.bias


def train_probes(
    x: Tensor,
    target: Tensor,
    generator: torch.Generator,
    *,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-2,
    weight_decay: float = 1e-4,
    l1: float = 0.0,
) -> Probe:
    """Train SAEBench's probes: logistic, for one target each.

    The loss is averaged over probes, and the weight decay is not. Positives are weighted by
    negatives over positives. Adam's learning rate decays to 1e-5.

    Args:
        x: shape ``(rows, width)``.
        target: 1 where a probe should be positive, else 0, shape ``(rows, probes)``.
        generator: draws the first weights and the batches, on the CPU.
        epochs: number of passes over the rows.
        batch_size: rows of a batch.
        lr: the first learning rate.
        weight_decay: Adam's, of weights and biases.
        l1: weight of the absolute weights, summed for each probe and averaged over probes.
    """
    target, probes = target.to(x.dtype), target.shape[1]
    positives = target.sum(0)
    rarity = (len(x) - positives) / positives.clamp(min=1)
    bound = 1 / math.sqrt(x.shape[1])  # as torch.nn.Linear starts
    probe = Probe(
        torch.empty(probes, x.shape[1]).uniform_(-bound, bound, generator=generator).to(x),
        torch.empty(probes).uniform_(-bound, bound, generator=generator).to(x),
    )
    for parameter in probe:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam([*probe], lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-5 / lr) ** (1 / epochs))
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(batch_size):
                loss = functional.binary_cross_entropy_with_logits(
                    probe.score(x[batch]), target[batch], pos_weight=rarity
                )
                if l1:
                    loss = loss + l1 * probe.weight.abs().sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
    return Probe(*(parameter.detach() for parameter in probe))


def f1_scores(predicted: Tensor, true: Tensor) -> Tensor:
    """Return F1 along the first dimension; 0 without any positive."""
    hits = (predicted & true).sum(0).double()
    return 2 * hits / (predicted.sum(0) + true.sum(0)).clamp(min=1)


def nested_logistic(x: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Fit logistic regressions on the first column, on the first two columns, and so on.

    Each minimises ``|w|^2 / 2 + sum_i s_i log(1 + exp(-y_i (<w, x_i> + b)))`` by Newton's method.
    The weights ``s_i`` balance the two classes, as scikit-learn's `class_weight="balanced"`.

    Args:
        x: shape ``(words, k)``.
        true: bool, shape ``(words,)``; both values must occur.

    Returns:
        Weights, shape ``(k, k)``, and biases, shape ``(k,)``. Row ``i`` of the weights belongs to
        the regression on the first ``i + 1`` columns and is 0 in the others.
    """
    size = x.shape[1]
    x = torch.cat([x.double(), torch.ones_like(x[:, :1], dtype=torch.float64)], 1)
    used = torch.ones(size, size, dtype=torch.float64, device=x.device).tril()
    used = functional.pad(used, (0, 1), value=1.0)  # the bias
    ridge = functional.pad(torch.ones(size, dtype=torch.float64, device=x.device), (0, 1))
    share = true.double().mean()
    weight = torch.where(true, 0.5 / share, 0.5 / (1 - share))
    sign = torch.where(true, 1.0, -1.0).double()

    def loss(w: Tensor) -> Tensor:
        misfit = functional.softplus(-sign[:, None] * (x @ w.T))
        return (w.square() * ridge).sum(-1) / 2 + (weight[:, None] * misfit).sum(0)

    w = torch.zeros(size, size + 1, dtype=torch.float64, device=x.device)
    for _ in range(_NEWTON_STEPS):
        p = (x @ w.T).sigmoid()
        gradient = ((weight[:, None] * (p - true[:, None].double())).T @ x + w * ridge) * used
        curvature = weight[:, None] * p * (1 - p)
        hessian = torch.einsum("nk,ni,nj->kij", curvature, x, x) * used[:, None] * used[:, :, None]
        # Unused weights stay at 0. A saturated regression may have no curvature.
        hessian = hessian + torch.diag_embed(torch.maximum(ridge, 1 - used) + 1e-9)
        step = torch.linalg.solve(hessian, gradient)
        before, length = loss(w), torch.ones_like(w[:, :1])
        for _ in range(20):
            worse = loss(w - length * step) > before
            if not worse.any():
                break
            length = torch.where(worse[:, None], length / 2, length)
        w = w - length * step
        if step.abs().max() < 1e-8:
            break
    return w[:, :-1], w[:, -1]
