#!/usr/bin/env python3
"""Does llama.cpp read our GGUF file as we do? It must load without a warning, split texts into the same tokens and find the same likeliest tokens.

usage: check_llamacpp.py ARTIFACT TEXT [--positions 1000] [--minimum 0.99]
  ARTIFACT  folder of a run with `export: {formats: [gguf, safetensors]}`: gguf/model.gguf and safetensors/ of the same weights
  TEXT      plain text; tokens of its lines and of the whole are compared, logits over its first positions

needs: torch, transformers, gguf, llama-cpp-python (LLAMA_CPP_LIB_PATH names another build of llama.cpp). Our side of the logits is the
safetensors export in transformers, which the export stage has compared with the model that was trained.

llama.cpp's kernels for quantized weights round activations to 8 bits, whatever wrote the file: on SmolLM2-135M that alone moves the
likeliest token of 3% of the positions. So the bar is for the same file with its tensors decoded to float32, by llama.cpp's own
functions; the agreement of the file as it is is printed beside it. Exit 0 when all three hold, 1 otherwise.
"""
import argparse
import ctypes
import os
import pathlib
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512
WARN, ERROR = 3, 4  # ggml_log_level: 1 debug, 2 info
complaints = []


@llama_cpp.llama_log_callback
def collect(level, message, _):
    text = message.decode("utf-8", "replace").strip()
    # Said of every file whose context is longer than the one asked for here.
    if level in (WARN, ERROR) and text and "n_ctx_seq" not in text and "n_ctx_per_seq" not in text:
        complaints.append(text)


def load(path):
    # verbose=False would silence the log before it is collected. Keys and values in float32: nothing is rounded but what the file asks for.
    return llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, n_ubatch=WINDOW, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=True)


class TypeTraits(ctypes.Structure):  # struct ggml_type_traits of ggml.h, as far as it is needed
    _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("bytes", ctypes.c_size_t), ("quantized", ctypes.c_bool),
                ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))]


def type_traits(kind):
    folder = pathlib.Path(os.environ.get("LLAMA_CPP_LIB_PATH", pathlib.Path(llama_cpp.__file__).parent / "lib"))
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    return library.ggml_get_type_traits(int(kind)).contents


def unknown_type(kinds, value):
    """A type that is newer than the package gguf: its size and name as llama.cpp knows them."""
    traits = type_traits(value)
    kind = int.__new__(kinds, value)
    kind._name_, kind._value_ = traits.name.decode(), value
    gguf.constants.GGML_QUANT_SIZES[kind] = (traits.block, traits.bytes)
    return kinds._value2member_map_.setdefault(value, kind)


gguf.GGMLQuantizationType._missing_ = classmethod(unknown_type)


def decode(tensor):
    shape = [int(n) for n in reversed(tensor.shape)]
    data = np.ascontiguousarray(tensor.data)
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
        return data.reshape(shape)
    out = np.empty(shape, dtype=np.float32)
    type_traits(tensor.tensor_type).to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def decode_file(source, target):
    """A copy with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, decode(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def agreement(model, reference, ids):
    """Positions with the same likeliest token, mean KL in nats, positions."""
    same, divergence = 0, 0.0
    for start in range(0, len(ids), WINDOW):
        part = ids[start : start + WINDOW]
        model.reset()
        model.eval(part)
        theirs = torch.from_numpy(np.array(model.scores[: len(part)])).double().log_softmax(-1)
        with torch.inference_mode():
            ours = reference(torch.tensor([part])).logits[0].double().log_softmax(-1)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += float((ours.exp() * (ours - theirs)).sum())
    return same, divergence / len(ids), len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--minimum", type=float, default=0.99, help="share of positions with the same likeliest token")
    options = parser.parse_args()

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    file = options.artifact / "gguf" / "model.gguf"
    model = load(file)
    loading = list(complaints)
    print(f"warnings while loading: {len(loading)}")
    for line in loading:
        print("  " + line)

    tokenizer = AutoTokenizer.from_pretrained(options.artifact / "safetensors")
    text = options.text.read_text(encoding="utf-8")
    pieces = [line for line in text.split("\n") if line.strip()][:2000] + [text[:20000]]
    different = [piece for piece in pieces if tokenizer(piece, add_special_tokens=False)["input_ids"] != model.tokenize(piece.encode(), add_bos=False, special=False)]
    print(f"token ids: {len(pieces) - len(different)} of {len(pieces)} texts the same")
    for piece in different[:3]:
        print("  different: " + repr(piece[:80]))

    reference = AutoModelForCausalLM.from_pretrained(options.artifact / "safetensors", dtype=torch.float32).eval()
    ids = tokenizer(text[: 40 * options.positions], add_special_tokens=False)["input_ids"][: options.positions]
    same, divergence, count = agreement(model, reference, ids)
    print(f"likeliest token, file as it is (8-bit activations): {same} of {count} the same ({same / count:.2%}), KL {divergence:.2e} nats a token")
    model.close()
    with tempfile.TemporaryDirectory() as folder:
        decoded = pathlib.Path(folder) / "decoded.gguf"
        decode_file(file, decoded)
        same, divergence, count = agreement(load(decoded), reference, ids)
    print(f"likeliest token, tensors decoded to float32: {same} of {count} the same ({same / count:.2%}), KL {divergence:.2e} nats a token")
    passed = not loading and not different and count >= options.positions and same >= options.minimum * count
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
