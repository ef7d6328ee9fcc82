#!/usr/bin/env python3
"""Goldens of the GPTQ sweep, alone and with pruning in it, from a plain NumPy implementation: inverse of the whole Hessian, one column at a time, no blocks.

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


def lowest(scores, count):
    """Places of the `count` lowest; of equal ones the later."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:count]


def joint(weight, hessian, group, grid, damping, act_order, sparsity, n, m, block, before):
    """SparseGPT's joint mode: weights that go are chosen while the sweep rounds. `before`: mask of an earlier stage, or None."""
    fit, low, high = GRIDS[grid]
    rows, columns = weight.shape
    width = group or columns
    energy = np.diag(hessian)
    act_order = act_order and not (m and width > block)
    groups = list(range((columns + width - 1) // width))
    if act_order:
        groups.sort(key=lambda g: -energy[g * width : (g + 1) * width].max())
    order, begins = [], []
    for g in groups:
        members = list(range(g * width, min(columns, (g + 1) * width)))
        if act_order:
            members.sort(key=lambda k: -energy[k])
        begins.append(len(order))
        order += members
    step = block // width * width if width <= block else block
    if width <= block:
        blocks = {j: min(columns, j + step) for j in range(0, columns, step)}
    else:
        blocks = {j: min(b + width, columns, j + step) for b in begins for j in range(b, min(columns, b + width), step)}
    h = hessian[np.ix_(order, order)] + damping * energy.mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    diagonal = np.diag(upper)
    w = weight[:, order].copy()
    kept = np.ones((rows, columns), bool) if before is None else before[:, order].copy()
    codes, scales, loss, end = np.zeros((rows, columns)), np.zeros((rows, len(groups))), 0.0, 0

    def choose(row, flags, places, count):
        scores = [-1.0 if not flags[p] or row[p] == 0 else (row[p] / diagonal[p]) ** 2 for p in places]
        for i in lowest(scores, count):
            flags[places[i]] = False

    def members_of(column):
        return sorted(p for p in range(columns) if order[p] // m == column // m)

    for j, column in enumerate(order):
        g = column // width
        if j in blocks:
            end = blocks[j]
            if not m:
                places = [(r, p) for r in range(rows) for p in range(j, end)]
                scores = [-1.0 if not kept[r, p] or w[r, p] == 0 else (w[r, p] / diagonal[p]) ** 2 for r, p in places]
                for i in lowest(scores, int(sparsity * len(places))):
                    kept[places[i]] = False
        if j in begins:
            stop = j + min(columns, (g + 1) * width) - g * width
            for r in range(rows):
                expected = kept[r].copy()
                if m:
                    for p in range(j, stop):
                        if members_of(order[p])[0] == p:
                            choose(w[r], expected, members_of(order[p]), m - n)
                elif end < stop:
                    choose(w[r], expected, list(range(end, stop)), int(sparsity * (stop - end)))
                scales[r, g] = fit(np.where(expected, w[r], 0)[j:stop])
        if m and members_of(column)[0] == j:
            for r in range(rows):
                choose(w[r], kept[r], members_of(column), m - n)
        q = np.clip(np.round(np.where(kept[:, j], w[:, j], 0) / scales[:, g]), low, high)
        codes[:, column] = q
        e = (w[:, j] - q * scales[:, g]) / upper[j, j]
        loss += (e**2).sum()
        w[:, j:] -= np.outer(e, upper[j, j:])
    mask = np.zeros((rows, columns), bool)
    mask[:, order] = kept
    return codes, scales, mask, loss


def problem(rng, rows, columns):
    weight = rng.standard_normal((rows, columns)).astype(np.float32).astype(np.float64)
    x = rng.standard_normal((200, columns)) @ (rng.standard_normal((columns, columns)) / 5 + np.eye(columns)) * np.exp(rng.standard_normal(columns))
    return weight, np.array([float(f"{v:.6g}") for v in (x.T @ x / len(x)).ravel()]).reshape(columns, columns)  # short text


def main():
    rng = np.random.default_rng(5)
    cases = []
    for grid, group, act_order in [("ternary", 16, False), ("ternary", 16, True), ("ternary", 0, True), ("int8", 0, True), ("int8", 24, True)]:
        rows, columns = 6, 48
        weight, hessian = problem(rng, rows, columns)
        codes, scales, loss = gptq(weight, hessian, group, grid, 0.01, act_order)
        cases.append(dict(rows=rows, columns=columns, grid=grid, group=group, act_order=act_order, damping=0.01, weight=weight.ravel().tolist(),
                          hessian=hessian.ravel().tolist(), codes=codes.ravel().astype(int).tolist(), scales=scales.ravel().tolist(), loss=loss))
    rows, columns = 5, 48
    weight, hessian = problem(rng, rows, columns)
    joints = []
    for grid, group, act_order, sparsity, n, m, block, masked in [("int8", 16, False, 0, 2, 4, 16, False), ("int8", 16, True, 0, 2, 4, 16, False), ("int8", 0, True, 0, 4, 8, 16, False), ("int8", 8, True, 0.5, 0, 0, 16, False),
                                                                  ("int8", 24, True, 0.6, 0, 0, 16, False), ("ternary", 0, False, 0.5, 0, 0, 16, False), ("ternary", 16, True, 0, 1, 4, 128, False), ("int8", 16, True, 0.7, 0, 0, 16, True)]:
        before = rng.random((rows, columns)) < 0.7 if masked else None
        codes, scales, mask, loss = joint(weight, hessian, group, grid, 0.01, act_order, sparsity, n, m, block, before)
        case = dict(grid=grid, group=group, act_order=act_order, damping=0.01, sparsity=sparsity, n=n, m=m, block=block,
                    codes=codes.ravel().astype(int).tolist(), scales=scales.ravel().tolist(), mask=mask.ravel().astype(int).tolist(), loss=loss)
        if masked:
            case["before"] = before.ravel().astype(int).tolist()
        joints.append(case)
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "gptq.json"
    path.write_text(json.dumps({"cases": cases, "joint": dict(rows=rows, columns=columns, weight=weight.ravel().tolist(), hessian=hessian.ravel().tolist(), cases=joints)}) + "\n")


if __name__ == "__main__":
    main()
