#!/usr/bin/env python3
"""Writes tests/goldens/statistics.json: scores, tests and bootstrap intervals from scipy, scikit-learn and numpy.

The bootstrap repeats the documented draws (Philox4x32-10, counter r * n + i of stream "bootstrap") in numpy, so that the
bounds must be equal, not only alike.  Needs: numpy, scipy, scikit-learn.  Usage: make_goldens_statistics.py OUTPUT
"""
import json
import sys

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score


def philox_bits(seed, stream, counters):
    h = 0xCBF29CE484222325
    for byte in stream.encode():
        h = ((h ^ byte) * 0x100000001B3) & (2**64 - 1)
    key = h ^ ((seed * 0x9E3779B97F4A7C15) & (2**64 - 1))
    mask = np.uint64(0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c = [counters & mask, counters >> np.uint64(32), np.zeros_like(counters), np.zeros_like(counters)]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c[1] << np.uint64(32)) | c[0]


def draws(n, resamples, seed):
    bits = philox_bits(seed, "bootstrap", np.arange(n * resamples, dtype=np.uint64))
    high = ((bits >> np.uint64(32)) * np.uint64(n) + (((bits & np.uint64(0xFFFFFFFF)) * np.uint64(n)) >> np.uint64(32))) >> np.uint64(32)
    return high.astype(np.int64).reshape(resamples, n)


def interval(value, sample):
    return [float(value), float(np.quantile(sample, 0.025)), float(np.quantile(sample, 0.975))]


def main(output):
    rng = np.random.default_rng(5)
    n, classes, resamples, seed = 240, 6, 400, 23
    truth = rng.integers(0, classes, n)
    first = np.where(rng.random(n) < 0.85, truth, rng.integers(0, classes, n))
    second = np.where(rng.random(n) < 0.75, truth, rng.integers(0, classes, n))
    index = draws(n, resamples, seed)
    f1 = lambda p, t: f1_score(t, p, labels=np.arange(classes), average="macro", zero_division=0)
    a, b = (first == truth).astype(float), (second == truth).astype(float)
    kl_a, kl_b = rng.gamma(0.5, 0.2, n).round(6), rng.gamma(0.5, 0.3, n).round(6)
    windows = 40
    tokens = rng.integers(100, 257, windows)
    nll = (tokens * rng.normal(3.0, 0.2, windows)).round(4)
    nll_second = (tokens * rng.normal(2.9, 0.2, windows)).round(4)
    window_index = draws(windows, resamples, seed)
    total = lambda values: values[window_index].sum(axis=1)
    confidence = rng.random(n).round(6)
    edges = np.linspace(0, 1, 16)
    ece = 0.0
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(a[inside].mean() - confidence[inside].mean())
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5]
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1)))
    wilson = []
    for right, count in [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (2889, 3080)]:
        ci = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
        wilson.append([right, count, ci.low, ci.high])
    mcnemar = []
    for x, y in [(0, 0), (1, 0), (5, 5), (3, 12), (40, 71), (700, 900), (60000, 60900)]:
        mcnemar.append([x, y, float(stats.binomtest(x, x + y, 0.5).pvalue) if x + y else 1.0])
    # Vectors of texts in two models, drawn behind all else; two texts are the same, so that similarities tie.
    vectors = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32).astype(np.float64) for x in (rng.normal(size=(12, 5)), rng.normal(size=(12, 3)))]
    for x in vectors:
        x[7] = x[2]
    similarity = [np.float32(x @ x.T) for x in vectors]
    others = lambda s, i: np.delete(s[i], i)
    golden = {
        "vectors": [x.tolist() for x in vectors],
        "rank_correlation": [float(stats.spearmanr(others(similarity[0], i), others(similarity[1], i)).statistic) for i in range(12)],
        "same_nearest": [int(np.argmax(others(similarity[0], i)) == np.argmax(others(similarity[1], i))) for i in range(12)],
        "resamples": resamples, "seed": seed, "classes": classes,
        "truth": truth.tolist(), "first": first.tolist(), "second": second.tolist(),
        "kl_first": kl_a.tolist(), "kl_second": kl_b.tolist(), "confidence": confidence.tolist(),
        "nll": nll.tolist(), "nll_second": nll_second.tolist(), "tokens": tokens.tolist(),
        "wilson": wilson, "mcnemar": mcnemar, "standard_error": float(a.std(ddof=1) / np.sqrt(n)),
        "macro_f1": interval(f1(first, truth), [f1(first[i], truth[i]) for i in index]),
        "macro_f1_difference": interval(f1(first, truth) - f1(second, truth), [f1(first[i], truth[i]) - f1(second[i], truth[i]) for i in index]),
        "accuracy_difference": interval((a - b).mean(), (a - b)[index].mean(axis=1)),
        "kl_difference": interval((kl_a - kl_b).mean(), (kl_a - kl_b)[index].mean(axis=1)),
        "perplexity": interval(np.exp(nll.sum() / tokens.sum()), np.exp(total(nll) / total(tokens))),
        "perplexity_ratio": interval(np.exp((nll - nll_second).sum() / tokens.sum()), np.exp((total(nll) - total(nll_second)) / total(tokens))),
        "spread": [float(kl_a.mean()), float(np.median(kl_a)), float(np.quantile(kl_a, 0.99))],
        "ece": float(ece), "p_values": p_values, "holm": adjusted.tolist(),
        "agree": int((first == second).sum()), "discordant": [int((a > b).sum()), int((b > a).sum())],
    }
    with open(output, "w") as file:
        json.dump(golden, file, indent=None, separators=(",", ":"))
        file.write("\n")


main(sys.argv[1])
