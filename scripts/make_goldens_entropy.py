#!/usr/bin/env python3
"""Goldens of entropy-coded grids from a plain implementation: steps, codes, and the codes' bytes in all four layouts.

Writes tests/goldens/entropy.json. Needs NumPy; the streams are those of Python's zlib.
"""
import json
import pathlib
import zlib

import numpy as np

STEPS = {"ecq2": 1.1332, "ecq3": 0.5452, "ecq5": 0.1347}


def stream(symbols):
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(bytes(symbols)) + coder.flush()


def singles(codes):
    return [c + 128 for c in codes]


def pairs(codes):
    halves = [c + 7 if -7 <= c <= 7 else 15 for c in codes]
    if len(halves) % 2:
        halves.append(7)
    return [a + 16 * b for a, b in zip(halves[::2], halves[1::2])] + [c + 128 for c in codes if not -7 <= c <= 7]


def layouts(codes):
    order = np.argsort(np.abs(codes).sum(1), kind="stable")
    flat, moved = codes.ravel().tolist(), codes[order].ravel().tolist()
    numbers = b"".join(int(r).to_bytes(2, "little") for r in order)
    return {1: b"\1" + stream(singles(flat)), 2: b"\2" + stream(pairs(flat)), 5: b"\5" + numbers + stream(singles(moved)), 6: b"\6" + numbers + stream(pairs(moved))}


def main():
    rng = np.random.default_rng(8)
    cases = []
    for grid, rows, columns in [("ecq2", 5, 33), ("ecq3", 24, 64), ("ecq5", 3, 7), ("ecq3", 1, 1)]:
        weight = (rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)
        step = np.float32(STEPS[grid]) * np.sqrt((weight.astype(np.float64) ** 2).mean(1)).astype(np.float32)
        scale = np.maximum(step, np.abs(weight).max(1) / 127).astype(np.float16).astype(np.float32)
        codes = np.rint(weight / scale[:, None]).astype(int)
        cases.append(dict(grid=grid, rows=rows, columns=columns, weight=[float(v) for v in weight.ravel()], scales=[float(v) for v in scale], codes=codes.ravel().tolist(),
                          layouts={str(k): v.hex() for k, v in layouts(codes).items()}))
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "entropy.json"
    path.write_text(json.dumps({"cases": cases}) + "\n")


if __name__ == "__main__":
    main()
