"""Encoding of ggml's block types: ours beside llama.cpp's own quantizer, one thread each, the same weights and importance.

usage: python ggml_encode.py PROGRAM [FOLDER_OF_LIBGGML]   (or LLAMA_CPP_LIB_PATH), needs numpy
       --rows N --columns N --seconds S   size of the matrix (512 x 2048) and CPU seconds per figure (0.5)

PROGRAM is the built ggml_encode. Weights are normal numbers with longer tails, importance is log-normal. Errors are
sum(importance * (w - w^)^2) / sum(importance * w^2) (importance 1 in the rows "plain") of the blocks as libggml-base decodes them,
ours as well. `exact` is our version of ggml's own search, `grid` the fit that the quantizer uses. Ratios over 1 in speed and under
1 in error are in our favour.
"""
import argparse
import ctypes
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("program")
parser.add_argument("library", nargs="?", default=os.environ.get("LLAMA_CPP_LIB_PATH"))
parser.add_argument("--rows", type=int, default=512)
parser.add_argument("--columns", type=int, default=2048)
parser.add_argument("--seconds", type=float, default=0.5)
options = parser.parse_args()
if not options.library:
    sys.exit("give the folder of libggml-base.so, or set LLAMA_CPP_LIB_PATH")

ggml = ctypes.CDLL(str(pathlib.Path(options.library) / "libggml-base.so"))


class Traits(ctypes.Structure):
    _fields_ = [("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64), ("type_size", ctypes.c_size_t),
                ("is_quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)), ("from_float_ref", ctypes.c_void_p)]


ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]

rows, columns = options.rows, options.columns
random = np.random.default_rng(7)
weights = (0.03 * random.standard_normal((rows, columns)) * np.exp(0.35 * random.standard_normal((rows, columns)))).astype(np.float32)
importance = np.exp(random.standard_normal(columns)).astype(np.float32)
kinds = {"plain": None, "weighted": importance}



def newest_type():
    """Types are numbered without a count that could be asked for; a number beyond the last one aborts the process, so a child asks."""
    number = 0
    while True:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            ggml.ggml_get_type_traits(number)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            return number - 1
        number += 1


types = {}
for number in range(newest_type() + 1):
    traits = ggml.ggml_get_type_traits(number).contents
    if traits.type_name and traits.is_quantized and traits.to_float:
        types[traits.type_name.decode().upper()] = (number, traits)


def error(type_name, kind, data):
    """Relative squared error of blocks, decoded by libggml."""
    decoded = np.empty_like(weights)
    types[type_name][1].to_float(data, decoded.ctypes.data, weights.size)
    share = np.ones(columns) if kinds[kind] is None else importance.astype(np.float64)
    return float((((weights - decoded).astype(np.float64) ** 2) * share).sum() / ((weights.astype(np.float64) ** 2) * share).sum())


def theirs(type_name, kind):
    """Million weights a second and the blocks of llama.cpp's quantizer."""
    number, traits = types[type_name]
    ggml.ggml_quantize_init(number)
    out = ctypes.create_string_buffer(rows * columns // traits.blck_size * traits.type_size)
    given = kinds[kind].ctypes.data if kinds[kind] is not None else None
    run = lambda: ggml.ggml_quantize_chunk(number, weights.ctypes.data, out, 0, rows, columns, given)
    run()
    start, runs = time.process_time(), 0
    while time.process_time() - start < options.seconds:
        run()
        runs += 1
    return weights.size * runs / (time.process_time() - start) * 1e-6, out


with tempfile.TemporaryDirectory() as folder:
    weights.tofile(folder + "/weights.f32")
    importance.tofile(folder + "/importance.f32")
    ours = {}
    lines = subprocess.run([options.program, folder, str(rows), str(columns), str(options.seconds)], check=True, text=True, stdout=subprocess.PIPE).stdout
    for line in lines.splitlines():
        type_name, kind, how, speed, file = line.split()
        ours.setdefault((type_name, kind), {})[how] = (float(speed), pathlib.Path(folder, file).read_bytes())
    print(f"{rows} x {columns}; million weights a second of CPU time, one thread; error = share of the (weighted) square")
    print(f"{'type':8} {'importance':10} {'llama.cpp':>10} {'exact':>8} {'ratio':>6} {'same bytes':>10} {'grid':>8} {'ratio':>6}   {'llama.cpp':>10} {'grid':>10} {'ratio':>6}")
    for (type_name, kind), encoders in ours.items():
        if type_name not in types:
            print(f"{type_name:8} {kind:10} not in this libggml")
            continue
        speed, blocks = theirs(type_name, kind)
        their_error = error(type_name, kind, blocks)
        cells = f"{type_name:8} {kind:10} {speed:10.1f} "
        if "exact" in encoders:
            block = types[type_name][1].type_size
            same = np.mean((np.frombuffer(encoders["exact"][1], np.uint8).reshape(-1, block) == np.frombuffer(blocks, np.uint8).reshape(-1, block)).all(1))
            cells += f"{encoders['exact'][0]:8.1f} {encoders['exact'][0] / speed:6.2f} {100 * same:9.2f}% "
        else:
            cells += f"{'-':>8} {'-':>6} {'-':>10} "
        if "grid" in encoders:
            mine = error(type_name, kind, encoders["grid"][1])
            cells += f"{encoders['grid'][0]:8.1f} {encoders['grid'][0] / speed:6.2f}   {their_error:10.6f} {mine:10.6f} {mine / their_error:6.3f}"
        print(cells, flush=True)
