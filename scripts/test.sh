#!/usr/bin/env bash
# The whole test set from a fresh clone in one command: installs what is missing, configures, builds everything (the
# CUDA kernels too when nvcc is there; they are compiled, not run), runs the file readers under the sanitizers, then
# CTest. Exits with 0 only when all of it passed.
#
# usage: scripts/test.sh [-DTorch_DIR=DIR ...] [CTest option ...]      (no option is needed; `-R export` runs one folder)
set -euo pipefail
here="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source "$here/common.sh"

build_options=()
test_options=()
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -D?*) build_options+=("$argument") ;;
    *) test_options+=("$argument") ;;
  esac
done

require_writable_root
use_writable_cache
"$here/bootstrap.sh" ${build_options[@]+"${build_options[@]}"}
torch="$(torch_option ${build_options[@]+"${build_options[@]}"})"
if [ -n "$torch" ]; then build_options+=("$torch"); fi

# Cheap checks first.
python3 "$here/check_layers.py" || die "the include rules are broken (listed above)" "docs/architecture.md has the rules"
if have shellcheck; then
  (cd -- "$KOMPAKT_ROOT" && shellcheck -x scripts/*.sh .ci/run) || die "shellcheck found mistakes in the scripts (listed above)"
fi

# Warnings are errors with the compiler that the project is written for; another one warns about other things.
case "$("${CXX:-c++}" -dumpfullversion -dumpversion 2> /dev/null)" in
  12.*) ;;
  *) build_options+=(-DKOMPAKT_WARNINGS_AS_ERRORS=OFF) ;;
esac
configure ci ${build_options[@]+"${build_options[@]}"}
build ci
"$here/sanitize.sh" ${build_options[@]+"${build_options[@]}"} || sanitizers_failed=1

cd -- "$KOMPAKT_ROOT"
jobs="$(nproc)"
[ "$jobs" -le 8 ] || jobs=8
say "ctest, $jobs at a time"
status=0
ctest --test-dir build/ci --output-on-failure --parallel "$jobs" ${test_options[@]+"${test_options[@]}"} || status=$?
if [ "${sanitizers_failed:-0}" = 1 ]; then die "the sanitizers found a fault in a file reader (their report stands above ctest's output)"; fi
exit "$status"
