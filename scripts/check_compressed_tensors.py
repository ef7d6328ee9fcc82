#!/usr/bin/env python3
"""Does compressed-tensors compute from our folder what we compute? Loads an export in transformers and compares logits with ours.

usage: check_compressed_tensors.py ARTIFACT --program build/.../benchmarks/model_logits [--rows 16] [--length 16] [--share 0.25]
  ARTIFACT  folder of a run with `export: {formats: [compressed-tensors]}`, a decoder

needs: torch, transformers, compressed-tensors, safetensors. Our side is the program model_logits, which reads ARTIFACT with kompakt's own reader.

Weights are decoded to the same values, and without rounded activations the logits are the same up to float sums. Rounding is a
step function: where sums of another order meet a tie, a code flips, and later layers and tokens differ by more than float noise; the
longer the texts, the more of them. Symmetric dynamic int8 has a tie in every token: its largest magnitude, when negative, is -127.5 times the
scale (stories260K: 155 of 256 positions are equal up to float sums, KL 12% of what rounding does; all 256 with a zero point). So the bar for
rounded activations, keys or values is the mean KL between the two, as a share of what that rounding itself does (the same folder with
rounding switched off in compressed-tensors), on many short rows. Exit 0 when the bar is met.

Keys and values are rounded here with the library's function and the file's scales: compressed-tensors 0.20 does not find the attention modules
of transformers 5.24. That pair does not load packed zero points either (int4_asym without rounded activations).
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

EXACT = 1e-3  # largest difference of logits without rounding, over the largest logit


class RoundedCache(DynamicCache):
    """A cache that holds what the scheme can represent."""

    def __init__(self, scheme, tensors):
        super().__init__()
        self.scheme, self.tensors = QuantizationArgs(**scheme), tensors

    def update(self, keys, values, layer, *rest, **named):
        keys, values = (fake_quantize(x, self.tensors[f"model.layers.{layer}.self_attn.{part}_scale"], None, self.scheme) for part, x in (("k", keys), ("v", values)))
        return super().update(keys, values, layer, *rest, **named)


def divergence(a, b):
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=pathlib.Path)
    parser.add_argument("--program", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.25, help="of the divergence that rounding makes")
    options = parser.parse_args()

    config = json.loads((options.artifact / "config.json").read_text())
    settings = config["quantization_config"]
    inputs = [group["input_activations"] for group in settings["config_groups"].values()]
    rounded = settings["kv_cache_scheme"] is not None or any(row is not None for row in inputs)
    vocabulary = config["vocab_size"]
    ids = torch.tensor([[(r * 4099 + t * 7919) % vocabulary for t in range(options.length)] for r in range(options.rows)])
    with tempfile.TemporaryDirectory() as folder:
        text, out = pathlib.Path(folder) / "ids.txt", pathlib.Path(folder) / "logits.safetensors"
        text.write_text("\n".join(" ".join(map(str, row)) for row in ids.tolist()) + "\n")
        subprocess.run([options.program, options.artifact, text, out], check=True)
        ours = load_file(out)["logits"]

    model = AutoModelForCausalLM.from_pretrained(options.artifact, dtype=torch.float32).eval()
    with torch.inference_mode():
        scheme = settings["kv_cache_scheme"]
        theirs = model(ids, past_key_values=RoundedCache(scheme, load_file(options.artifact / "model.safetensors")) if scheme else None).logits.float()
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False
        plain = model(ids).logits.float()
    scale = float(theirs.abs().max())
    largest, mean = float((ours - theirs).abs().max()), divergence(theirs, ours)
    effect = divergence(theirs, plain)
    noise = int(((ours - theirs).abs().amax(-1) <= EXACT * scale).sum())
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    print(f"format {settings['format']}, activations {inputs}, key/value cache {settings['kv_cache_scheme']}")
    print(f"largest difference of logits {largest:.3e} (largest logit {scale:.2f}), KL {mean:.3e} nats a token, likeliest token the same at {same} of {ids.numel()} positions")
    print(f"equal up to float sums at {noise} of {ids.numel()} positions")
    print(f"what rounding does in compressed-tensors itself: KL {effect:.3e}")
    passed = mean <= options.share * effect if rounded else largest <= EXACT * scale
    if rounded and effect <= 0:
        print("nothing was rounded in compressed-tensors")
        passed = False
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
