#!/usr/bin/env python3
"""tests/goldens/capture.json: rows of a teacher's cache as scripts/capture_teacher.py writes them, for the reader in C++.

usage: make_goldens_capture.py OUT.json   needs numpy (h5py and zstandard are imported by the script that is tested)
"""
import importlib.util
import json
import pathlib
import sys

import numpy as np

spec = importlib.util.spec_from_file_location("capture", pathlib.Path(__file__).with_name("capture_teacher.py"))
capture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capture)

random, cases = np.random.default_rng(7), []
for tokens, top, vocabulary in ((5, 3, 50), (4, 8, 1025), (2, 1, 2)):
    log_p = np.log(random.dirichlet(np.full(vocabulary, 0.1), tokens) + 1e-9)
    ids = np.argsort(-log_p, -1)[:, :top]
    best = np.take_along_axis(log_p, ids, -1).astype(np.float32)
    rest = capture.rest_of(best)
    cases.append({"tokens": tokens, "top": top, "vocabulary": vocabulary, "ids": ids.ravel().tolist(), "log_p": best.ravel().tolist(), "log_rest": rest.tolist(), "bytes": capture.encode_row(ids, best, rest, vocabulary).hex()})
pathlib.Path(sys.argv[1]).write_text(json.dumps(cases, indent=1) + "\n")
