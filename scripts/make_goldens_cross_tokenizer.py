#!/usr/bin/env python3
"""Golden values of the losses between different tokenizers, and of MiniLLM's long part, in float64 by torch's autograd.

The formulas are written openly, as papers and TRL's GOLD trainer have them: probabilities, sort, pad, L1 sum over the number of positions;
products of token probabilities over spans; sets of byte offsets.  Writes tests/goldens/cross_tokenizer.json.  Needs: torch.
"""
import json
import pathlib

import torch

torch.manual_seed(7)
torch.set_default_dtype(torch.float64)


def graded(loss, logits):
    x = logits.clone().requires_grad_()
    value = loss(x)
    value.backward()
    return {"value": value.item(), "gradient": x.grad.flatten().tolist()}


def uld(student, teacher, temperature):
    q = torch.softmax(student / temperature, -1).sort(-1, descending=True).values
    p = torch.softmax(teacher / temperature, -1).sort(-1, descending=True).values
    width = max(q.size(-1), p.size(-1))
    q = torch.nn.functional.pad(q, (0, width - q.size(-1)))
    p = torch.nn.functional.pad(p, (0, width - p.size(-1)))
    return torch.nn.functional.l1_loss(q, p, reduction="sum") / q.size(0)


def shared(student, teacher, mine, other, temperature):
    def partition(logits, ids):
        probability = torch.softmax(logits / temperature, -1)
        known = probability[:, ids]
        return torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)

    q, p = partition(student, mine), partition(teacher, other)
    return (p * (p / q).log()).sum(-1).mean()


def spans(student, teacher, student_tokens, teacher_tokens, student_spans, teacher_spans, temperature):
    def probability(logits, tokens, numbers):
        each = torch.softmax(logits, -1)[torch.arange(len(tokens)), tokens]
        return torch.stack([torch.prod(torch.stack([each[i] for i in range(len(tokens)) if numbers[i] == k])) for k in range(max(numbers) + 1)])

    q = probability(student, student_tokens, student_spans) ** (1 / temperature)
    p = probability(teacher, teacher_tokens, teacher_spans).detach() ** (1 / temperature)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def policy(student, teacher, tokens, rows):
    n = range(len(tokens))
    log_q = torch.log_softmax(student, -1)[torch.arange(len(tokens)), tokens]
    log_p = torch.log_softmax(teacher, -1)[torch.arange(len(tokens)), tokens]
    reward = (log_p - log_q).detach()
    total = 0.0
    for t in n:
        later = [reward[u] for u in n if u > t and rows[u] == rows[t]]
        if later:
            total = total - sum(later) / len(later) * log_q[t]
    return total / len(tokens)


out = {"torch": torch.__version__, "uld": [], "shared": [], "spans": [], "policy": [], "alignment": []}
for width, other_width, temperature in [(6, 9, 1.0), (9, 6, 1.0), (5, 5, 2.0), (4, 7, 0.7)]:
    student, teacher = 2 * torch.randn(3, width), 2 * torch.randn(3, other_width)
    out["uld"].append({"n": 3, "student": student.flatten().tolist(), "teacher": teacher.flatten().tolist(), "temperature": temperature,
                       **graded(lambda x: uld(x, teacher, temperature), student)})
for temperature in (1.0, 2.0):
    student, teacher, mine, other = 2 * torch.randn(4, 7), 2 * torch.randn(4, 6), [0, 2, 5], [1, 5, 3]
    out["shared"].append({"n": 4, "student": student.flatten().tolist(), "teacher": teacher.flatten().tolist(), "mine": mine, "other": other, "temperature": temperature,
                          **graded(lambda x: shared(x, teacher, mine, other, temperature), student)})
    a, b = [3, 0, 2, 4, 1], [5, 1, 0, 2]
    sa, sb = [0, 0, 1, 2, 2], [0, 1, 1, 2]
    student, teacher = torch.randn(5, 5), torch.randn(4, 6)
    out["spans"].append({"student": student.flatten().tolist(), "teacher": teacher.flatten().tolist(), "student_tokens": a, "teacher_tokens": b, "student_spans": sa, "teacher_spans": sb, "temperature": temperature,
                         **graded(lambda x: spans(x, teacher, a, b, sa, sb, temperature), student)})
student, teacher, tokens, rows = torch.randn(6, 5), torch.randn(6, 5), [1, 4, 0, 2, 2, 3], [0, 0, 0, 1, 1, 2]
out["policy"].append({"student": student.flatten().tolist(), "teacher": teacher.flatten().tolist(), "tokens": tokens, "rows": rows, **graded(lambda x: policy(x, teacher, tokens, rows), student)})
for length, a, b in [(20, 6, 5), (12, 12, 3), (9, 1, 4), (30, 11, 13)]:
    ends = [sorted(set((torch.randperm(length - 1)[: count - 1] + 1).tolist())) + [length] for count in (a, b)]
    common = [0] + sorted(set(ends[0]) & set(ends[1]))
    groups = []
    for low, high in zip(common, common[1:]):  # tokens whose end lies in (low, high]
        groups.append([next(i for i, e in enumerate(ends[0]) if e > low), ends[0].index(high) + 1, next(i for i, e in enumerate(ends[1]) if e > low), ends[1].index(high) + 1])
    out["alignment"].append({"student": ends[0], "teacher": ends[1], "spans": groups})

path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "cross_tokenizer.json"
path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
