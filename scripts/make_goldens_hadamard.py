#!/usr/bin/env python3
"""Goldens of Hadamard matrices: scipy.linalg.hadamard where the order is a power of two, Paley's constructions written down
here from their definitions (squares modulo p by brute force) and doubled as Sylvester does.

Writes tests/goldens/hadamard.json: order -> rows as strings of + and -. Needs NumPy and SciPy.
"""
import json
import pathlib

import numpy as np
import scipy.linalg


def character(a, p):
    a %= p
    if a == 0:
        return 0
    return 1 if any(x * x % p == a for x in range(1, p)) else -1


def jacobsthal(p):
    return np.array([[character(i - j, p) for j in range(p)] for i in range(p)])


def paley_one(p):
    s = np.block([[np.zeros((1, 1)), np.ones((1, p))], [-np.ones((p, 1)), jacobsthal(p)]])
    return s + np.eye(p + 1)


def paley_two(p):
    c = np.block([[np.zeros((1, 1)), np.ones((1, p))], [np.ones((p, 1)), jacobsthal(p)]])
    out = np.zeros((2 * p + 2, 2 * p + 2))
    for i in range(p + 1):
        for j in range(p + 1):
            block = c[i, j] * np.array([[1, 1], [1, -1]]) if i != j else np.array([[1, -1], [-1, -1]])
            out[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block
    return out


def doubled(h, times):
    for _ in range(times):
        h = np.block([[h, h], [h, -h]])
    return h


matrices = {
    1: scipy.linalg.hadamard(1),
    2: scipy.linalg.hadamard(2),
    16: scipy.linalg.hadamard(16),
    12: paley_one(11),
    20: paley_one(19),
    28: paley_two(13),
    36: paley_two(17),
    48: doubled(paley_one(11), 2),
    72: doubled(paley_two(17), 1),
}
golden = {}
for order, matrix in matrices.items():
    assert matrix.shape == (order, order) and np.array_equal(matrix @ matrix.T, order * np.eye(order)), order
    golden[str(order)] = ["".join("+" if x > 0 else "-" for x in row) for row in matrix]
path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "hadamard.json"
path.write_text(json.dumps(golden, indent=0) + "\n")
