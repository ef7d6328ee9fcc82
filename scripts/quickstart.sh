#!/usr/bin/env bash
# From a fresh clone to a small deployed model and its report, in one command and without a GPU: installs what is
# missing, builds, fetches the teacher, runs recipes/quickstart.yaml, prints the closing table and where the report is.
# Run again, it starts the run within seconds; finished stages are not computed twice, and an
# interrupted one goes on where it stopped.
#
# usage: scripts/quickstart.sh [-DTorch_DIR=DIR ...] [option of `kompakt run` ...]      (no option is needed)
set -euo pipefail
here="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source "$here/common.sh"

build_options=()
run_options=()
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -D*) build_options+=("$argument") ;;
    *) run_options+=("$argument") ;;
  esac
done

require_writable_root
use_writable_cache
"$here/bootstrap.sh" ${build_options[@]+"${build_options[@]}"}
torch="$(torch_option ${build_options[@]+"${build_options[@]}"})"
if [ -n "$torch" ]; then build_options+=("$torch"); fi
configure release ${build_options[@]+"${build_options[@]}"}
build release --target kompakt
"$here/fetch_teacher.sh" minilm

cd -- "$KOMPAKT_ROOT"
run=(build/release/kompakt run recipes/quickstart.yaml --out runs/quickstart --resume) # goes on where a killed run stopped
say "${run[*]}${run_options[*]:+ ${run_options[*]}}"
status=0
"${run[@]}" ${run_options[@]+"${run_options[@]}"} || status=$?
case "$status" in
  0 | 3) ;; # 3: computed, but a gate of the recipe was not met; the table says which
  130 | 143)
    note "interrupted; scripts/quickstart.sh goes on where it stopped"
    exit "$status"
    ;;
  *) exit "$status" ;;
esac
# Options may have sent the run elsewhere; kompakt itself has then said where.
if [ -f runs/quickstart/report.html ]; then
  echo
  echo "Report:   $KOMPAKT_ROOT/runs/quickstart/report.html"
  echo "Model:    $KOMPAKT_ROOT/runs/quickstart/artifact"
  echo "Try it:   build/release/kompakt classify runs/quickstart/artifact --text \"my card has not arrived\""
fi
exit "$status"
