#!/usr/bin/env python3
"""Goldens of the GPTQ sweep from a plain NumPy implementation: inverse of the whole Hessian, one column at a time, no blocks.

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


def gptq(weight, hessian, group, grid, damping, act_order):
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
        if act_order:
            members.sort(key=lambda k: -energy[k])
        order += members
    h = hessian[np.ix_(order, order)] + damping * energy.mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w = weight[:, order].copy()
    codes = np.zeros((rows, columns))
    scales = np.zeros((rows, len(groups)))
    loss = 0.0
    for j, column in enumerate(order):
        g = column // width
        if j == 0 or order[j - 1] // width != g:
            n = min(columns, (g + 1) * width) - g * width
            for r in range(rows):
                scales[r, g] = fit(w[r, j : j + n])
        q = np.clip(np.round(w[:, j] / scales[:, g]), low, high)
        codes[:, column] = q
        e = (w[:, j] - q * scales[:, g]) / upper[j, j]
        loss += (e**2).sum()
        w[:, j:] -= np.outer(e, upper[j, j:])
    return codes, scales, loss


def main():
    rng = np.random.default_rng(5)
    cases = []
    for grid, group, act_order in [("ternary", 16, False), ("ternary", 16, True), ("ternary", 0, True), ("int8", 0, True), ("int8", 24, True)]:
        rows, columns = 6, 48
        weight = rng.standard_normal((rows, columns)).astype(np.float32).astype(np.float64)
        x = rng.standard_normal((200, columns)) @ (rng.standard_normal((columns, columns)) / 5 + np.eye(columns)) * np.exp(rng.standard_normal(columns))
        hessian = np.array([float(f"{v:.6g}") for v in (x.T @ x / len(x)).ravel()]).reshape(columns, columns)  # short text
        codes, scales, loss = gptq(weight, hessian, group, grid, 0.01, act_order)
        cases.append(dict(rows=rows, columns=columns, grid=grid, group=group, act_order=act_order, damping=0.01, weight=weight.ravel().tolist(),
                          hessian=hessian.ravel().tolist(), codes=codes.ravel().astype(int).tolist(), scales=scales.ravel().tolist(), loss=loss))
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "gptq.json"
    path.write_text(json.dumps({"cases": cases}) + "\n")


if __name__ == "__main__":
    main()
