#!/usr/bin/env bash
# Builds the tests of the file readers and tokenizers with the address and undefined-behaviour sanitizers and runs
# them: hostile files must end in an error message, never in a read past the end. No test here needs LibTorch.
#
# usage: scripts/sanitize.sh [-D...]
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

suites=()
for suite in core formats data; do
  if compgen -G "$KOMPAKT_ROOT/tests/$suite/*.cpp" > /dev/null; then suites+=("$suite"); else warn "tests/$suite/ has no tests: not sanitized"; fi
done

require_writable_root
use_writable_cache
configure asan "$@"
targets=()
for suite in "${suites[@]}"; do targets+=("test_$suite"); done
build asan --target "${targets[@]}"

export OMP_NUM_THREADS=1
export ASAN_OPTIONS="detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
failed=()
for suite in "${suites[@]}"; do
  say "test_$suite under the sanitizers"
  "$KOMPAKT_ROOT/build/asan/tests/test_$suite" >&2 || failed+=("$suite")
done
if [ "${#failed[@]}" -gt 0 ]; then die "under the sanitizers, these tests failed: ${failed[*]}"; fi
note "sanitizers: ${#suites[@]} of ${#suites[@]} suites clean"
