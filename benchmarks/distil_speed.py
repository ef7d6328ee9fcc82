"""PyTorch eager beside benchmarks/distil_speed.cpp: the same weights, tokens, loss, clipping and optimizer.

usage: python distil_speed.py TEACHER_FOLDER [--steps 3] [--layers 20] [--batch 4] [--length 512] [--precision float32|bf16] [--threads 1] [--device cpu|cuda]
TEACHER_FOLDER: written by `distil_speed TEACHER --save FOLDER`.   needs torch and transformers
"""
import argparse
import copy
import os
import time

import torch
from transformers import AutoModelForCausalLM


def memory(field):
    if args.device != "cpu":
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_reserved}[field]() / 2**20
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def reset_peak():
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def clock():
    """CPU time on a CPU, where other programs do not count; wall time on a GPU."""
    if args.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.time()


def forward_kl(student, teacher):
    log_p, log_q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


parser = argparse.ArgumentParser()
parser.add_argument("teacher")
for name, default in {"steps": 3, "layers": 20, "batch": 4, "length": 512, "threads": 1}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--precision", default="float32")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32, attn_implementation="sdpa").eval().to(args.device)
student = copy.deepcopy(teacher).train()
kept = [i * len(teacher.model.layers) // args.layers for i in range(args.layers)]
student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in kept])
for i, layer in enumerate(student.model.layers):
    layer.self_attn.layer_idx = i
student.config.num_hidden_layers = args.layers
vocabulary = teacher.config.vocab_size
count = args.steps * args.batch * args.length
ids = torch.tensor([(i * 7919 + (i // 13) * 104729) % (vocabulary - 64) + 64 for i in range(count)]).view(args.steps, args.batch, args.length).to(args.device)
decayed = [p for p in student.parameters() if p.dim() == 2 and p is not student.model.embed_tokens.weight]
others = [p for p in student.parameters() if not any(p is d for d in decayed)]
optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
reset_peak()
base, losses, marks, start, cpu = memory("VmRSS"), [], [], time.time(), clock()
for batch in ids:
    with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
        with torch.no_grad():
            target = teacher(batch, use_cache=False).logits
        loss = forward_kl(student(batch, use_cache=False).logits[:, :-1], target[:, :-1])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    marks.append(clock())
each = [b - a for a, b in zip([cpu] + marks, marks)]
cpu, seconds = clock() - cpu, time.time() - start
print(f"{args.steps} steps of {args.batch} x {args.length}, {args.precision}: {count / cpu:.1f} tokens per cpu second ({count / seconds:.1f} a second), "
      f"peak {memory('VmHWM'):.0f} MiB, {base:.0f} MiB of them for models that were there")
print("cpu" if args.device == "cpu" else "wall", "seconds of the steps:", *(f"{x:.2f}" for x in each), f"; the fastest is {args.batch * args.length / min(each):.1f} tokens a second of that clock")
print("losses", *(f"{x:.5f}" for x in losses), "(rows in another order than the C++ side's: compare their mean)")

rows = args.batch * args.length
weight = student.lm_head.weight.detach().clone().requires_grad_()
hidden, other = torch.randn(rows, weight.shape[1], device=args.device, requires_grad=True), torch.randn(rows, weight.shape[1], device=args.device)
base = memory("VmRSS")
reset_peak()
start, cpu = time.time(), clock()
forward_kl(hidden @ weight.T, other @ weight.detach().T).backward()
print(f"loss alone: {rows} positions x {vocabulary} tokens, forward and backward of projection and KL: {clock() - cpu:.2f} cpu s, "
      f"{time.time() - start:.2f} s, {memory('VmHWM') - base:.0f} MiB beyond its inputs (its two logit tensors are {2 * rows * vocabulary * 4 / 2**20:.0f} MiB of them)")
