#!/usr/bin/env python3
"""kompakt beside the quantizers that pip can install: one table of file size, divergence from the teacher, CPU seconds and peak memory.

usage: quantize_vs_peers.py --kompakt PROGRAM --teacher MODEL.gguf --calibration TEXT --test TEXT
                            [--tokens 8192] [--windows 10] [--threads 1] [--only NAME,...] [--work DIR] [--list]

Every row is a process of its own, so that CPU seconds and peak memory are its own. All rows see the same calibration tokens (windows of
512 from the start of the text, no special tokens) and are scored by the same PyTorch code in float32: KL(teacher || quantized) in nats
per token, perplexity and same likeliest token over the first windows of the test text, given the weights that their files decode to.
Bytes are those of the weight files, embedding included.

CPU seconds: for kompakt the whole program, start and loading included; for the others their quantization call alone, without imports,
loading and saving. Rows whose package is missing are listed as such. Compare CPU seconds only inside one table of a quiet machine.

needs: torch, transformers, gguf; for the rivals' rows gptqmodel, llmcompressor, torchao.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

WINDOW = 512


# What a rival's row does: quantizes the float32 model of `o.hf` with the windows, saves to `out`; returns CPU seconds of its call.
def run_gptqmodel(o, out, bits, group):
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader wants two workers and takes half of the cores
    from gptqmodel import GPTQModel, QuantizeConfig
    model = GPTQModel.load(o.hf, QuantizeConfig(bits=bits, group_size=group, device="cpu"))
    data = [dict(input_ids=w.tolist(), attention_mask=[1] * WINDOW) for w in windows(o, o.calibration, o.tokens // WINDOW)]
    start = time.process_time()
    model.quantize(data, batch_size=1)
    seconds = time.process_time() - start
    model.save(out)
    return seconds


def read_gptqmodel(o, out, model):
    import torch
    from gptqmodel import BACKEND, GPTQModel
    quantized = GPTQModel.load(out, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    modules = dict(model.named_modules())
    for name, module in quantized.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            modules[name].weight.data.copy_(module.dequantize_weight().detach().float().T)


def run_llmcompressor(o, out, bits, group):
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(o.hf, dtype=torch.float32)
    x = windows(o, o.calibration, o.tokens // WINDOW)
    data = Dataset.from_dict({"input_ids": x.tolist(), "attention_mask": torch.ones_like(x).tolist()})
    scheme = {"g": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group))}
    start = time.process_time()
    oneshot(model=model, dataset=data, recipe=GPTQModifier(config_groups=scheme, ignore=["lm_head"]), max_seq_length=WINDOW, num_calibration_samples=len(x))
    seconds = time.process_time() - start
    model.save_pretrained(out, save_compressed=True)
    return seconds


def read_saved(o, out, model):
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False))  # decoded weights
    modules = dict(saved.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(modules[name].weight.data.float())


def run_torchao(o, out, bits, group):
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(o.hf, dtype=torch.float32)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group))
    start = time.process_time()
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)
    seconds = time.process_time() - start
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), pathlib.Path(out) / "model.pt")
    return seconds


def read_torchao(o, out, model):
    import torch
    import torchao  # noqa: F401  its tensor types
    state = torch.load(pathlib.Path(out) / "model.pt", weights_only=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = state[name]
            parameter.copy_(value.dequantize() if hasattr(value, "dequantize") and not value.is_quantized else value)


# name -> (package, run, read, arguments); kompakt's rows: name -> options of the stage quantize, and what --set adds
RIVALS = {
    "gptqmodel 4-bit g64": ("gptqmodel", run_gptqmodel, read_gptqmodel, dict(bits=4, group=64)),
    "gptqmodel 2-bit g32": ("gptqmodel", run_gptqmodel, read_gptqmodel, dict(bits=2, group=32)),
    "llmcompressor gptq 4-bit g64": ("llmcompressor", run_llmcompressor, read_saved, dict(bits=4, group=64)),
    "torchao int4 g64 (rounding)": ("torchao", run_torchao, read_torchao, dict(bits=4, group=64)),
}
OURS = {
    "kompakt gptq int4 g64": "{weights: int4, group: 64, method: gptq, embedding: none}",
    "kompakt gptq int4 g64 (bf16 passes)": "{weights: int4, group: 64, method: gptq, embedding: none, calibration_precision: bf16}",  # gptqmodel's own choice on a CPU
    "kompakt gptq int4_asym g64": "{weights: int4_asym, group: 64, method: gptq, embedding: none}",
    "kompakt gptq int4 g64, int8 embedding": "{weights: int4, group: 64, method: gptq, embedding: int8}",
    "kompakt trifit int4 g64, int8 embedding": "{weights: int4, group: 64, method: trifit, embedding: int8}",
    "kompakt gptq int2 g32": "{weights: int2_asym, group: 32, method: gptq, embedding: none}",
    "kompakt trifit q2_0, q8_0 embedding": "{weights: q2_0, method: trifit, embedding: q8_0}",
    "kompakt trifit ternary g64, int8 embedding": "{weights: ternary, group: 64, method: trifit, embedding: int8}",
}


def windows(o, text, count):
    import torch
    from transformers import AutoTokenizer
    ids = AutoTokenizer.from_pretrained(o.hf)(pathlib.Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids[:count * WINDOW])
    return ids[:len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def make_teacher(o):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if (pathlib.Path(o.hf) / "config.json").exists():
        return
    folder, file = os.path.split(o.teacher)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # Its weights are floats by now, which transformers 5.17 does not believe: it refuses to save what came from a GGUF file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(o.hf)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(o.hf)


def score(o, name, out):
    """One row's quality, in this process."""
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(o.threads)
    teacher = AutoModelForCausalLM.from_pretrained(o.hf, dtype=torch.float32).eval()
    if name in OURS:
        model = AutoModelForCausalLM.from_pretrained(pathlib.Path(out) / "run/artifact/safetensors", dtype=torch.float32).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(o.hf, dtype=torch.float32).eval()
        RIVALS[name][2](o, out, model)
    kl = loss = same = count = 0.0
    with torch.inference_mode():
        for w in windows(o, o.test, o.windows):
            p = torch.log_softmax(teacher(input_ids=w[None]).logits[0, :-1].float(), -1)
            q = torch.log_softmax(model(input_ids=w[None]).logits[0, :-1].float(), -1)
            kl += (p.exp() * (p - q)).sum().item()
            loss -= q.gather(1, w[1:, None]).sum().item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            count += len(w) - 1
    return dict(kl=kl / count, perplexity=float(torch.tensor(loss / count).exp()), same_top1=100 * same / count, scored_tokens=int(count))


def weight_bytes(out, ours):
    files = pathlib.Path(out, "run/artifact/kompakt").rglob("*") if ours else pathlib.Path(out).rglob("*")
    return sum(f.stat().st_size for f in files if f.suffix in (".safetensors", ".pt"))


def child(o, command, environment):
    """Runs a command; CPU seconds, peak resident bytes and output of that process alone."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=o.work)  # gptqmodel leaves logs where it runs
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        text = log.read()
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text


def our_row(o, name, out, environment):
    recipe = out / "recipe.yaml"
    recipe.write_text(f"""name: peers
seed: 17
teacher: {{path: {o.teacher}}}
data:
  calibration: {{files: [{o.calibration}], format: text, tokens: {o.tokens}, max_length: {WINDOW}}}
stages:
  - quantize: {OURS[name]}
  - export: {{formats: [kompakt, safetensors]}}
""")
    command = [o.kompakt, "run", str(recipe), "--out", str(out / "run"), "--set", f"store={out / 'store'}", "--quiet"]
    status, seconds, peak, text = child(o, command + ["--until", "quantize"], environment)
    if status:
        return dict(failed=text.strip().splitlines()[0] if text.strip() else f"exit {status}")
    status, _, _, text = child(o, command + ["--resume"], environment)
    return dict(cpu_seconds=seconds, peak_bytes=peak) if status == 0 else dict(failed=text.strip().splitlines()[0])


def rival_row(o, name, out, environment, arguments):
    if importlib.util.find_spec(RIVALS[name][0]) is None:
        return dict(failed=f"package {RIVALS[name][0]} is not installed")
    status, _, peak, text = child(o, [sys.executable, os.path.abspath(__file__), *arguments, "--row", name, "--out", str(out / "model")], environment)
    answers = [line for line in text.splitlines() if line.startswith('{"cpu_seconds"')]
    if status or not answers:
        return dict(failed=(text.strip().splitlines() or ["no output"])[-1][:200])
    return dict(json.loads(answers[-1]), peak_bytes=peak)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kompakt", default="build/release/kompakt")
    for key in ("teacher", "calibration", "test"):
        parser.add_argument("--" + key)
    for key, value in (("tokens", 8192), ("windows", 10), ("threads", 1)):
        parser.add_argument("--" + key, type=int, default=value)
    parser.add_argument("--only", default="", help="comma-separated beginnings of row names")
    parser.add_argument("--work", default="")
    parser.add_argument("--list", action="store_true", help="names of all rows")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.list:
        print("\n".join([*OURS, *RIVALS]))
        return 0
    for key in ("teacher", "calibration", "test"):
        if not getattr(o, key) or not os.path.exists(getattr(o, key)):
            parser.error(f"--{key} must name a file")
        setattr(o, key, os.path.abspath(getattr(o, key)))
    o.kompakt = os.path.abspath(o.kompakt)
    o.work = os.path.abspath(o.work or tempfile.mkdtemp(prefix="quantize_vs_peers"))
    os.makedirs(o.work, exist_ok=True)
    o.hf = str(pathlib.Path(o.work, "teacher"))
    if o.row:
        import torch
        torch.set_num_threads(o.threads)
        print(json.dumps(dict(cpu_seconds=RIVALS[o.row][1](o, o.out, **RIVALS[o.row][3]))), flush=True)
        return 0
    if o.prepare:
        make_teacher(o)
        return 0
    if o.score:
        print(json.dumps(score(o, o.score, o.out)), flush=True)
        return 0

    environment = dict(os.environ, OMP_NUM_THREADS=str(o.threads), MKL_NUM_THREADS=str(o.threads))
    arguments = [x for key in ("kompakt", "teacher", "calibration", "test", "tokens", "windows", "threads", "work") for x in ("--" + key, str(getattr(o, key)))]
    # In a process of its own: a child's peak begins with what its parent had in memory when it was forked.
    status, _, _, text = child(o, [sys.executable, os.path.abspath(__file__), *arguments, "--prepare"], environment)
    if status:
        parser.error("the teacher cannot be read: " + (text.strip().splitlines() or ["no output"])[-1])
    rows, wanted = {}, [x for x in o.only.split(",") if x]
    for name in [*OURS, *RIVALS]:
        if wanted and not any(name.startswith(x) for x in wanted):
            continue
        out = pathlib.Path(o.work, "".join(c if c.isalnum() else "_" for c in name))
        out.mkdir(parents=True, exist_ok=True)
        row = our_row(o, name, out, environment) if name in OURS else rival_row(o, name, out, environment, arguments)
        if "failed" not in row:
            model = out if name in OURS else out / "model"
            row["bytes"] = weight_bytes(model, name in OURS)
            status, _, _, text = child(o, [sys.executable, os.path.abspath(__file__), *arguments, "--score", name, "--out", str(model)], environment)
            answers = [line for line in text.splitlines() if line.startswith('{"kl"')]
            row.update(json.loads(answers[-1]) if answers else dict(failed="not scored: " + (text.strip().splitlines() or [""])[-1][:160]))
        rows[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)

    print(f"\n{o.tokens} calibration tokens, {o.windows} windows of {WINDOW} scored, {o.threads} thread(s)")
    print(f"{'':44} {'MB':>7} {'KL':>8} {'ppl':>9} {'top-1':>6} {'CPU s':>7} {'peak GiB':>8}")
    for name, row in rows.items():
        if "kl" in row:
            print(f"{name:44} {row['bytes'] / 1e6:7.1f} {row['kl']:8.4f} {row['perplexity']:9.2f} {row['same_top1']:5.1f}% {row['cpu_seconds']:7.1f} {row['peak_bytes'] / 2**30:8.2f}")
        else:
            print(f"{name:44} {row['failed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
