#!/usr/bin/env python3
"""Reference values of 8-bit optimizer moments for tests/train/quantized_moments_test.cpp: the two code maps by the formula of
arXiv 2110.02861 as bitsandbytes writes it (torch.linspace boundaries and their means), and three AdamW steps whose moments pass through
them block by block. Independent of kompakt; needs numpy.

usage: scripts/make_goldens_moments.py [--check]     writes tests/goldens/moments.json, or compares with it
"""
import json
import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "moments.json"
BLOCK = 256


def dynamic_map(signed, max_exponent_bits=7, total_bits=8):
    data = []
    non_sign_bits = total_bits - 1
    for i in range(max_exponent_bits):
        items = 2 ** (i + non_sign_bits - max_exponent_bits) + 1 if signed else 2 ** (i + non_sign_bits - max_exponent_bits + 1) + 1
        boundaries = np.linspace(0.1, 1, items)
        means = (boundaries[:-1] + boundaries[1:]) / 2
        data += list(10.0 ** (-(max_exponent_bits - 1) + i) * means)
        if signed:
            data += list(-(10.0 ** (-(max_exponent_bits - 1) + i)) * means)
    data += [0.0, 1.0]
    assert len(data) == 256
    return np.sort(np.array(data)).astype(np.float32)


def store(values, codes, positive):
    out, scales, stored = np.zeros_like(values), [], []
    for start in range(0, len(values), BLOCK):
        block = values[start:start + BLOCK]
        scale = np.float32(np.abs(block).max())
        unit = block / scale if scale > 0 else block * 0
        index = np.abs(unit[:, None] - codes[None, :]).argmin(1)  # nearest
        if positive:
            index = np.where(block > 0, np.maximum(index, 1), index)
        out[start:start + BLOCK] = codes[index] * scale
        scales.append(float(scale))
        stored += index.tolist()
    return out, scales, stored


def main():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    n = 600  # two blocks and an odd tail
    i = np.arange(n)
    x = (np.sin(i * 0.37) * 0.5).astype(np.float32)
    m, v = np.zeros(n, np.float32), np.zeros(n, np.float32)
    rate, b1, b2, decay, eps, divisor = 1e-2, 0.9, 0.98, 0.1, 1e-6, 2.0
    for step in range(1, 4):
        g = (np.cos(i * 0.11 * step) * 10.0 ** (-(i % 5))).astype(np.float32) / np.float32(divisor)
        m = (m * b1 + g * (1 - b1)).astype(np.float32)
        v = (v * b2 + g * g * (1 - b2)).astype(np.float32)
        x = (x * (1 - rate * decay) - rate / (1 - b1**step) * m / (np.sqrt(v) / np.sqrt(1 - b2**step) + eps)).astype(np.float32)
        m, first_scales, first = store(m, signed, False)
        v, second_scales, second = store(v, unsigned, True)
    out = {"signed": signed.tolist(), "unsigned": unsigned.tolist(), "values": x.tolist(), "first_codes": first, "first_scales": first_scales, "second_codes": second, "second_scales": second_scales}
    text = json.dumps(out) + "\n"
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text() == text else f"{TARGET} differs")
    TARGET.write_text(text)


if __name__ == "__main__":
    main()
