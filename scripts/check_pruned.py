#!/usr/bin/env python3
"""Is a pruned checkpoint a plain one? Loads it strictly in transformers and compares logits with ours.

usage: check_pruned.py FOLDER --program build/.../benchmarks/model_logits [--rows 4] [--length 32] [--tolerance 1e-4]
  FOLDER  a stage folder or safetensors export of a decoder without rounded activations

Needs torch, transformers, safetensors. Our side is the program model_logits, with kompakt's own reader and forward pass. The bar is the largest
difference relative to the largest logit. Exit 0 when it is met and no tensor was missing, unused or of another shape.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    model, loading = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    faults = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (options.rows, options.length))
    with tempfile.TemporaryDirectory() as work:
        lines = pathlib.Path(work, "ids.txt")
        lines.write_text("".join(" ".join(map(str, row.tolist())) + "\n" for row in ids))
        subprocess.run([options.program, str(options.folder), str(lines), str(pathlib.Path(work, "out.safetensors"))], check=True)
        ours = load_file(pathlib.Path(work, "out.safetensors"))["logits"]
    with torch.no_grad():
        theirs = model.eval()(ids).logits
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    config = model.config
    print(f"{type(model).__name__}: hidden {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}, feed-forward {config.intermediate_size}, {config.num_hidden_layers} layers, "
          f"head {'tied' if config.tie_word_embeddings else 'its own'}: largest relative difference {difference:.2e}")
    for key, value in faults.items():
        print(f"{key}: {value}")
    return 0 if difference <= options.tolerance and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
