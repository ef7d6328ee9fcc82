#!/usr/bin/env bash
# A slow check, not part of CTest: runs a recipe once unbroken and once killed with SIGKILL at random moments and resumed
# each time, in two stores of their own, and compares the artifacts byte by byte. Exits with 0 when they are equal.
#
# usage: scripts/check_kills.sh [RECIPE [KILLS]] [--set key=value ...]      (default: recipes/quickstart.yaml, 5)
# environment: KOMPAKT_BINARY (default build/release/kompakt), KOMPAKT_KILL_SEED (default: the time)
set -euo pipefail
here="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source "$here/common.sh"

positional=()
options=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    -h | --help)
      sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --set)
      [ "$#" -ge 2 ] || die "--set needs key=value"
      options+=(--set "$2")
      shift
      ;;
    -*) die "unknown option '$1'" "allowed: --set key=value, --help" ;;
    *) positional+=("$1") ;;
  esac
  shift
done
recipe="${positional[0]:-$KOMPAKT_ROOT/recipes/quickstart.yaml}"
kills="${positional[1]:-5}"
binary="${KOMPAKT_BINARY:-$KOMPAKT_ROOT/build/release/kompakt}"
[ -x "$binary" ] || die "there is no program at $binary" "build it: scripts/quickstart.sh, or name it in KOMPAKT_BINARY"
[ -f "$recipe" ] || die "there is no recipe at $recipe"
RANDOM="${KOMPAKT_KILL_SEED:-$(date +%s)}"

work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
run() { # NAME: one start of the recipe in the folder and store of that name
  "$binary" run "$recipe" --out "$work/$1" --set "store=$work/$1-store" --resume --quiet ${options[@]+"${options[@]}"}
}
fingerprint() { (cd -- "$work/$1/artifact" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }

say "unbroken run"
start="$SECONDS"
status=0
run whole > /dev/null || status=$?
[ "$status" = 0 ] || [ "$status" = 3 ] || die "the unbroken run failed with code $status"
took="$((SECONDS - start))"
note "$took s"

for ((kill = 1; kill <= kills; ++kill)); do
  # On average the killed starts together cover the run; each goes on where the one before stopped.
  moment="$((1 + RANDOM % (2 * took / (kills + 1) + 1)))"
  run broken > /dev/null &
  child=$!
  sleep "$moment"
  if ! pkill -KILL -P "$child" && ! kill -KILL "$child" 2> /dev/null; then note "had finished before kill $kill"; fi
  wait "$child" 2> /dev/null || true
  note "kill $kill of $kills after $moment s"
done
say "last start, to the end"
status=0
run broken > /dev/null || status=$?
[ "$status" = 0 ] || [ "$status" = 3 ] || die "the resumed run failed with code $status"

if ! diff <(fingerprint whole) <(fingerprint broken); then
  die "the artifacts differ (files listed above)"
fi
say "equal: $(fingerprint whole | wc -l) files of the artifact, after $kills kills"
