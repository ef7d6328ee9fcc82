#!/usr/bin/env bash
# A check for a machine with an NVIDIA GPU, not part of CTest: builds with LibTorch's CUDA part and the kernels, then runs `kompakt doctor`
# (under compute-sanitizer too, where that is installed), the tests of the pipeline on the GPU, and the speed of distillation beside
# PyTorch eager where python3 has torch and transformers. Exits with 0 when everything passed.
#
# usage: scripts/check_gpu.sh [MODEL]      (MODEL: folder or .gguf for the speed; default: teachers/SmolLM2-135M-Instruct-Q4_1.gguf)
set -euo pipefail
here="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source "$here/common.sh"

case "${1:-}" in
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
model="${1:-$KOMPAKT_ROOT/teachers/SmolLM2-135M-Instruct-Q4_1.gguf}"
if ! { have nvidia-smi && nvidia-smi -L >&2; }; then die "there is no NVIDIA driver on this machine" "use scripts/test.sh: everything but this runs on the CPU"; fi
"$here/bootstrap.sh" --cuda
configure cuda -DKOMPAKT_BENCHMARKS=ON
build cuda --target kompakt test_pipeline distil_speed
folder="$KOMPAKT_ROOT/build/cuda"
failed=()

say "kompakt doctor"
"$folder/kompakt" doctor >&2 || failed+=("doctor")
if have compute-sanitizer; then
  say "kompakt doctor under compute-sanitizer"
  compute-sanitizer --error-exitcode 9 "$folder/kompakt" doctor >&2 || failed+=("compute-sanitizer")
fi
say "tests of the pipeline on the GPU"
KOMPAKT_DEVICE=cuda KOMPAKT_BINARY="$folder/kompakt" OMP_NUM_THREADS=1 "$folder/tests/test_pipeline" >&2 || failed+=("test_pipeline")
if [ -e "$model" ]; then
  work="$(mktemp -d)"
  trap 'rm -rf -- "$work"' EXIT
  "$folder/benchmarks/distil_speed" "$model" --save "$work/teacher"
  for precision in float32 bf16; do
    say "distillation, $precision: kompakt, then PyTorch eager"
    "$folder/benchmarks/distil_speed" "$work/teacher" --steps 20 --precision "$precision" --device cuda || failed+=("distil_speed $precision")
    if python3 -c 'import torch, transformers' 2> /dev/null; then
      python3 "$KOMPAKT_ROOT/benchmarks/distil_speed.py" "$work/teacher" --steps 20 --precision "$precision" --device cuda || failed+=("distil_speed.py $precision")
    else
      warn "python3 has no torch and transformers: PyTorch eager was not measured"
    fi
  done
else
  warn "there is no model at $model: speed was not measured (scripts/fetch_teacher.sh smollm2)"
fi
if [ "${#failed[@]}" -gt 0 ]; then die "on the GPU, these failed: ${failed[*]}"; fi
