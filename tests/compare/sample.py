"""Results of a comparison for tests of the report, with all optional parts and some odd values.

The numbers are random. They have the order of magnitude of real ones.
"""

import base64
import io
import math
import random
from statistics import fmean, stdev
from typing import Any

import numpy as np
from PIL import Image

from sae_lens_atm.compare.report.results import (
    Curve,
    Entry,
    Figures,
    Importance,
    PairedTest,
    Parent,
    Point,
    Results,
    Row,
    Run,
    Spread,
    Sweep,
)
from sae_lens_atm.compare.report.summary import make_rows

ODD = "<b>&x"
"""An entry's name that must be escaped."""
L0S = (4.0, 8.0, 12.0)
SEEDS = (0, 1, 2)
STEPS = list(range(0, 9001, 500))

# architecture, role, L0 parameter, how good it is (0 to 1)
_ENTRIES = {
    "atm": ("atm", "candidate", "k", 0.95),
    "topk": ("topk", "baseline", "k", 0.55),
    "batchtopk": ("batchtopk", "baseline", "k", 0.85),
    "jumprelu": ("jumprelu", "baseline", "l0, controlled", 0.75),
    ODD: ("matryoshka_batchtopk", "baseline", "k", 0.8),
    "masking off": ("atm", "control", "k", 0.82),
    "untrained": ("topk", "control", "k", -0.6),
}
_TESTED = {
    "explained_variance": 1,
    "mcc": 1,
    "f1": 1,
    "absorption_fraction": -1,
    "ce_loss_score": 1,
}


def sample(language_model: bool = False, quick: bool = False) -> Results:
    """A comparison on a synthetic hierarchy, or on a language model (no true features)."""
    rng = random.Random(0)
    parents = [] if language_model else _parents(rng)
    runs = [
        _run(rng, name, l0, seed, parents)
        for name in _ENTRIES
        for l0 in L0S
        for seed in SEEDS
        if (name, l0, seed) != ("jumprelu", 12.0, 2)
    ]
    rows = _rows(runs)
    return Results(
        name="sister-a & friends",
        created="2025-11-20T23:40:00+00:00",
        quick=quick,
        versions={"sae-lens-atm": "0.1.0", "sae-lens": "6.54.12", "torch": "2.13.0+cpu"},
        machine={"device": "cpu", "processor": "x86_64, 2 cores", "python": "3.11.7"},
        config={"l0": list(L0S), "seeds": list(SEEDS), "note": "</script><script>alert(1)"},
        entries={
            name: Entry(
                architecture=architecture,
                role=role,
                l0_parameter=parameter,
                settings={
                    "sae": {"d_in": 64, "d_sae": 256},
                    "trainer": {"lr": 1e-3, "dead_feature_window": 200},
                },
            )
            for name, (architecture, role, parameter, _) in _ENTRIES.items()
        },
        runs=runs,
        rows=rows,
        tests=_tests(rng, rows),
        parents=parents,
        failed={"jumprelu, L0 12, seed 2": "RuntimeError: the loss is <nan> at step 4100"},
    )


def _parents(rng: random.Random) -> list[Parent]:
    depths = [0] * 16 + [1] * 24
    rng.shuffle(depths)
    return [
        Parent(feature=3 * i, depth=d, probability=None if i == 7 else rng.uniform(0.01, 0.25))
        for i, d in enumerate(depths)
    ]


def _run(rng: random.Random, name: str, l0: float, seed: int, parents: list[Parent]) -> Run:
    architecture, _, _, skill = _ENTRIES[name]
    untrained = name == "untrained"
    off = 1.12 if (name, l0) == ("jumprelu", 4.0) else rng.uniform(0.99, 1.01)
    figures = _figures(rng, skill, l0, l0 * off, bool(parents), architecture)
    if untrained:
        figures["seconds"] = figures["step_ms"] = figures["absorption_fraction_learned"] = None
    absorbed = max(figures.get("absorption_fraction") or 0.0, 0.0)
    return Run(
        entry=name,
        l0_target=l0,
        seed=seed,
        figures=figures,
        matched=off < 1.05,
        moving=(name, l0, seed) == ("topk", 12.0, 1),
        curve=None if untrained else _curve(rng, figures, name == "jumprelu"),
        importance=_importance(rng) if architecture == "atm" else None,
        absorption_by_parent=[
            None if i == 11 else min(1.0, max(0.0, absorbed * (2 - p.depth) * rng.uniform(0, 2)))
            for i, p in enumerate(parents)
        ],
        cosine_map=_picture(rng, skill) if parents and (l0, seed) == (8.0, 0) else "",
        folder=f"runs/{architecture}-{l0:g}-{seed}",
    )


def _figures(
    rng: random.Random, skill: float, target: float, l0: float, known: bool, architecture: str
) -> Figures:
    def near(value: float, noise: float = 0.008) -> float:
        return value + rng.gauss(0, noise)

    rise = math.log(target / 4) * 0.04
    figures: Figures = {
        "l0": l0,
        "explained_variance": near(0.62 + 0.3 * skill + rise),
        "mse": abs(near(0.2 - 0.15 * skill, 0.004)),
        "dead_latents": float(round(abs(near(40 - 30 * skill, 4)))),
        "evaluated_samples": 50_000,
        "seconds": near(310 if architecture == "atm" else 190, 8),
        "step_ms": near(34 if architecture == "atm" else 21, 1),
        "odd_extra": near(0.5),
    }
    if known:
        figures |= {
            "mcc": near(0.4 + 0.45 * skill - rise),
            "f1": near(0.35 + 0.4 * skill - 1.5 * rise),
            "precision": near(0.4 + 0.4 * skill),
            "recall": near(0.38 + 0.45 * skill),
            "absorption_full": abs(near(0.2 - 0.17 * skill + rise / 2)),
            "absorption_fraction": abs(near(0.28 - 0.2 * skill + rise)),
            "absorption_fraction_learned": abs(near(0.5 - 0.3 * skill)),
            "parents_learned": min(1.0, near(0.6 + 0.4 * skill, 0.02)),
            "children_learned": near(0.3 + 0.5 * skill, 0.02),
            "stability": None if target == 12.0 else near(0.7),
        }
    else:
        figures |= {
            "ce_loss_score": near(0.8 + 0.15 * skill + rise),
            "kl_div_score": near(0.78 + 0.15 * skill + rise),
        }
    return figures


def _curve(rng: random.Random, figures: Figures, controlled: bool) -> Curve:
    def towards(end: float | None, start: float, noise: float) -> list[float | None]:
        last = end or 0.0
        return [
            last + (start - last) * math.exp(-step / 1500) + rng.gauss(0, noise) for step in STEPS
        ]

    absorption = figures.get("absorption_fraction")
    return Curve(
        steps=STEPS,
        explained_variance=towards(figures["explained_variance"], -0.9, 0.004),
        l0=towards(figures["l0"], 90 if controlled else figures["l0"] or 0, 0.02),
        dead_latents=[max(0.0, v or 0) for v in towards(figures["dead_latents"], 0, 1)],
        # The first is None: no parent has a latent yet.
        absorption_fraction=[]
        if absorption is None
        else [None, *[abs(v or 0) for v in towards(absorption, 0.6, 0.01)][1:]],
        coefficient=[0.01] * len(STEPS) if controlled else [],
    )


def _importance(rng: random.Random) -> Importance:
    ends = {"roots": 9.0, "parents below a root": 2.5, "last children": 0.4, "no feature": 0.0}
    return Importance(
        steps=STEPS,
        threshold=[None, *[1 + 0.8 * min(1, s / 4000) for s in STEPS[1:]]],
        groups={
            group: [
                # The group without a feature sinks to 0, which a log axis cannot show.
                [level * 0.6 if level > 0.02 else 0.0, level, level * 1.7]
                for s in STEPS
                for level in [end + (1 - end) * math.exp(-s / 1800) * rng.uniform(0.95, 1.05)]
            ]
            for group, end in ends.items()
        },
        latents={"roots": 16, "parents below a root": 24, "last children": 48, "no feature": 128},
    )


def _picture(rng: random.Random, skill: float) -> str:
    values = np.random.default_rng(rng.randrange(100)).normal(0, 0.12, (96, 96))
    values[np.arange(96), np.arange(96)] += max(skill, 0)
    grey = Image.fromarray((255 * (1 - np.clip(np.abs(values), 0, 1))).astype(np.uint8))
    file = io.BytesIO()
    grey.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _spread(values: list[float | None]) -> Spread:
    known = [v for v in values if v is not None]
    return Spread(
        mean=fmean(known) if known else None,
        sd=stdev(known) if len(known) > 1 else None,
        n=len(known),
    )


def _rows(runs: list[Run]) -> list[Row]:
    rows: list[Row] = []
    for name in _ENTRIES:
        for l0 in L0S:
            group = [run for run in runs if run.entry == name and run.l0_target == l0]
            rows.append(
                Row(
                    entry=name,
                    l0_target=l0,
                    seeds=[run.seed for run in group],
                    matched=all(run.matched for run in group),
                    moving=any(run.moving for run in group),
                    figures={f: _spread([r.figures[f] for r in group]) for f in group[0].figures},
                )
            )
    return rows


def _tests(rng: random.Random, rows: list[Row]) -> list[PairedTest]:
    tests: list[PairedTest] = []
    for l0 in L0S:
        at = {row.entry: row for row in rows if row.l0_target == l0}
        for figure, sign in _TESTED.items():
            means: dict[str, Any] = {
                name: at[name].figures[figure].mean
                for name, (_, role, *_) in _ENTRIES.items()
                if role != "control" and at[name].matched and figure in at[name].figures
            }
            if not means:
                continue
            mine = means.pop("atm")
            baseline = max(means, key=lambda name: sign * means[name])
            tests.append(
                PairedTest(
                    candidate="atm",
                    l0_target=l0,
                    figure=figure,
                    baseline=baseline,
                    difference=mine - means[baseline],
                    better=sign * (mine - means[baseline]) > 0,
                    p=rng.random() ** 3,
                    n=3,
                )
            )
        tests.append(
            PairedTest(
                candidate="atm",
                l0_target=l0,
                figure="stability",
                baseline="topk",
                difference=None if l0 == 12.0 else 0.0,
                better=None,
                p=None,
                n=0 if l0 == 12.0 else 3,
            )
        )
    return tests


def row(entry, mean, matched=True, l0=4.0, figure="mcc"):
    spread = Spread(mean=mean, sd=None, n=1)
    return Row(
        entry=entry,
        l0_target=l0,
        seeds=[0],
        matched=matched,
        moving=False,
        figures={figure: spread},
    )


def entries_of(**roles):
    return {
        name: Entry(architecture=name, role=role, l0_parameter="k", settings={})
        for name, role in roles.items()
    }


def measured_on_words() -> Results:
    """Two entries at L0 4 with intervals over test words: two seeds of atm, one of topk."""

    def run(entry: str, seed: int, fraction: float, l0_words: float) -> Run:
        return Run(
            entry=entry,
            l0_target=4,
            seed=seed,
            figures={"l0": 4.0, "absorption_fraction": fraction, "l0_words": l0_words},
            intervals={
                "absorption_fraction": (fraction - 0.02, fraction + 0.04),
                "l0_words": (l0_words - 0.1, l0_words + 0.1),
            },
            matched=True,
            moving=False,
        )

    runs = [run("atm", 0, 0.1, 4.0), run("atm", 1, 0.2, 4.0), run("topk", 0, 0.3, 3.7)]
    return Results(
        name="words",
        created="2026-01-01",
        versions={},
        machine={},
        config={},
        absorption_metric="SAEBench 0.6.0",
        entries=entries_of(atm="candidate", topk="baseline"),
        runs=runs,
        rows=make_rows(runs, {}),
        tests=[],
    )


def sample_sweep() -> Results:
    """A sweep of two architectures. The entries are points; the last misses its target L0."""
    results = sample()
    points: dict[str, Point] = {}
    for i, name in enumerate(results.entries):
        values = {"lr": 10.0 ** -(1 + i % 4), "k": i, "kind": ODD if i % 2 else "plain"}
        points[name] = Point(entry=ODD if i % 2 else "atm", values=values if i else {"lr": 0.1})
    results.sweep = Sweep(objective="mcc", points=points)
    results.tests = []
    return results
