#!/usr/bin/env python3
"""A small Llama over characters, trained in minutes: the model on which quantization methods are compared rung by rung.

Writes OUT/config.json, OUT/model.safetensors (Hugging Face names) and OUT/tokens.safetensors with the int64 matrices
"calibration" [272, 128] from the training text and "evaluation" [96, 129] from text held out of it, for
benchmarks/tuning_ladder. 4 layers of width 128, 4 query heads on 2 key/value heads, feed-forward 384, vocabulary 97
(printable ASCII and the line end), untied head.

    python3 scripts/make_toy_model.py --out /tmp/toy book1.txt book2.txt
    python3 scripts/make_toy_model.py --out /tmp/stories --llama2c stories260K.bin --tokenizer tok512.bin stories.txt

The second form trains nothing: it converts a llama2.c file and cuts the text into windows of 256 tokens with its vocabulary.
Needs torch, numpy and safetensors; one thread.
"""
import argparse
import json
import math
import pathlib
import struct
import time

import numpy as np
import torch
from safetensors.torch import save_file

DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 128, 384, 4, 4, 2, 97
HEAD_DIM = DIM // HEADS
CHUNK = 4096  # characters that stay together when text is divided into training and evaluation


def config(dim, ffn, layers, heads, kv_heads, vocab, context, tied):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": tied}


def shapes(dim, ffn, heads, kv_heads):
    head_dim = dim // heads
    return {"self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv_heads * head_dim, dim), "self_attn.v_proj": (kv_heads * head_dim, dim),
            "self_attn.o_proj": (dim, dim), "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim), "mlp.down_proj": (dim, ffn)}


def initial():
    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, DIM) * 0.5, "lm_head.weight": torch.randn(VOCAB, DIM) * 0.7 / math.sqrt(DIM), "model.norm.weight": torch.ones(DIM)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights[at + "input_layernorm.weight"] = torch.ones(DIM)
        weights[at + "post_attention_layernorm.weight"] = torch.ones(DIM)
        for name, (rows, columns) in shapes(DIM, FFN, HEADS, KV_HEADS).items():
            scale = 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            weights[at + name + ".weight"] = torch.randn(rows, columns) * scale * 0.7 / math.sqrt(columns)
    return weights


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x):
    length, half = x.shape[2], x.shape[3] // 2
    angles = torch.outer(torch.arange(length).float(), 1 / 10000.0 ** (torch.arange(half).float() / half))
    cos, sin, a, b = angles.cos(), angles.sin(), x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def forward(weights, ids):
    rows, length = ids.shape
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        linear = lambda name, value: value @ weights[at + name + ".weight"].T
        h = norm(x, weights[at + "input_layernorm.weight"])
        heads = lambda name, count: linear(name, h).view(rows, length, count, HEAD_DIM).transpose(1, 2)
        q, k, v = rotate(heads("self_attn.q_proj", HEADS)), rotate(heads("self_attn.k_proj", KV_HEADS)), heads("self_attn.v_proj", KV_HEADS)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear("self_attn.o_proj", mixed.transpose(1, 2).reshape(rows, length, DIM))
        h = norm(x, weights[at + "post_attention_layernorm.weight"])
        x = x + linear("mlp.down_proj", torch.nn.functional.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h))
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def characters(files):
    text = "".join(pathlib.Path(f).read_text(encoding="utf-8", errors="ignore") for f in files)
    data = np.frombuffer("".join(c for c in text if c == "\n" or 32 <= ord(c) < 127).encode("ascii"), dtype=np.uint8).astype(np.int64)
    return torch.from_numpy(np.where(data == 10, VOCAB - 2, data - 32))


def windows(ids, count, length, seed):
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[s:s + length] for s in starts.tolist()])


def split(ids):
    chunks = ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(7))
    held = max(1, len(chunks) // 20)
    return chunks[order[held:]].reshape(-1), chunks[order[:held]].reshape(-1)


def train(ids, held, steps):
    torch.manual_seed(0)
    weights = initial()
    values = [w.requires_grad_(True) for w in weights.values()]
    groups = [{"params": [w for w in values if w.dim() > 1], "weight_decay": 0.05}, {"params": [w for w in values if w.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    draws, start = torch.Generator().manual_seed(1), time.time()
    for step in range(steps):
        rate = 3e-3 * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(ids) - 129, (16,), generator=draws)
        batch = torch.stack([ids[s:s + 129] for s in starts.tolist()])
        loss = torch.nn.functional.cross_entropy(forward(weights, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            with torch.no_grad():
                batch = windows(held, 64, 129, 5)
                value = torch.nn.functional.cross_entropy(forward(weights, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            print(f"step {step + 1}: training {loss.item():.3f}, held out {value.item():.4f} nats, {time.time() - start:.0f} s", flush=True)
    return {name: w.detach() for name, w in weights.items()}


def read_llama2c(path):
    raw = pathlib.Path(path).read_bytes()
    dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack("7i", raw[:28])
    data, at = torch.from_numpy(np.frombuffer(raw[28:], dtype=np.float32).copy()), 0

    def take(*shape):
        nonlocal at
        count = math.prod(shape)
        at += count
        return data[at - count:at].view(*shape)

    def half_split(w, count):  # rotary pairs (2i, 2i+1) of a head become (i, i + head_dim/2)
        return w.view(count, -1, 2, dim).transpose(1, 2).reshape(w.shape)

    head_dim = dim // heads
    out = {"model.embed_tokens.weight": take(abs(vocab), dim)}
    parts = [("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv_heads * head_dim, dim)), ("self_attn.v_proj", (kv_heads * head_dim, dim)),
             ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (ffn, dim)), ("mlp.down_proj", (dim, ffn)), ("mlp.up_proj", (ffn, dim))]
    for name, shape in parts:
        for layer, value in enumerate(take(layers, *shape)):
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            out[f"model.layers.{layer}.{name}.weight"] = half_split(value, turned) if turned else value
    out["model.norm.weight"] = take(dim)
    return out, config(dim, ffn, layers, heads, kv_heads, abs(vocab), context, True)


def read_vocabulary(path, size):
    raw, at, pieces = pathlib.Path(path).read_bytes(), 4, {}
    for token in range(size):
        score, length = struct.unpack("fi", raw[at:at + 8])
        pieces[raw[at + 8:at + 8 + length]] = (token, score)
        at += 8 + length
    return pieces


def encode(text, pieces):
    """Byte-pair merging by score, as llama2.c does it; id 1 begins a text."""
    out = []
    by_id = {token: piece for piece, (token, _) in pieces.items()}
    for c in " " + text:
        piece = c.encode()
        out += [pieces[piece][0]] if piece in pieces else [b + 3 for b in piece]
    while True:
        best = max(((pieces.get(by_id[a] + by_id[b], (0, -1e10))[1], -i) for i, (a, b) in enumerate(zip(out, out[1:]))), default=(-1e10, 0))
        if best[0] <= -1e10:
            return [1] + out
        i = -best[1]
        out[i:i + 2] = [pieces[by_id[out[i]] + by_id[out[i + 1]]][0]]


def tokenizer_json(pieces):
    """The same merges as a tokenizer.json: SentencePiece's BPE takes the pair whose piece has the best score, so all splits of a piece are merges of its rank."""
    by_id = [piece for piece, _ in sorted(pieces.items(), key=lambda item: item[1][0])]
    names = [{0: "<unk>", 1: "<s>", 2: "</s>"}.get(i, piece.decode("utf-8", "replace").replace(" ", "\u2581")) for i, piece in enumerate(by_id)]
    merges = []
    for piece, (token, score) in sorted(pieces.items(), key=lambda item: -item[1][1]):
        if token < 259:  # special tokens and bytes
            continue
        text = piece.decode("utf-8")
        halves = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [[half.replace(" ", "\u2581") for half in pair] for pair in halves if all(half.encode() in pieces for half in pair)]
    special = [{"id": i, "content": names[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i in range(3)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "pre_tokenizer": None, "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": {name: i for i, name in enumerate(names)}, "merges": merges},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--llama2c")
    parser.add_argument("--tokenizer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.llama2c:
        weights, shape = read_llama2c(options.llama2c)
        pieces = read_vocabulary(options.tokenizer, shape["vocab_size"])
        ids = []
        for story in pathlib.Path(options.text[0]).read_text(encoding="utf-8").split("<|endoftext|>"):
            if story.strip():
                ids += encode(story.strip(), pieces)
            if len(ids) >= (272 + 96) * 256 + 4096:
                break
        ids = torch.tensor(ids)
        calibration = ids[: 272 * 256].view(272, 256).clone()
        evaluation = ids[272 * 256 + 2048:][: 96 * 257].view(96, 257).clone()
        (options.out / "tokenizer.json").write_text(json.dumps(tokenizer_json(pieces), ensure_ascii=False) + "\n")
        (options.out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}) + "\n")
    else:
        ids, held = split(characters(options.text))
        print(f"{len(ids)} characters of training text, {len(held)} held out", flush=True)
        weights, shape = train(ids, held, options.steps), config(DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, 512, False)
        calibration, evaluation = windows(ids, 272, 128, 11), windows(held, 96, 129, 12)
    save_file({name: value.contiguous() for name, value in weights.items()}, options.out / "model.safetensors", metadata={"format": "pt"})
    save_file({"calibration": calibration, "evaluation": evaluation}, options.out / "tokens.safetensors")
    (options.out / "config.json").write_text(json.dumps(shape, indent=2) + "\n")


if __name__ == "__main__":
    main()
