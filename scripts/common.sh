# shellcheck shell=bash
# What all scripts share: the project's root, messages, a job count that fits the memory, compiler cache settings.
# Sourced, never run. Prints nothing by itself and changes no file.

KOMPAKT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
readonly KOMPAKT_ROOT
# shellcheck disable=SC2034 # used by the scripts that source this
readonly KOMPAKT_VENV="$KOMPAKT_ROOT/.venv"

if [ -t 2 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
  _bold=$'\033[1m' _red=$'\033[31m' _plain=$'\033[0m'
else
  _bold='' _red='' _plain=''
fi

# Progress and explanations go to stderr: stdout belongs to results.
say() { printf '%s==>%s %s\n' "$_bold" "$_plain" "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
warn() { printf '%swarning:%s %s\n' "$_red" "$_plain" "$*" >&2; }

# die MESSAGE [HINT...]: one sentence of what is wrong, then what to do about it.
die() {
  printf '%serror:%s %s\n' "$_red" "$_plain" "$1" >&2
  shift
  local hint
  for hint in "$@"; do printf '  %s\n' "$hint" >&2; done
  exit 2
}

have() { command -v "$1" > /dev/null 2>&1; }

# quietly COMMAND...: its output appears only when it fails.
quietly() {
  local output
  if ! output="$("$@" 2>&1)"; then
    printf '%s\n' "$output" >&2
    return 1
  fi
}

# use_writable_cache: accounts without a home folder (services, containers) keep caches of pip and ccache inside the project.
use_writable_cache() {
  local cache="${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}"
  if ! mkdir -p -- "$cache" 2> /dev/null || [ ! -w "$cache" ]; then
    export XDG_CACHE_HOME="$KOMPAKT_ROOT/.cache"
    mkdir -p -- "$XDG_CACHE_HOME" 2> /dev/null || die "the folder $KOMPAKT_ROOT cannot be written by $(id -un)" \
      "clone the repository into a folder of your own, or change its owner: chown -R $(id -un) $KOMPAKT_ROOT"
  fi
}

require_writable_root() {
  [ -w "$KOMPAKT_ROOT" ] || die "the folder $KOMPAKT_ROOT cannot be written by $(id -un)" \
    "clone the repository into a folder of your own, or change its owner: chown -R $(id -un) $KOMPAKT_ROOT"
}

# free_megabytes FOLDER: free disk space there.
free_megabytes() { df -Pm -- "$1" | awk 'NR == 2 { print $4 }'; }

# memory_megabytes: what may be used now, the smaller of the machine's free memory and the container's limit.
memory_megabytes() {
  local available limit
  available="$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)"
  limit="$(cat /sys/fs/cgroup/memory.max 2> /dev/null || echo max)"
  if [ "$limit" != max ] && [ "$((limit / 1048576))" -lt "$available" ]; then
    available="$((limit / 1048576))"
  fi
  echo "$available"
}

# compile_jobs: one per processor, but no more than the memory holds at 1.5 GB for a unit of torch headers.
compile_jobs() {
  local processors fitting
  processors="$(nproc)"
  fitting="$(($(memory_megabytes) / 1536))"
  [ "$fitting" -ge 1 ] || fitting=1
  if [ "$fitting" -lt "$processors" ]; then echo "$fitting"; else echo "$processors"; fi
}

# use_compiler_cache: hits across build folders and clones; precompiled headers need the sloppiness named here.
use_compiler_cache() {
  export CCACHE_SLOPPINESS="${CCACHE_SLOPPINESS:-pch_defines,time_macros}"
  export CCACHE_NOHASHDIR=1
  export CCACHE_BASEDIR="$KOMPAKT_ROOT"
  export CCACHE_MAXSIZE="${CCACHE_MAXSIZE:-10G}"
}

# use_toolkit_compiler: an installed CUDA toolkit counts even when its bin folder is not on the PATH.
use_toolkit_compiler() {
  if [ -z "${CUDACXX:-}" ] && ! have nvcc && [ -x /usr/local/cuda/bin/nvcc ]; then
    export CUDACXX=/usr/local/cuda/bin/nvcc
  fi
}

# torch_option [-D...]: the option that names a LibTorch of the user's own, from the arguments, $KOMPAKT_TORCH or $Torch_DIR;
# nothing when the project's own in .venv is meant. KOMPAKT_TORCH may name the folder `torch` of an installation, or the
# one that holds TorchConfig.cmake.
torch_option() {
  local argument prefix torch
  for argument in "$@"; do
    case "$argument" in
      -DTorch_DIR=* | -DTorch_DIR:*=*)
        torch="${argument#*=}"
        [ -f "$torch/../../../lib/libtorch_cpu.so" ] || die "no LibTorch at $torch (from $argument)" \
          "name the folder share/cmake/Torch of an installation that has lib/libtorch_cpu.so"
        echo "$argument" && return
        ;;
      -DCMAKE_PREFIX_PATH=* | -DCMAKE_PREFIX_PATH:*=*)
        local IFS=';'
        for prefix in ${argument#*=}; do
          if [ -f "$prefix/lib/libtorch_cpu.so" ] || [ -f "$prefix/torch/lib/libtorch_cpu.so" ]; then echo "$argument" && return; fi
        done
        ;;
    esac
  done
  torch="${KOMPAKT_TORCH:-${Torch_DIR:-}}"
  [ -n "$torch" ] || return 0
  if [ -f "$torch/lib/libtorch_cpu.so" ]; then
    echo "-DTorch_DIR=$(cd -- "$torch" && pwd -P)/share/cmake/Torch"
  elif [ -f "$torch/../../../lib/libtorch_cpu.so" ]; then
    echo "-DTorch_DIR=$(cd -- "$torch" && pwd -P)"
  else
    die "no LibTorch in $torch (from KOMPAKT_TORCH or Torch_DIR)" \
      "name the folder 'torch' that holds lib/libtorch_cpu.so, or unset the variable to use the project's own"
  fi
}

# configure PRESET [-D...]: runs CMake only when the build folder is new or options are given; Ninja repeats it when
# a CMake file changes.
configure() {
  local preset="$1"
  shift
  local folder="$KOMPAKT_ROOT/build/$preset"
  use_compiler_cache
  use_toolkit_compiler
  if [ "$#" -eq 0 ] && [ -f "$folder/build.ninja" ]; then return 0; fi
  if [ -f "$folder/CMakeCache.txt" ] && [ ! -f "$folder/build.ninja" ]; then
    rm -f -- "$folder/CMakeCache.txt" # an earlier attempt failed: do not keep its findings
  fi
  say "configure build/$preset"
  local output
  if ! output="$(cd -- "$KOMPAKT_ROOT" && cmake --preset "$preset" "$@" 2>&1)"; then
    printf '%s\n' "$output" >&2
    die "CMake could not configure build/$preset (its message stands above)" \
      "after a change of compiler or LibTorch, remove the folder and try again: rm -r $folder"
  fi
  # Of the many lines, those that say which torch and CUDA are used, and warnings.
  printf '%s\n' "$output" | sed -n -e 's/^-- \(.*\(LibTorch\|CUDA\|nvcc\).*\)/    \1/p' -e '/^CMake.*Warning/,/^$/p' | grep -v 'ABI info\|compile features\|Check for working' >&2 || true
}

# build PRESET [CMAKE_BUILD_ARGUMENT...]
build() {
  local preset="$1" jobs
  shift
  jobs="$(compile_jobs)"
  say "build build/$preset, $jobs at a time"
  (cd -- "$KOMPAKT_ROOT" && cmake --build "build/$preset" --parallel "$jobs" "$@" >&2) ||
    die "the build of build/$preset failed (the compiler's messages stand above)" \
      "'Killed' among them means too little memory: close other programs and run this again, it goes on where it stopped"
}

# check_file SHA256 FILE: true when the file is there and has this checksum.
check_file() { [ -f "$2" ] && [ "$(sha256sum -- "$2" | cut -d ' ' -f 1)" = "$1" ]; }
