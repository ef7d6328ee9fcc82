#!/usr/bin/env python3
"""Golden values of the tokenizers, made with the Python package `tokenizers`.

usage: make_goldens_tokenizers.py SHARED_DATA MINILM_FOLDER OUTPUT_FOLDER

For each tokenizer one text file. Section "lines": the mixed text, one 16-bit hash of the ids of each line, ten to a row, and
after them a hash of the ten decoded texts. Section "characters": for every block of 256 code points one hash of the ids of
"a<c>b <c>" over its characters. The test builds the same texts; see tests/data/tokenizer_goldens_test.cpp.
"""
import lzma
import pathlib
import sys

from tokenizers import Tokenizer

# File and how many of its non-empty lines are taken.
SOURCES = [
    ("lm/wikitext2/test.txt", 2600),
    ("calibration/multilingual.utf8", 525),
    ("classification/trec6/test.txt", 500),
    ("classification/banking77/test.csv", 2500),
    ("lm/tinyshakespeare.txt", 2500),
    ("lm/books_de/faust.txt", 2500),
]
TOTAL = 10000


def fnv(data, value=0xCBF29CE484222325):
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def short(value):
    return f"{(value >> 32 ^ value) & 0xFFFF:04x}"


def ids_bytes(ids):
    return "".join(f"{i} " for i in ids).encode()


def mixed_lines(shared):
    lines = []
    for name, count in SOURCES:
        text = (shared / name).read_bytes().decode()
        taken = [line for line in text.split("\n") if line.strip(" \r\t")]
        lines += taken[:count]
    return lines[:TOTAL]


def write(tokenizer, lines, path, decode=True):
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = ["lines"]
    for start in range(0, len(lines), 10):
        row, texts = [], b""
        for line in lines[start:start + 10]:
            ids = tokenizer.encode(line).ids
            row.append(short(fnv(ids_bytes(ids))))
            texts += tokenizer.decode(ids).encode() + b"\n"
        rows.append("".join(row) + " " + short(fnv(texts)))
    rows.append("characters")
    for block in range(0, 0x110000, 256):
        value = 0xCBF29CE484222325
        for code in range(block, block + 256):
            if 0xD800 <= code <= 0xDFFF:
                continue
            value = fnv(ids_bytes(tokenizer.encode(f"a{chr(code)}b {chr(code)}").ids), value)
        rows.append(short(value))
    path.write_text("\n".join(rows) + "\n")


def main():
    shared, minilm, out = map(pathlib.Path, sys.argv[1:4])
    lines = mixed_lines(shared)
    assert len(lines) == TOTAL, len(lines)
    out.mkdir(exist_ok=True)
    write(Tokenizer.from_file(str(minilm / "tokenizer.json")), lines, out / "tokenizer_minilm.txt")
    for name in ("qwen3", "gemma3", "llama2"):
        text = lzma.decompress((shared / "tokenizers/hf" / name / "tokenizer.json.xz").read_bytes()).decode()
        write(Tokenizer.from_str(text), lines, out / f"tokenizer_{name}.txt")


if __name__ == "__main__":
    main()
