#!/usr/bin/env python3
"""Golden values of the distillation losses in float64, from open formulas in numpy.

Independent of kompakt: probabilities are formed openly (softmax, then the textbook formula) and gradients come from
complex-step differentiation (exact to rounding), while kompakt uses closed forms in log space.
Writes tests/goldens/distill.json.  Needs: numpy.
"""
import json
import pathlib

import numpy as np

rng = np.random.default_rng(0)
STEP = 1e-30


def softmax(z):
    e = np.exp(z - z.real.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def absolute(x):  # analytic continuation of |x|
    return x * np.sign(x.real)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p, q):
    weights = []
    for pr, qr in zip(p.real, q.real):
        order = np.argsort(pr, kind="stable")
        tail = np.zeros(len(pr), bool)
        tail[order] = np.cumsum(pr[order]) < 0.5
        gap = np.abs(pr - qr)
        weights.append(gap[~tail].sum() / gap.sum())
    w = np.array(weights)  # real: the weights are constants of the step
    return w * kl(p, q) + (1 - w) * kl(q, p)


def positive(x):  # analytic continuation of max(0, x)
    return x * (x.real > 0)


def ranking(student, teacher, top, margin):
    """Pairs of the teacher's likeliest tokens, one by one."""
    values = []
    for s, t in zip(student, teacher):
        best = sorted(range(len(t)), key=lambda i: -t[i].real)[:top]
        pairs = [(i, j) for a, i in enumerate(best) for j in best[a + 1:]]
        values.append(sum(positive(min(t[i].real - t[j].real, margin) - (s[i] - s[j])) for i, j in pairs) / len(pairs))
    return np.array(values)


LOSSES = {
    "forward_kl": lambda p, q, o: kl(p, q),
    "reverse_kl": lambda p, q, o: kl(q, p),
    "generalized_jsd": lambda p, q, o: jsd(p, q, o["beta"]),
    "skew_forward_kl": lambda p, q, o: kl(p, o["lambda"] * p + (1 - o["lambda"]) * q),
    "skew_reverse_kl": lambda p, q, o: kl(q, (1 - o["lambda"]) * p + o["lambda"] * q),
    "adaptive_kl": lambda p, q, o: adaptive(p, q),
    "total_variation": lambda p, q, o: 0.5 * absolute(p - q).sum(-1),
}


def gradient(function, x):
    """Gradient of a scalar function at real x by complex steps."""
    out = np.zeros(x.size)
    for i in range(x.size):
        z = x.astype(complex).reshape(-1)
        z[i] += 1j * STEP
        out[i] = function(z.reshape(x.shape)).imag / STEP
    return out.tolist()


def flat(x):
    return np.asarray(x).reshape(-1).tolist()


def logit_cases():
    cases = []
    for n, v, temperature, beta, lam in [(3, 5, 1.0, 0.5, 0.1), (4, 7, 2.0, 0.3, 0.25)]:
        student, teacher = rng.normal(size=(n, v)) * 2, rng.normal(size=(n, v)) * 2
        mask = np.ones(n)
        mask[1] = 0
        options = {"temperature": temperature, "beta": beta, "lambda": lam, "top": 4, "margin": 0.8}
        p = softmax(teacher.astype(complex) / temperature)
        results = {}
        for name, function in LOSSES.items():
            loss = lambda s: (function(p, softmax(s / temperature), options) * mask).sum() / mask.sum() * temperature**2  # noqa: B023
            results[name] = {"value": loss(student.astype(complex)).real, "gradient": gradient(loss, student)}
        loss = lambda s: ((s - teacher) ** 2).mean(-1)[mask > 0].mean()  # noqa: B023
        results["logits_mse"] = {"value": loss(student.astype(complex)).real, "gradient": gradient(loss, student)}
        loss = lambda s: (ranking(s / temperature, teacher / temperature, 4, 0.8) * mask).sum() / mask.sum() * temperature**2  # noqa: B023
        results["ranking"] = {"value": loss(student.astype(complex)).real, "gradient": gradient(loss, student)}
        cases.append({"n": n, "v": v, "student": flat(student), "teacher": flat(teacher), "mask": [int(m) for m in mask], "options": options, "results": results})
    return cases


def hidden_case():
    b, t, ds, dt = 2, 4, 3, 5
    student, teacher, projection = rng.normal(size=(b, t, ds)), rng.normal(size=(b, t, dt)), rng.normal(size=(ds, dt))
    lengths = np.array([4, 2])
    mask = np.arange(t)[None] < lengths[:, None]
    norm = lambda x: np.sqrt((x * x).sum(-1))
    losses = {
        "mse": lambda s, w: (((s @ w)[mask] - teacher[mask]) ** 2).mean(),
        "cosine": lambda s, w: 1 - (((s @ w)[mask] * teacher[mask]).sum(-1) / norm((s @ w)[mask]) / norm(teacher[mask])).mean(),
    }
    out = {"b": b, "t": t, "ds": ds, "dt": dt, "student": flat(student), "teacher": flat(teacher), "projection": flat(projection), "lengths": lengths.tolist()}
    for name, loss in losses.items():
        out[name] = {
            "value": float(loss(student, projection)),
            "gradient": gradient(lambda s: loss(s, projection), student),  # noqa: B023
            "projection_gradient": gradient(lambda w: loss(student, w), projection),  # noqa: B023
        }
    return out


def relation_case():
    """Student 4 heads of 3, teacher 2 heads of 8, 2 relation heads; padding and documents masked."""
    b, t, heads = 2, 5, 2
    student, teacher = rng.normal(size=(b, 4, t, 3)), rng.normal(size=(b, 2, t, 8))
    lengths = np.array([5, 3])
    documents = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])

    def relation(x, row, head, normalize):
        joined = x[row].swapaxes(0, 1).reshape(t, -1)
        width = joined.shape[1] // heads
        part = joined[:, head * width:(head + 1) * width]
        if normalize:
            part = part / np.sqrt((part * part).sum(-1, keepdims=True))
            return part @ part.T
        return part @ part.T / width**0.5

    def loss(x, normalize):
        total, count = 0, 0
        for row in range(b):
            for head in range(heads):
                s, r = relation(x, row, head, normalize), relation(teacher.astype(complex), row, head, normalize)
                for i in range(int(lengths[row])):
                    allowed = [j for j in range(int(lengths[row])) if documents[row, j] == documents[row, i]]
                    total = total + kl(softmax(r[i, allowed]), softmax(s[i, allowed]))
                    count += 1
        return total / count

    out = {"b": b, "t": t, "heads": heads, "student": flat(student), "teacher": flat(teacher), "lengths": lengths.tolist(), "documents": flat(documents)}
    for normalize in (False, True):
        out["normalized" if normalize else "scaled"] = {
            "value": loss(student.astype(complex), normalize).real,
            "gradient": gradient(lambda x: loss(x, normalize), student),  # noqa: B023
        }
    return out


def sparse_case():
    """A teacher known by its 3 likeliest tokens and two draws from the rest: the mean over all draws, weighted by their probability."""
    v, known, lam = 7, 3, 0.25
    student, teacher = rng.normal(size=v) * 1.5, rng.normal(size=v) * 1.5
    p = softmax(teacher)
    best = np.argsort(-p, kind="stable")[:known]
    rest = np.setdiff1d(np.arange(v), best)
    coarse = lambda x: np.concatenate([x[best], [x[rest].sum()]])
    q = lambda s: softmax(s.astype(complex))
    losses = {
        "reverse_kl": lambda s: kl(coarse(q(s)), coarse(p)),
        "skew_forward_kl": lambda s: kl(coarse(p), lam * coarse(p) + (1 - lam) * coarse(q(s))),
        "total_variation": lambda s: 0.5 * absolute(coarse(p) - coarse(q(s))).sum(-1),
        "full": lambda s: kl(p, q(s)),
        "partition": lambda s: kl(coarse(p), coarse(q(s))),
    }
    out = {"student": flat(student), "teacher": flat(teacher), "best": best.tolist(), "rest": rest.tolist(), "lambda": lam}
    for name, loss in losses.items():
        out[name] = {"value": float(np.real(loss(student))), "gradient": gradient(loss, student)}
    return out


def embedding_case():
    b, ds, dt, temperature = 4, 3, 5, 0.3
    student, teacher, projection = rng.normal(size=(b, ds)), rng.normal(size=(b, dt)), rng.normal(size=(ds, dt))
    unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True))

    def contrastive(s, w):
        total = 0
        for i in range(b):
            near = np.array([unit(s @ w)[i] @ unit(teacher)[j] for j in range(b)])
            total = total + kl(softmax(np.array([unit(teacher)[i] @ unit(teacher)[j] for j in range(b)]) / temperature), softmax(near / temperature))
        return total / b

    def similarity(s):
        total = 0
        for i in range(b):
            others = [j for j in range(b) if j != i]
            total = total + kl(softmax(np.array([unit(teacher)[i] @ unit(teacher)[j] for j in others]) / temperature), softmax(np.array([unit(s)[i] @ unit(s)[j] for j in others]) / temperature))
        return total / b

    return {
        "b": b, "ds": ds, "dt": dt, "temperature": temperature, "student": flat(student), "teacher": flat(teacher), "projection": flat(projection),
        "contrastive": {"value": float(np.real(contrastive(student, projection))), "gradient": gradient(lambda s: contrastive(s, projection), student),
                        "projection_gradient": gradient(lambda w: contrastive(student, w), projection)},
        "similarity": {"value": float(np.real(similarity(student))), "gradient": gradient(similarity, student)},
    }


def main():
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "distill.json"
    path.write_text(json.dumps({"logits": logit_cases(), "hidden": hidden_case(), "relation": relation_case(), "sparse": sparse_case(), "embedding": embedding_case()}, indent=1) + "\n")
    print(f"wrote {path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
