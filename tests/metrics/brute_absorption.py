"""Absorption by the letter of its definition, one sample and one parent at a time."""

import math

import torch


def brute_force(acts, features, decoder, vectors, children, signed=False):
    n, m = acts.shape
    cosines = (
        torch.nn.functional.normalize(decoder, dim=1)
        @ torch.nn.functional.normalize(vectors, dim=1).T
    )
    closeness = cosines.abs() if signed else cosines
    learned = [bool((closeness[:, f] > 0.8).any()) for f in range(len(vectors))]
    sets = [{s for s in range(n) if acts[s, j] != 0} for j in range(m)]
    truth = [{s for s in range(n) if features[s, f] > 0} for f in range(len(vectors))]

    def overlap(a, b):
        return 2 * len(a & b) / max(len(a) + len(b), 1)

    owner = []
    for j in range(m):
        scores = [overlap(sets[j], truth[f]) for f in range(len(vectors))]
        owner.append(scores.index(max(scores)))

    def below(p):
        return {c for k in children.get(p, ()) for c in {k} | below(k)}

    rows = []
    for p, kids in children.items():
        g = vectors[p] / vectors[p].norm()
        positive = [s for s in range(n) if features[s, p] > 0]
        if not positive:
            continue

        allowed = [j for j in range(m) if owner[j] not in below(p)]
        main, score = [], 0.0
        while True:
            options = [
                (overlap(set().union(*(sets[i] for i in [*main, j])), truth[p]), closeness[j, p], j)
                for j in allowed
                if j not in main
            ]
            best = max(options, default=(0.0, 0.0, 0))
            if not best[0] > score + (0.03 if main else 0.0):
                break
            main.append(best[2])
            score = best[0]

        full, fraction, hit = {}, {}, {}
        for s in positive:
            t = (features[s, p] * vectors[p].norm()).item()
            contribution = [(acts[s, j] * (decoder[j] @ g)).item() for j in range(m)]
            written = [acts[s, j].item() * decoder[j] for j in range(m)]
            cosine = [torch.nn.functional.normalize(w, dim=0) @ g for w in written]
            main_part = sum(contribution[j] for j in main)
            others = [j for j in range(m) if j not in main and contribution[j] > 0]
            strong = sorted((contribution[j] for j in others if cosine[j] >= 0.1), reverse=True)
            absorbed = sum(strong[:3])
            if main_part >= t or absorbed < 0.4 * t:
                fraction[s] = 0.0
            elif main_part <= 0:
                fraction[s] = 1.0
            else:
                a = min(absorbed, t - main_part)
                fraction[s] = a / (a + main_part)
            hit[s] = float(any(acts[s, j] != 0 for j in main))
            largest = max((contribution[j] for j in others if cosine[j] >= 0.025), default=0.0)
            full[s] = float(not hit[s] and largest >= 0.4 * t)

        def mean(values, where):
            chosen = [v for s, v in values.items() if where(s)]
            return sum(chosen) / len(chosen) if chosen else math.nan

        def any_child(s, kids=kids):
            return any(features[s, k] > 0 for k in kids)

        def any_learned(s, kids=kids):
            return any(features[s, k] > 0 and learned[k] for k in kids)

        rows.append(
            {
                "full": mean(full, lambda _: True),
                "fraction": mean(fraction, lambda _: True),
                "recall_gap": mean(hit, lambda s: not any_child(s)) - mean(hit, any_child),
                "full_learned": mean(full, any_learned),
                "fraction_learned": mean(fraction, any_learned),
            }
        )
    result = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        result[name] = sum(values) / len(values) if values else math.nan
    return result
