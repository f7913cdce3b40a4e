"""The demo: ATM and SAELens' TopK side by side on a small hierarchy, with a picture."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import cosine_similarities, temporary_seed
from torch import Tensor

from sae_lens_atm.evaluation import evaluate, measure_absorption, to_json
from sae_lens_atm.sae import ATMTrainingSAE
from sae_lens_atm.settings import SyntheticRun, load_run, shipped_config
from sae_lens_atm.synthetic import children_of
from sae_lens_atm.train import build_synthetic_model
from sae_lens_atm.watch import OnStep

SCHEMA_VERSION = 1
HOOK = "synthetic"  # SAELens' multi-SAE trainer routes batches by hook; there is one here
# Quick enough for a test, and only for that: nothing is learned in so few steps.
QUICK = (
    "training_samples=204800",
    "lr_decay_steps=60",
    "eval_samples=4000",
    "sae.c_ramp_steps=200",
)
_SNAPSHOTS = 12
_SNAPSHOT_SAMPLES = 4000


@dataclass
class History:
    """What was seen along the way, one entry a snapshot."""

    steps: list[int] = field(default_factory=list[int])
    importance: list[Tensor] = field(default_factory=list[Tensor])
    threshold: list[float] = field(default_factory=list[float])
    absorption: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


@dataclass
class DemoResult:
    """Figures of both SAEs, and the files that were written."""

    figures: dict[str, dict[str, float]]
    files: list[Path]


def demo_steps(quick: bool = False) -> int:
    """Training steps of the demo."""
    return _load_run(quick).runner.total_training_steps


def _load_run(quick: bool) -> SyntheticRun:
    run = load_run(shipped_config("demo"), QUICK if quick else ())
    assert isinstance(run, SyntheticRun)
    return run


def run_demo(output: Path, quick: bool = False, on_step: OnStep | None = None) -> DemoResult:
    """Train, evaluate, and write the SAEs, `results.json` and `importance.png`."""
    run = _load_run(quick)
    cfg = run.runner
    assert run.hierarchy is not None
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that it is not in vain
    model = build_synthetic_model(run)
    with temporary_seed(run.seed):
        saes: dict[str, TrainingSAE[Any]] = {
            "atm": TrainingSAE[Any].from_dict(cfg.sae.to_dict()),
            "topk": TrainingSAE[Any].from_dict(_topk_beside(cfg.sae).to_dict()),
        }
        history = History(absorption={name: [] for name in saes})
        trainer_cfg = cfg.to_sae_trainer_config()
        trainer_cfg.checkpoint_path = None
        trainer = MultiSAETrainer(
            trainer_cfg,
            saes,
            dict.fromkeys(saes, HOOK),
            _batches(model, saes, history, cfg.batch_size, trainer_cfg.total_training_steps),
        )
        _call_after_each_step(trainer, on_step)
        trainer.fit()
        _snapshot(model, saes, history, trainer.n_training_steps)

    figures: dict[str, dict[str, float]] = {}
    files: list[Path] = []
    for name, sae in saes.items():
        sae.save_inference_model(output / name)
        files.append(output / name)
        # What is measured is what a user will load, not what is in memory.
        saved = SAE[Any].load_from_disk(output / name)
        figures[name] = evaluate(saved, model, cfg.eval_samples, run.seed + 1, cfg.batch_size)

    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "seed": run.seed,
        "quick": quick,
        "versions": {name: version(name) for name in ("sae-lens-atm", "sae-lens", "torch")},
        "python": platform.python_version(),
        "config": {**cfg.to_dict(), "hierarchy_model": asdict(run.hierarchy)},
        "figures": figures,
        "history": {"steps": history.steps, "absorption_fraction_learned": history.absorption},
    }
    results_path = output / "results.json"
    results_path.write_text(to_json(results), encoding="utf-8")
    picture_path = output / "importance.png"
    draw_picture(picture_path, history, feature_groups(model, saes["atm"].W_dec))
    return DemoResult(figures, [*files, results_path, picture_path])


def _topk_beside(cfg: Any) -> TopKTrainingSAEConfig:
    return TopKTrainingSAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, k=int(cfg.k), device=cfg.device)


def _batches(
    model: SyntheticModel,
    saes: dict[str, TrainingSAE[Any]],
    history: History,
    batch_size: int,
    steps: int,
) -> Iterator[dict[str, Tensor]]:
    for step in range(steps):
        if step % max(steps // _SNAPSHOTS, 1) == 0:
            _snapshot(model, saes, history, step)
        yield {HOOK: model.sample(batch_size)}


def _snapshot(
    model: SyntheticModel, saes: dict[str, TrainingSAE[Any]], history: History, step: int
) -> None:
    atm = saes["atm"]
    assert isinstance(atm, ATMTrainingSAE)
    mask = atm.draw_mask(1)
    history.steps.append(step)
    history.importance.append(mask.importance)
    history.threshold.append(mask.threshold.item())
    with temporary_seed(step):
        for name, sae in saes.items():
            scores = measure_absorption(sae, model, _SNAPSHOT_SAMPLES)
            assert scores is not None
            history.absorption[name].append(scores.fraction_learned)


def _call_after_each_step(trainer: MultiSAETrainer, on_step: OnStep | None) -> None:
    atm = trainer.trainers["atm"]
    step = atm.step

    def watched(batch: Tensor) -> Any:
        output = step(batch)
        if on_step is not None:
            on_step(atm, output)
        return output

    atm.step = watched  # pyright: ignore[reportAttributeAccessIssue]


def feature_groups(model: SyntheticModel, decoder: Tensor) -> dict[str, list[int]]:
    """The latents of parents and of children: of each feature, the one of cosine above 0.8."""
    assert model.hierarchy is not None
    children = children_of(model.hierarchy)
    below = {child for members in children.values() for child in members}
    cosine = cosine_similarities(model.feature_dict.feature_vectors.detach(), decoder.detach())
    best = cosine.max(1)
    groups: dict[str, list[int]] = {"roots": [], "parents below a root": [], "last children": []}
    for feature in sorted(children.keys() | below):
        if best.values[feature] > 0.8:
            name = "roots" if feature not in below else "parents below a root"
            name = name if feature in children else "last children"
            groups[name].append(int(best.indices[feature]))
    return groups


def draw_picture(path: Path, history: History, groups: dict[str, list[int]]) -> None:
    """Importance of parents and children over training, absorption beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    importance = torch.stack(history.importance)
    colours = ("#1f5fa8", "#4b9fd5", "#e07b39")
    for (name, latents), colour in zip(groups.items(), colours, strict=True):
        if latents:
            low, middle, high = importance[:, latents].quantile(torch.tensor([0.25, 0.5, 0.75]), 1)
            left.plot(history.steps, middle, color=colour, label=f"{name} ({len(latents)} latents)")
            left.fill_between(history.steps, low, high, color=colour, alpha=0.2, linewidth=0)
    left.plot(history.steps, history.threshold, "--", color="#444", label=r"threshold $\theta_t$")
    left.set(xlabel="training step", ylabel="importance (median, quartiles)")
    left.set(yscale="log", ylim=(0.01, 60))
    left.set_title("Latents below the threshold are masked now and then")
    left.legend(frameon=False, loc="upper center", ncols=2, fontsize="small")

    styles = {"atm": ("ATM", "#1f5fa8"), "topk": ("TopK", "#b3302f")}
    for name, values in history.absorption.items():
        label, colour = styles[name]
        right.plot(history.steps, values, color=colour, label=label)
    right.set(xlabel="training step", ylabel="absorbed fraction of the parent", ylim=(0, None))
    right.set_title("Absorption beside a learned child (lower is better)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
