#!/usr/bin/env python3
"""Checks the rules of docs/architecture.md that a compiler does not: who may include whom, one door per dependency,
no heavy torch headers, no using-directives that would leak through unity builds, no paths or hosts of one machine,
and files that have grown too long. Reads files only; does not compile. Exits with 1 and a list when a rule is broken.

usage: scripts/check_layers.py [ROOT]
"""

import functools
import re
import subprocess
import sys
from pathlib import Path

# Folder -> what its files may include besides themselves. A path with a slash allows that one file.
MAY_INCLUDE = {
    "core": [],
    "formats": ["core"],
    "data": ["core", "formats"],
    "model": ["core", "formats"],
    "evaluate": ["core", "formats", "data", "model"],
    "distributed": ["core"],
    "train": ["core", "formats", "data", "model", "evaluate", "distributed"],
    "distill": ["core", "formats", "data", "model", "evaluate", "train"],
    "prune": ["core", "formats", "data", "model", "evaluate", "train"],
    "quantize": ["core", "formats", "data", "model", "evaluate", "train"],
    "export": ["core", "formats", "model", "quantize/grids.h"],
    "report": ["core", "formats"],
    "pipeline": ["core", "formats", "data", "model", "evaluate", "distributed", "train", "distill", "prune", "quantize", "export", "report"],
    "cli": ["core", "report", "pipeline"],
}
FREE_FOLDERS = ["tests", "benchmarks"]  # may include everything
WITHOUT_TORCH = ["core", "formats", "data", "report"]
TORCH = re.compile(r"(torch|ATen|c10)/")

# Including one of these costs 10 seconds and more in every file that sees it.
HEAVY_HEADERS = ["torch/torch.h", "torch/all.h", "torch/nn.h", "torch/extension.h"]

# Each of these libraries enters through one file of ours, so that replacing it is one file's work.
ONE_DOOR = {
    "yaml-cpp": r"yaml-cpp/",
    "cxxopts": r"cxxopts\.hpp",
    "HDF5": r"(hdf5|H5[A-Za-z]*|hdf5_hl)\.h$",
    "PCRE2": r"pcre2\.h",
    "utf8proc": r"utf8proc\.h",
    "OpenSSL": r"openssl/",
    "pugixml": r"pugixml\.hpp",
    "zstd": r"z(std|dict)(_errors)?\.h$",
    "zlib": r"zlib\.h$",
    "sentencepiece": r"sentencepiece",
    "ONNX": r"onnx(/|\.pb\.h)",
    "Gloo": r"gloo/|torch/csrc/distributed/c10d/ProcessGroupGloo",
    "NCCL": r"nccl|torch/csrc/distributed/c10d/ProcessGroupNCCL",
    "c10d's store": r"torch/csrc/distributed/c10d/TCPStore",
    "NVML": r"nvml\.h",
}
DOORS = {"nlohmann-json": (r"nlohmann/", "core/json.h"), "ATen's parallel_for": (r"ATen/Parallel", "model/parallel.h")}  # a fixed file

SOURCE = {".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh"}
COUNTED = SOURCE | {".py", ".sh"}
WARN_LINES, FAIL_LINES = 500, 800

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
USING_NAMESPACE = re.compile(r"^using\s+namespace\s+([\w:]+)")
NAMESPACE = re.compile(r"^\s*namespace\s+([\w:]+)\s*\{", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home/[a-z]\w*|Users/\w+|tmp/oracle)/")
PACKAGE_INDEX = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch\.org", re.IGNORECASE)
SKIPPED_TEXT = ("third_party/", "data/banking77/", "tests/goldens/")


def tracked_files(root):
    """Paths relative to root: what git tracks or would track; without git, all but build outputs."""
    try:
        listing = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True, capture_output=True
        ).stdout.decode()
        names = [name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", ".venv", ".cache", "build", "runs", "teachers", "__pycache__"}
        names = [str(path.relative_to(root)) for path in root.rglob("*") if not ignored & set(path.relative_to(root).parts)]
    return sorted(name for name in names if (root / name).is_file())


@functools.lru_cache(maxsize=None)
def namespaces_of(root, folder):
    """Last parts of the names of namespaces that the headers of a folder open, without the project's own."""
    names = {name.split("::")[-1] for path in (root / folder).glob("*.h") for name in NAMESPACE.findall(path.read_text(encoding="utf-8"))}
    return names - {"kompakt"}


def may_include(folder, target):
    allowed = MAY_INCLUDE[folder]
    return target.split("/")[0] in [folder, *allowed] or target in allowed


def check(root):
    """Returns (violations, warnings), each a list of lines that begin with file:line."""
    violations, warnings = [], []
    doors = {name: {} for name in ONE_DOOR}
    for name in tracked_files(root):
        path = root / name
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a binary file
        lines = text.splitlines()
        folder = name.split("/")[0] if "/" in name else ""
        if not name.startswith(SKIPPED_TEXT):
            for number, line in enumerate(lines, 1):
                if MACHINE_PATH.search(line):
                    violations.append(f"{name}:{number}: a path of one machine: {line.strip()[:120]}")
                if PACKAGE_INDEX.search(line):
                    violations.append(f"{name}:{number}: names the host of a package index; the user's own settings decide: {line.strip()[:120]}")
            if path.suffix in COUNTED and len(lines) > WARN_LINES:
                target = violations if len(lines) > FAIL_LINES else warnings
                target.append(f"{name}: {len(lines)} lines; one concept a file, {WARN_LINES} at most as a rule, {FAIL_LINES} never")
        if path.suffix not in SOURCE or folder not in [*MAY_INCLUDE, *FREE_FOLDERS]:
            continue
        header = path.suffix in {".h", ".hpp", ".cuh"}
        for number, line in enumerate(lines, 1):
            place = f"{name}:{number}"
            using = USING_NAMESPACE.match(line)
            if using and folder not in FREE_FOLDERS:
                # A namespace of the folder itself leaks no further than the folder: tolerated, and named.
                own = using.group(1).split("::")[-1] in namespaces_of(root, folder)
                target = warnings if own else violations
                target.append(f"{place}: '{line.strip()}' at file scope leaks into the other files of a unity build")
            match = INCLUDE.match(line)
            if not match:
                continue
            quoted, target = match.group(1) == '"', match.group(2)
            if header and target in HEAVY_HEADERS:
                violations.append(f"{place}: {target} in a header; use ATen/core/Tensor.h or a narrow torch header")
            elif target in HEAVY_HEADERS:
                warnings.append(f"{place}: {target}; ATen/ATen.h and narrow torch headers compile in half the time")
            if folder in FREE_FOLDERS:
                continue
            if quoted and target.split("/")[0] in FREE_FOLDERS:
                violations.append(f"{place}: product code includes {target}")
            elif quoted and "/" not in target and (path.parent / target).is_file():
                violations.append(f'{place}: "{target}" without its folder; write "{folder}/{target}"')
            elif target.split("/")[0] in MAY_INCLUDE and (root / target).is_file() and not may_include(folder, target):
                allowed = ", ".join([folder, *MAY_INCLUDE[folder]])
                violations.append(f"{place}: {folder}/ may not include {target} (allowed: {allowed})")
            elif quoted and target.split("/")[0] in MAY_INCLUDE and not (root / target).is_file():
                violations.append(f"{place}: {target} does not exist")
            if TORCH.match(target) and folder in WITHOUT_TORCH:
                violations.append(f"{place}: {folder}/ is free of torch, but includes {target}")
            if TORCH.match(target) and path.suffix in {".cu", ".cuh"}:
                violations.append(f"{place}: kernels take raw pointers and a stream, no torch header ({target})")
            for library, pattern in ONE_DOOR.items():
                if re.match(pattern, target):
                    doors[library].setdefault(name, number)
            for library, (pattern, door) in DOORS.items():
                if re.match(pattern, target) and name != door:
                    violations.append(f"{place}: {library} is used through {door} only")
    for library, files in doors.items():
        if len(files) > 1:
            places = ", ".join(f"{name}:{number}" for name, number in sorted(files.items()))
            violations.append(f"{library} has {len(files)} doors, one is allowed: {places}")
    return violations, warnings


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent).resolve()
    violations, warnings = check(root)
    for warning in warnings:
        print(f"warning: {warning}")
    for violation in violations:
        print(violation)
    print(f"layers: {len(violations)} violations, {len(warnings)} warnings")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
