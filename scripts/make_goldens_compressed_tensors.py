#!/usr/bin/env python3
"""Goldens of activation rounding and of packed weights from the library compressed-tensors itself.

Writes tests/goldens/compressed_tensors.json. Needs torch, transformers and compressed-tensors (made with 0.20.0).
"""
import json
import pathlib

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

FORMATS = {"int8": dict(num_bits=8, type="int"), "fp8_e4m3": dict(num_bits=8, type="float")}


def numbers(tensor):
    return [float(v) for v in tensor.float().flatten()]


def values(*shape):
    x = torch.randn(*shape, generator=GENERATOR)
    x[..., 1] *= 40  # a channel with outliers
    return x


GENERATOR = torch.Generator().manual_seed(11)


def dynamic_cases():
    x = values(2, 5, 24)
    x[1, 2] = 0  # a token of zeros
    x[0, 1] = x[0, 1].abs()  # one side only
    for name, row in FORMATS.items():
        for symmetric in (True, False):
            if name != "int8" and not symmetric:
                continue
            args = QuantizationArgs(**row, symmetric=symmetric, strategy=QuantizationStrategy.TOKEN, dynamic=True)
            scale, zero = compute_dynamic_scales_and_zp(x, args, None)
            yield dict(format=name, symmetric=symmetric, shape=list(x.shape), x=numbers(x), rounded=numbers(fake_quantize(x, scale, zero, args)))


def static_cases():
    for name, row in FORMATS.items():
        for symmetric in (True, False):
            if name != "int8" and not symmetric:
                continue
            x, unseen = values(4, 24), values(4, 24) * 1.5  # what is clipped
            args = QuantizationArgs(**row, symmetric=symmetric, strategy=QuantizationStrategy.TENSOR)
            scale, zero = calculate_qparams(x.min(), x.max(), args)
            yield dict(format=name, symmetric=symmetric, low=float(x.min()), high=float(x.max()), scale=float(scale), zero=int(zero.float()), x=numbers(unseen), rounded=numbers(fake_quantize(unseen, scale, zero, args)))


def packed_cases():
    for bits, rows, columns, dim in [(4, 3, 16, 1), (4, 5, 20, 1), (8, 2, 6, 1), (4, 11, 3, 0), (8, 5, 2, 0)]:
        low = -(1 << (bits - 1))
        codes = torch.randint(low, -low, (rows, columns), generator=GENERATOR, dtype=torch.int8)
        yield dict(bits=bits, rows=rows, columns=columns, dim=dim, codes=codes.flatten().tolist(), words=pack_to_int32(codes, bits, dim).flatten().tolist())


def weight_cases():
    for symmetric in (True, False):
        codes = torch.randint(-8, 8, (4, 16), generator=GENERATOR, dtype=torch.int8)
        scale = torch.rand(4, 2, generator=GENERATOR).half().float() + 0.125
        zero = torch.randint(-8, 8, (4, 2), generator=GENERATOR, dtype=torch.int8) if not symmetric else torch.zeros(4, 2, dtype=torch.int8)
        args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=8)
        yield dict(symmetric=symmetric, codes=codes.flatten().tolist(), scale=numbers(scale), zero=zero.flatten().tolist(), weight=numbers(dequantize(codes, scale, None if symmetric else zero, args)))


def main():
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "compressed_tensors.json"
    path.write_text(json.dumps(dict(dynamic=list(dynamic_cases()), static=list(static_cases()), packed=list(packed_cases()), weights=list(weight_cases()))) + "\n")


if __name__ == "__main__":
    main()
