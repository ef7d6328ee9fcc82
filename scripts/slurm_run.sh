#!/usr/bin/env bash
# Runs a recipe on the nodes of a Slurm job: one process per task, which train together. Sets what torchrun would set and
# leaves the rest to srun. Inside an allocation (salloc, sbatch) it uses that; outside it asks for one.
#
# usage: scripts/slurm_run.sh [SRUN_OPTION ...] -- run RECIPE [KOMPAKT_OPTION ...]
#   e.g. scripts/slurm_run.sh --nodes=2 --ntasks-per-node=4 --gpus-per-task=1 -- run recipes/trec6.yaml --device cuda
#        sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-task=1 --wrap "scripts/slurm_run.sh -- run my.yaml --device cuda --resume"
# environment: KOMPAKT_BINARY (default build/release/kompakt), MASTER_PORT (default: from the job's number)
#
# The recipe, the run folder and the store must be on a file system that all nodes see. accumulate of every training stage must be
# a multiple of the number of tasks. A job that lost a node ends with the rank's name; start it again with --resume, on any
# number of tasks.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# The part that srun starts once per task.
if [ "${1:-}" = --task ]; then
  shift
  export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
  LOCAL_WORLD_SIZE="${SLURM_TASKS_PER_NODE%%[(,]*}"
  export LOCAL_WORLD_SIZE
  if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR="$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)"
    export MASTER_ADDR
  fi
  export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
  # With --gpus-per-task a task sees its own GPU only, as number 0.
  case "${CUDA_VISIBLE_DEVICES:-}" in *,* | '') ;; *) export LOCAL_RANK=0 ;; esac
  exec "$@"
fi

srun_options=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -h | --help)
      sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
  esac
  srun_options+=("$1")
  shift
done
[ "$#" -ge 2 ] || die "the kompakt command is missing" "usage: scripts/slurm_run.sh [SRUN_OPTION ...] -- run RECIPE [KOMPAKT_OPTION ...]"
shift
binary="${KOMPAKT_BINARY:-$KOMPAKT_ROOT/build/release/kompakt}"
[ -x "$binary" ] || die "there is no program at $binary" "build it: scripts/quickstart.sh, or name it in KOMPAKT_BINARY"
have srun || die "srun is not on the PATH" "run this on a login node of a Slurm cluster; without Slurm: torchrun --no-python --nproc-per-node N $binary $*"
# One that fails takes the others along: they would only wait to find out.
exec srun --kill-on-bad-exit=1 --label ${srun_options[@]+"${srun_options[@]}"} "${BASH_SOURCE[0]}" --task "$binary" "$@"
