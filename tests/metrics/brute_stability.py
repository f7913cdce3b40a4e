"""Stability by the letter of its definition, every one-to-one matching tried in turn."""

import math
from itertools import permutations


def brute_force(decoder_a, decoder_b, alive_a, alive_b, signed=False):
    rows_a = [row for row, alive in zip(decoder_a.double(), alive_a, strict=True) if alive]
    rows_b = [row for row, alive in zip(decoder_b.double(), alive_b, strict=True) if alive]
    few, many = (rows_a, rows_b) if len(rows_a) <= len(rows_b) else (rows_b, rows_a)
    if not few:
        return math.nan

    def cosine(u, v):
        value = (u @ v / (u.norm() * v.norm())).item()
        return abs(value) if signed else value

    table = [[cosine(u, v) for v in many] for u in few]
    return max(
        sum(table[i][j] for i, j in enumerate(chosen)) / len(few)
        for chosen in permutations(range(len(many)), len(few))
    )
