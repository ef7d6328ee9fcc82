#!/usr/bin/env python3
"""Golden files of the format tests, from independent implementations: the PyPI packages gguf and safetensors.

Needs: pip install gguf safetensors ml_dtypes numpy. Writes tests/goldens/formats_*; run it from the repository's root.
"""
import pathlib

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants
from safetensors.numpy import save_file

OUT = pathlib.Path("tests/goldens")
RNG = np.random.default_rng(20240917)

# Byte offsets of the half-precision scales in a block: random bytes are kept finite there.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2],
    T.Q5_K: [0, 2], T.Q6_K: [208], T.TQ1_0: [52], T.TQ2_0: [64], T.IQ4_NL: [0], T.IQ4_XS: [0], T.MXFP4: [], T.BF16: [0],
}
ENCODED = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.TQ1_0, T.TQ2_0, T.BF16, T.MXFP4]


def random_blocks(kind, rows, columns):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = RNG.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        scales = RNG.normal(0, 0.1, len(blocks)).astype(np.float16)
        blocks[:, offset:offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == T.MXFP4:
        blocks[:, 0] = RNG.integers(0, 200, len(blocks))
    return blocks.reshape(rows, -1)


def ggml():
    writer = gguf.GGUFWriter(str(OUT / "formats_blocks.gguf"), "golden")
    writer.add_uint32("golden.u32", 7)
    writer.add_int8("golden.i8", -8)
    writer.add_uint16("golden.u16", 65535)
    writer.add_float32("golden.f32", 0.1)
    writer.add_float64("golden.f64", 0.1)
    writer.add_bool("golden.bool", True)
    writer.add_string("golden.text", "Grüße, 世界")
    writer.add_uint64("golden.u64", 2**64 - 1)
    writer.add_int64("golden.i64", -2**63)
    writer.add_array("golden.texts", ["a", "", "ß"])
    writer.add_array("golden.numbers", [1, -2, 3])
    writer.add_array("golden.reals", [0.5, -0.25])
    writer.add_array("golden.bools", [True, False])
    values = {}
    for kind in HALVES:
        raw = random_blocks(kind, 2, 512)
        writer.add_tensor("decode." + kind.name, raw, raw_dtype=kind)
        values["decode." + kind.name] = quants.dequantize(raw, kind).astype(np.float32)
    source = RNG.normal(0, 0.02, (2, 512)).astype(np.float32)
    source[0, :32] = 0
    values["source"] = source
    for kind in ENCODED:
        writer.add_tensor("encode." + kind.name, quants.quantize(source, kind), raw_dtype=kind)
    writer.add_tensor("plain.scales", np.arange(7, dtype=np.float32) / 3)
    writer.add_tensor("plain.halves", (np.arange(12, dtype=np.float32) / 3).astype(np.float16).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(values, OUT / "formats_blocks.safetensors")


def safetensors():
    base = RNG.normal(0, 1, (3, 5)).astype(np.float32)
    # One dtype for each size, so that the order of the tensors leaves no choice: kompakt writes the same bytes.
    save_file({
        "b.weight": base, "a.weight": base * 2, "ids": np.arange(4, dtype=np.int64), "half": base.astype(np.float16),
        "mask": np.array([0, 1, 255], np.uint8), "scalar": np.array(2.5, np.float32), "nothing": np.zeros((0, 3), np.float32),
    }, OUT / "formats_order.safetensors", metadata={"format": "pt"})
    signed = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int64, np.int32, np.int16, np.int8]
    unsigned = [np.uint64, np.uint32, np.uint16, np.uint8, np.bool_]
    tensors = {}
    for kind in signed + unsigned:
        tensor = (base * 40 if kind in signed else abs(base) * 40).astype(kind)
        tensors[tensor.dtype.name] = tensor
        tensors[tensor.dtype.name + ".as_float32"] = tensor.astype(np.float32)
    save_file(tensors, OUT / "formats_dtypes.safetensors")


ggml()
safetensors()
for path in sorted(OUT.glob("formats_*")):
    print(path, path.stat().st_size)
