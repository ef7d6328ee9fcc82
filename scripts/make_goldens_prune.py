#!/usr/bin/env python3
"""Goldens of unstructured pruning from a plain NumPy implementation: Wanda, SparseGPT, the least-squares refit of a mask.

Writes tests/goldens/prune.json. Needs NumPy. SparseGPT is the published algorithm in its textbook order, in float64: inverse of
the whole damped Hessian, Cholesky factor of the inverse, one column at a time over all rows, no lazy updates. That differs on
purpose from the factorization and the blocked sweep of kompakt. The refit solves a general least-squares problem in the inputs
instead of normal equations in the Hessian.
"""
import json
import pathlib

import numpy as np


def keep_best(scores, keep):
    """True for the `keep` largest of a vector; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = np.zeros(len(scores), bool)
    mask[order[:keep]] = True
    return mask


def wanda(weight, square, sparsity, n, m):
    scores = np.abs(weight) * np.sqrt(square)
    mask = np.zeros(weight.shape, bool)
    for r, row in enumerate(scores):
        if m:
            for g in range(0, len(row), m):
                mask[r, g : g + m] = keep_best(row[g : g + m], n)
        else:
            mask[r] = keep_best(row, len(row) - int(np.floor(sparsity * len(row))))
    return mask


def sparsegpt(weight, hessian, sparsity, n, m, block, damping):
    rows, columns = weight.shape
    w = weight.copy()
    h = hessian.copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * np.mean(np.diag(h)) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.ones(weight.shape, bool)
    loss = 0.0
    for j in range(columns):
        if not m and j % block == 0:
            end = min(columns, j + block)
            scores = (w[:, j:end] / np.diag(upper)[j:end]) ** 2
            lost = int(np.floor(sparsity * scores.size))
            mask[:, j:end] = keep_best(scores.ravel(), scores.size - lost).reshape(scores.shape)
        if m and j % m == 0:
            for r in range(rows):
                mask[r, j : j + m] = keep_best((w[r, j : j + m] / np.diag(upper)[j : j + m]) ** 2, n)
        q = np.where(mask[:, j], w[:, j], 0)
        e = (w[:, j] - q) / upper[j, j]
        loss += (e**2).sum()
        w[:, j:] -= np.outer(e, upper[j, j:])
        w[:, j] = q
    return w, mask, loss


def refit(weight, mask, inputs, hessian, damping):
    """min |X (v - w)|^2 / tokens + lambda |v - w|^2 over v on the support, as an ordinary least-squares problem."""
    columns = weight.shape[1]
    scale = np.sqrt(damping * np.mean(np.diag(hessian)))
    stacked = np.vstack([inputs / np.sqrt(len(inputs)), scale * np.eye(columns)])
    out = np.zeros_like(weight)
    for r, w in enumerate(weight):
        s = mask[r]
        out[r, s] = np.linalg.lstsq(stacked[:, s], stacked @ w, rcond=None)[0]
    return out


def bits(mask):
    return ["".join("1" if x else "0" for x in row) for row in mask]


def main():
    rng = np.random.default_rng(20261127)
    cases = []
    for rows, columns, dead in ((7, 40, False), (5, 24, True)):
        mix = rng.normal(size=(columns, columns)) / np.sqrt(columns) + 0.7 * np.eye(columns)
        inputs = rng.normal(size=(200, columns)) @ mix * np.exp(0.5 * rng.normal(size=columns))
        if dead:
            inputs[:, 3] = 0
        inputs = inputs.astype(np.float32).astype(np.float64)
        weight = rng.normal(size=(rows, columns)).astype(np.float32).astype(np.float64)
        hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32).astype(np.float64)
        case = {"rows": rows, "columns": columns, "weight": weight.ravel().tolist(), "hessian": hessian.ravel().tolist(), "runs": []}
        for sparsity, n, m, block, damping in ((0.5, 0, 0, 16, 0.01), (0.7, 0, 0, 128, 0.01), (0.3, 0, 0, 12, 0.1), (0, 2, 4, 128, 0.01), (0, 4, 8, 16, 0.01), (0, 1, 4, 8, 0.05)):
            pruned, mask, loss = sparsegpt(weight, hessian, sparsity, n, m, block, damping)
            by_wanda = wanda(weight, np.diag(hessian), sparsity, n, m)
            case["runs"].append(
                {"sparsity": sparsity, "n": n, "m": m, "block": block, "damping": damping, "mask": bits(mask), "pruned": pruned.ravel().tolist(), "loss": loss, "wanda": bits(by_wanda),
                 "refit": refit(weight, by_wanda, inputs, hessian, damping).ravel().tolist()}
            )
        cases.append(case)
    out = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "prune.json"
    text = json.dumps({"numpy": np.__version__, "cases": cases})
    out.write_text(text + "\n")
    print(f"{out.name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
