#!/usr/bin/env python3
"""Goldens of the GPTQ sweep, and of the one that prunes as well, from a plain NumPy implementation: inverse of the whole Hessian,
one column at a time, no blocked updates.

Writes tests/goldens/gptq.json. Needs NumPy. The textbook order of operations (inverse, then Cholesky of the inverse) on
purpose differs from the factorization that kompakt uses.
"""
import json
import pathlib

import numpy as np


def half(x):
    return np.float64(np.float16(x))


def fit_ternary(w):
    a = np.sort(np.abs(w))[::-1]
    sums = np.cumsum(a)
    k = np.argmax(sums**2 / np.arange(1, len(a) + 1))
    return half(sums[k] / (k + 1))


def fit_absmax(w):
    return half(np.float32(np.abs(w).max()) / np.float32(127))


GRIDS = {"ternary": (fit_ternary, -1, 1), "int8": (fit_absmax, -127, 127)}


def lowest(cost, count):
    """Places of the `count` lowest; of equal ones the later."""
    return sorted(range(len(cost)), key=lambda i: (cost[i], -i))[:count]


def choose(cost, gone, sparsity, n, m):
    """Marks what goes of rows x columns: a share of all, or of every m columns of a row all but n."""
    cost = np.where(gone, -1.0, cost)
    if m == 0:
        for i in lowest(cost.ravel(), int(sparsity * cost.size)):
            gone[i // cost.shape[1], i % cost.shape[1]] = True
        return
    for r in range(cost.shape[0]):
        for first in range(0, cost.shape[1], m):
            for i in lowest(cost[r, first : first + m], m - n):
                gone[r, first + i] = True


def gptq(weight, hessian, group, grid, damping, act_order, sparsity=0.0, n=0, m=0, block=128):
    fit, low, high = GRIDS[grid]
    rows, columns = weight.shape
    width = group or columns
    energy = np.diag(hessian)
    order = []
    groups = list(range((columns + width - 1) // width))
    if act_order:
        groups.sort(key=lambda g: -energy[g * width : (g + 1) * width].max())
    for g in groups:
        members = list(range(g * width, min(columns, (g + 1) * width)))
        if act_order and m == 0:
            members.sort(key=lambda k: -energy[k])
        order += members
    h = hessian[np.ix_(order, order)] + damping * energy.mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w = weight[:, order].copy()
    gone = np.zeros((rows, columns), dtype=bool)
    share, grouped = sparsity > 0, m > 0
    codes = np.zeros((rows, columns))
    scales = np.zeros((rows, len(groups)))
    loss = 0.0
    for j, column in enumerate(order):
        g = column // width
        cost = np.where(w == 0, -1.0, w**2 / np.diag(upper) ** 2)
        if share and j % block == 0:
            part = slice(j, j + block)
            choose(cost[:, part], gone[:, part], sparsity, 0, 0)
        if j == 0 or order[j - 1] // width != g:
            part = slice(j, j + min(columns, (g + 1) * width) - g * width)
            for r in range(rows):
                zero = gone[r : r + 1, part].copy()  # what would go now, where it is not known yet
                if grouped or (share and part.stop > j // block * block + block):
                    choose(cost[r : r + 1, part], zero, sparsity, n, m)
                scales[r, g] = fit(np.where(zero[0], 0.0, w[r, part]))
        if grouped and column % m == 0:
            choose(cost[:, j : j + m], gone[:, j : j + m], 0, n, m)
        q = np.where(gone[:, j], 0.0, np.clip(np.round(w[:, j] / scales[:, g]), low, high))
        codes[:, column] = q
        e = (w[:, j] - q * scales[:, g]) / upper[j, j]
        loss += (e**2).sum()
        w[:, j:] -= np.outer(e, upper[j, j:])
    kept = np.zeros((rows, columns), dtype=bool)
    kept[:, order] = ~gone
    return codes, scales, loss, kept


def layer(rng, rows, columns):
    weight = rng.standard_normal((rows, columns)).astype(np.float32).astype(np.float64)
    x = rng.standard_normal((200, columns)) @ (rng.standard_normal((columns, columns)) / 5 + np.eye(columns)) * np.exp(rng.standard_normal(columns))
    return weight, np.array([float(f"{v:.6g}") for v in (x.T @ x / len(x)).ravel()]).reshape(columns, columns)  # short text


def main():
    rng = np.random.default_rng(5)
    cases, sparse = [], []
    rows, columns = 6, 48
    for grid, group, act_order in [("ternary", 16, False), ("ternary", 16, True), ("ternary", 0, True), ("int8", 0, True), ("int8", 24, True)]:
        weight, hessian = layer(rng, rows, columns)
        codes, scales, loss, _ = gptq(weight, hessian, group, grid, 0.01, act_order)
        cases.append(dict(rows=rows, columns=columns, grid=grid, group=group, act_order=act_order, damping=0.01, weight=weight.ravel().tolist(),
                          hessian=hessian.ravel().tolist(), codes=codes.ravel().astype(int).tolist(), scales=scales.ravel().tolist(), loss=loss))
    for grid, group, act_order, sparsity, n, m in [("ternary", 16, True, 0.0, 2, 4), ("int8", 0, True, 0.0, 2, 4), ("int8", 16, False, 0.0, 1, 4), ("ternary", 16, True, 0.5, 0, 0),
                                                   ("int8", 0, True, 0.4, 0, 0), ("int8", 24, False, 0.7, 0, 0)]:
        weight, hessian = layer(rng, rows, columns)
        block = 24 if group == 24 else 16
        codes, scales, loss, kept = gptq(weight, hessian, group, grid, 0.01, act_order, sparsity, n, m, block)
        sparse.append(dict(rows=rows, columns=columns, grid=grid, group=group, act_order=act_order, damping=0.01, sparsity=sparsity, n=n, m=m, block=block, weight=weight.ravel().tolist(),
                           hessian=hessian.ravel().tolist(), codes=codes.ravel().astype(int).tolist(), scales=scales.ravel().tolist(), loss=loss, kept=kept.ravel().astype(int).tolist()))
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "gptq.json"
    path.write_text(json.dumps({"cases": cases, "sparse": sparse}) + "\n")


if __name__ == "__main__":
    main()
