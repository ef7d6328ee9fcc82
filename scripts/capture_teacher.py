#!/usr/bin/env python3
"""Fills the teacher's cache of a distillation with another engine: vLLM, or transformers.

usage: capture_teacher.py FOLDER --model TEACHER [--backend vllm|transformers] [--rows-per-file 64] [--device cpu|cuda] [--dtype bfloat16]

FOLDER: a cache folder (…/teacher-outputs/teacher-KEY) with `wanted.h5`, which `kompakt run` writes when the recipe says
`cache: {fill: elsewhere, tail: 0}`. Copy that file to the machine with the engine if it is another one, and the part-*.h5 back.
TEACHER: the same model as the recipe's, in the form that the engine reads. What it computes is taken as it is: with bfloat16 or
quantized weights the student learns from those.

A row holds several documents, which do not see each other: each is scored as a text of its own. Parts that are there are left alone, so
that a run that was interrupted goes on; every part appears whole.

vllm: needs an engine that returns as many log-probabilities of prompt tokens as the cache keeps: LLM(max_logprobs=...) is set here.
needs: h5py, numpy, zstandard, and vllm or torch with transformers
"""
import argparse
import hashlib
import json
import os
import pathlib
import sys

import h5py
import numpy as np
import zstandard

LARGEST_GAP, SMALLEST_REST = 20.0, -17.0  # train/sparse_codec.cpp


def pack_bits(values, bits):
    """Least significant bit first; the last byte is filled with zeros."""
    planes = (values.astype(np.uint64)[:, None] >> np.arange(bits, dtype=np.uint64)) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little").tobytes()


def encode_row(ids, log_p, log_rest, vocabulary):
    """ids, log_p [T, top], falling; log_rest [T]. What train/sparse_codec.cpp reads, before compression."""
    bits = max(1, (max(vocabulary, 1) - 1).bit_length())
    rest = np.clip(log_rest, SMALLEST_REST, 0).astype(np.float32).astype(np.float16)
    gaps = np.zeros((ids.shape[0], ids.shape[1] - 1), np.uint8)
    below = np.zeros(ids.shape[0])  # decoded distance from the likeliest: errors do not add up
    for i in range(1, ids.shape[1]):
        code = np.rint(255 * np.sqrt(np.clip((log_p[:, 0] - log_p[:, i] - below) / LARGEST_GAP, 0, 1)))
        gaps[:, i - 1] = code
        below += (code / 255) ** 2 * LARGEST_GAP
    return rest.astype("<f2").tobytes() + gaps.tobytes() + pack_bits(ids.ravel(), bits)


def rest_of(log_p):
    """Log of what the kept tokens leave, [T]."""
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(1 - np.exp(log_p.astype(np.float64)).sum(-1), 0)).clip(SMALLEST_REST)


class Transformers:
    def __init__(self, args, top):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.top, self.device = torch, top, args.device
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval().to(args.device)

    def score(self, texts, vocabulary):
        for text in texts:
            with self.torch.no_grad():
                logits = self.model(self.torch.tensor([text], device=self.device)).logits[0, :, :vocabulary].float()
                best, ids = logits.log_softmax(-1).topk(self.top, -1)
            yield ids.cpu().numpy(), best.cpu().numpy()


class Vllm:
    def __init__(self, args, top):
        from vllm import LLM, SamplingParams

        self.top = top
        self.engine = LLM(args.model, dtype=args.dtype, max_logprobs=top, enable_prefix_caching=False)
        self.options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=top, logprobs=top, detokenize=False)

    def score(self, texts, vocabulary):
        answers = self.engine.generate([{"prompt_token_ids": text} for text in texts], self.options, use_tqdm=False)
        for text, answer in zip(texts, answers):
            # Place t of the prompt was predicted at place t - 1; the token that follows the text comes from what was generated.
            places = list(answer.prompt_logprobs[1:]) + [answer.outputs[0].logprobs[0]]
            ids, log_p = np.zeros((len(text), self.top), np.int64), np.zeros((len(text), self.top), np.float32)
            for t, place in enumerate(places):
                best = sorted(((entry.logprob, -token) for token, entry in place.items() if token < vocabulary), reverse=True)[: self.top]
                if len(best) < self.top:
                    sys.exit(f"the engine gave {len(best)} log-probabilities of {self.top}: padding rows of its vocabulary are among them, or its limit is lower; set cache.top in the recipe")
                log_p[t], ids[t] = [b[0] for b in best], [-b[1] for b in best]
            yield ids, log_p


def documents_of(ids, documents):
    """Runs of one document: (begin, end)."""
    edges = np.flatnonzero(np.diff(documents)) + 1
    return list(zip([0, *edges], [*edges, len(ids)]))


def write_part(folder, identity, rows, texts, frames):
    """Named after its rows, as kompakt does, and renamed into place."""
    name = folder / f"part-{hashlib.sha256(np.array(rows, '<i8').tobytes()).hexdigest()[:16]}.h5"
    partial = name.with_suffix(f".{os.getpid()}.partial")
    with h5py.File(partial, "w") as file:
        file.attrs["identity"] = identity
        file["rows"], file["texts"] = np.array(rows, "<i8"), np.array(texts, "<u8")
        file["offsets"] = np.cumsum([0, *map(len, frames)]).astype("<i8")
        file["bytes"] = np.frombuffer(b"".join(frames), np.uint8)
    partial.rename(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--rows-per-file", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    wanted = args.folder / "wanted.h5"
    if not wanted.exists():
        sys.exit(f"{wanted} is not there: run the recipe with cache: {{fill: elsewhere, tail: 0}} first; it writes that file")
    with h5py.File(wanted) as file:
        identity = file.attrs["identity"]
        rows, texts, ids, documents = (file[name][:] for name in ("rows", "texts", "ids", "documents"))
    identity = identity.decode() if isinstance(identity, bytes) else str(identity)
    layout = json.loads(identity)
    top, length, vocabulary = layout["top"], layout["sequence_length"], layout["vocabulary"]
    if layout["tail"] != 0:
        sys.exit("the recipe wants draws from the tail, which an engine does not give: set cache.tail: 0")
    ids, documents = ids.reshape(-1, length), documents.reshape(-1, length)
    known = set()
    for part in sorted(args.folder.glob("part-*.h5")):
        with h5py.File(part) as file:
            known.update(file["rows"][:].tolist())
    left = [i for i in range(len(rows)) if rows[i] not in known]
    print(f"{len(left)} of {len(rows)} rows of {length} tokens to compute, {top} log-probabilities each", flush=True)
    if not left:
        return
    engine = {"vllm": Vllm, "transformers": Transformers}[args.backend](args, top)
    compressor = zstandard.ZstdCompressor()
    for first in range(0, len(left), args.rows_per_file):
        chosen = sorted(left[first : first + args.rows_per_file], key=lambda i: rows[i])
        pieces = [(i, begin, end) for i in chosen for begin, end in documents_of(ids[i], documents[i])]
        row_ids, row_log_p = {i: np.zeros((length, top), np.int64) for i in chosen}, {i: np.zeros((length, top), np.float32) for i in chosen}
        for (i, begin, end), (found, log_p) in zip(pieces, engine.score([ids[i][begin:end].tolist() for i, begin, end in pieces], vocabulary)):
            if not np.isfinite(log_p).all():
                sys.exit(f"row {rows[i]}: the engine's log-probabilities are not finite; try another --dtype")
            row_ids[i][begin:end], row_log_p[i][begin:end] = found, log_p
        frames = [compressor.compress(encode_row(row_ids[i], row_log_p[i], rest_of(row_log_p[i]), vocabulary)) for i in chosen]
        write_part(args.folder, identity, [int(rows[i]) for i in chosen], [int(texts[i]) for i in chosen], frames)
        print(f"{min(first + args.rows_per_file, len(left))} of {len(left)} rows", flush=True)


if __name__ == "__main__":
    main()
