#!/usr/bin/env python3
"""Pruning of single weights beside the authors' own implementations of Wanda and SparseGPT: perplexity and CPU seconds, one table.

usage: prune_vs_reference.py --table PROGRAM --teacher MODEL.gguf --calibration TEXT --test TEXT --sparsegpt FOLDER --wanda FOLDER
                             [--tokens 65536] [--windows 40] [--threads 1] [--only wanda|sparsegpt] [--patterns 50%,2:4] [--bits 4]
                             [--order reference|sequential]

FOLDER: a clone of github.com/IST-DASLab/sparsegpt and of github.com/locuslab/wanda. Their classes `SparseGPT` and `WrappedGPT` run
unchanged (block size 128, damping .01); the loop over the layers follows their scripts for Llama: the inputs of a layer come through
the pruned layers before it, all seven matrices of a layer see the unpruned layer's inputs. PROGRAM: benchmarks/prune_table, told to
prune in the same order (true_sequential=0) or, with `--order sequential`, in the order that kompakt takes unless told otherwise: part by part,
so that every matrix sees inputs that come through what was pruned before it, and one pass through a layer is enough. With --bits SparseGPT rounds in the same sweep, by the authors' quantizer (a scale and a zero
point a row, from the extremes); ours is `quantize: {method: gptq, sparse: ...}`, which goes part by part. Both see the same weights (the GGUF file decoded), calibration windows of 512 and test windows.
CPU seconds: pruning alone, statistics and forward passes included, loading and scoring not.

needs: torch, transformers, gguf, accelerate
"""
import argparse
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name in ("table", "teacher", "calibration", "test", "sparsegpt", "wanda"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--tokens", type=int, default=65536)
parser.add_argument("--windows", type=int, default=40)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--only", default="")
parser.add_argument("--patterns", default="50%,2:4")
parser.add_argument("--precision", default="float32", choices=("float32", "bf16", "auto"), help="of kompakt's passes over calibration text and of moments; the reference computes in float32")
parser.add_argument("--order", default="reference", choices=("reference", "sequential"), help="of kompakt: that of the authors' scripts, or its own default")
parser.add_argument("--bits", type=int, default=0, choices=(0, 4))
o = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(o.threads)

import torch  # noqa: E402  (reads the number of threads when it is imported)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(o.threads)
logging.disable_progress_bar()
torch.cuda.synchronize = lambda: None  # SparseGPT's timer calls it even on a CPU
WINDOW = 512


def load(folder, file, name):
    sys.path.insert(0, str(pathlib.Path(folder)))
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(folder) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


REFERENCE = load(o.sparsegpt, "sparsegpt.py", "reference_sparsegpt")
SparseGPT = REFERENCE.SparseGPT
WrappedGPT = load(o.wanda, "lib/layerwrapper.py", "reference_wanda").WrappedGPT
source = pathlib.Path(o.teacher)
tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def fresh_model():
    return AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()


def windows(path, count):
    ids = tokenizer(pathlib.Path(path).read_text(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    count = min(count, len(ids) // WINDOW)
    return ids[: count * WINDOW].view(count, WINDOW)


@torch.no_grad()
def perplexity(model, test):
    total = 0.0
    for row in test:
        log_p = torch.log_softmax(model(row[None], use_cache=False).logits[0, :-1], -1)
        total -= log_p.gather(1, row[1:, None]).double().sum().item()
    return torch.tensor(total / (len(test) * (WINDOW - 1))).exp().item()


class Stop(Exception):
    pass


@torch.no_grad()
def prune(model, calibration, method, pattern):
    """The reference scripts' loop: catch the first layer's inputs, then layer by layer statistics, pruning, new outputs."""
    n, m = (int(x) for x in pattern.split(":")) if ":" in pattern else (0, 0)
    sparsity = 0.0 if m else float(pattern.rstrip("%")) / 100
    layers, inputs, arguments = model.model.layers, [], {}

    def catch(_, args, kwargs):
        inputs.append(args[0].clone())
        arguments.update({k: v for k, v in kwargs.items() if k != "past_key_values"})
        raise Stop

    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in calibration:
        try:
            model(row[None], use_cache=False)
        except Stop:
            pass
    hook.remove()
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    for layer in layers:
        linears = {name: x for name, x in layer.named_modules() if isinstance(x, torch.nn.Linear)}
        wrapped = {name: (SparseGPT if method == "sparsegpt" else WrappedGPT)(x) for name, x in linears.items()}
        hooks = [x.register_forward_hook(lambda _, inp, out, name=name: wrapped[name].add_batch(inp[0].data, out.data)) for name, x in linears.items()]
        for x in inputs:
            layer(x, **arguments)
        for h in hooks:
            h.remove()
        for name, linear in linears.items():
            if method == "sparsegpt":
                if o.bits:
                    wrapped[name].quantizer = REFERENCE.Quantizer()
                    wrapped[name].quantizer.configure(o.bits, perchannel=True, sym=False, mse=False)
                wrapped[name].fasterprune(sparsity, prunen=n, prunem=m, percdamp=0.01, blocksize=128)
                wrapped[name].free()
                continue
            metric = linear.weight.data.abs() * wrapped[name].scaler_row.reshape(1, -1).sqrt()
            mask = torch.zeros_like(metric, dtype=torch.bool)
            if m:
                for at in range(0, metric.shape[1], m):
                    mask.scatter_(1, at + torch.topk(metric[:, at:at + m], n, dim=1, largest=False)[1], True)
            else:
                order = torch.sort(metric, dim=-1, stable=True)[1]
                mask.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)
            linear.weight.data[mask] = 0
        inputs = [first(layer(x, **arguments)) for x in inputs]


def ours():
    """Rows of prune_table: name -> (perplexity, CPU seconds)."""
    names = [f"{method} {pattern}{SUFFIX}" for method in methods for pattern in o.patterns.split(",")]
    out = subprocess.run([o.table, o.teacher, o.calibration, o.test, "table=weights", f"true_sequential={int(o.order == 'sequential')}", f"precision={o.precision}", f"tokens={o.tokens}", f"test={o.windows * WINDOW}", "only==" + ",".join(names)],
                         check=True, capture_output=True, text=True).stdout
    rows = {}
    for line in out.splitlines():
        if found := re.match(r"(\S.*?)\s{2,}([\d.]+)\s+([\d.]+)\s+([\d.]+)", line):
            rows[found[1]] = (float(found[2]), float(found[4]))
    return rows


methods = [m for m in ("wanda", "sparsegpt") if o.only in ("", m) and not (o.bits and m == "wanda")]
SUFFIX = f" {o.bits} bit joint" if o.bits else ""
calibration, test = windows(o.calibration, o.tokens // WINDOW), windows(o.test, o.windows)
print(f"{len(calibration)} calibration windows, {len(test)} test windows of {WINDOW} tokens, {o.threads} thread(s)")
print(f"float model: perplexity {perplexity(fresh_model(), test):.4f} (PyTorch)")
table = ours()
print(f"float model: perplexity {table['float'][0]:.4f} (kompakt)\n")
print(f"{'':18}{'reference':>12}{'kompakt':>12}{'ratio':>8}{'CPU s':>10}{'CPU s':>9}{'faster':>8}")
for method in methods:
    for pattern in o.patterns.split(","):
        model = fresh_model()
        start = time.process_time()
        stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
        try:
            prune(model, calibration, method, pattern)
        finally:
            sys.stdout.close()
            sys.stdout = stdout
        seconds = time.process_time() - start
        theirs, (perplexity_ours, seconds_ours) = perplexity(model, test), table[f"{method} {pattern}{SUFFIX}"]
        print(f"{method + ' ' + pattern:18}{theirs:12.4f}{perplexity_ours:12.4f}{perplexity_ours / theirs:8.4f}{seconds:10.1f}{seconds_ours:9.1f}{seconds / seconds_ours:8.2f}", flush=True)
