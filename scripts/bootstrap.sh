#!/usr/bin/env bash
# Installs what kompakt needs to build and run: Debian packages, and LibTorch from its wheel into .venv of the project.
# Says what it installs before it does, installs only what is missing, and takes well under a second when nothing is.
# It does not touch any other Python environment and does not need a GPU. Where an NVIDIA driver answers, LibTorch comes
# with its CUDA libraries.
#
# usage: scripts/bootstrap.sh [--check] [--cuda | --cpu] [-DTorch_DIR=DIR]
#   --check            install nothing; list what is missing and exit with 1 if anything is
#   --cuda, --cpu      with LibTorch's CUDA libraries (5.3 GB), or without (1.3 GB); default: as the machine is
#   -DTorch_DIR=DIR    use another LibTorch (2.9 or newer); so do the variables KOMPAKT_TORCH and Torch_DIR
# environment: KOMPAKT_SKIP_PACKAGES=1 leaves the system's packages alone (you installed them in another way)
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# The two nvidia packages are the ones that torch 2.15.0 asks for: libtorch_cpu.so links them even where no GPU is.
readonly torch_wheels=(torch==2.15.0 nvidia-cuda-runtime==13.2.86 nvidia-cuda-cupti==13.2.86)
readonly packages=(
  g++ cmake ninja-build ccache pkg-config git ca-certificates
  python3 python3-venv
  libcxxopts-dev libyaml-cpp-dev libhdf5-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev libssl-dev libzstd-dev zlib1g-dev
  libpugixml-dev libgloo-dev catch2 xz-utils
)

check_only=0
if have nvidia-smi && nvidia-smi -L > /dev/null 2>&1; then cuda=1; else cuda=0; fi
torch_arguments=()
for argument in "$@"; do
  case "$argument" in
    --check) check_only=1 ;;
    --cuda) cuda=1 ;;
    --cpu) cuda=0 ;;
    -D*) torch_arguments+=("$argument") ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) die "unknown option '$argument'" "allowed: --check, --cuda, --cpu, -DTorch_DIR=DIR, --help" ;;
  esac
done

missing_packages() {
  local installed package
  installed=" $(dpkg-query -W -f='${Package}:${db:Status-Status} ' "${packages[@]}" 2> /dev/null || true)"
  for package in "${packages[@]}"; do
    [[ "$installed" == *" $package:installed "* ]] || echo "$package"
  done
}

install_packages() {
  local missing system runner=()
  if ! have dpkg-query || ! have apt-get; then
    system="$(. /etc/os-release 2> /dev/null && echo "${PRETTY_NAME:-this system}" || echo 'this system')"
    die "$system does not use Debian packages, and that is all this script can install" \
      "install the equivalents of: ${packages[*]}" "then run again with KOMPAKT_SKIP_PACKAGES=1"
  fi
  mapfile -t missing < <(missing_packages)
  [ "${#missing[@]}" -gt 0 ] || return 0
  if [ "$check_only" = 1 ]; then
    say "missing Debian packages: ${missing[*]}"
    anything_missing=1
    return 0
  fi
  say "installing Debian packages: ${missing[*]}"
  if [ "$(id -u)" != 0 ]; then
    have sudo || die "these packages are missing, and $(id -un) is neither root nor has sudo" \
      "ask an administrator to run: apt-get install --no-install-recommends ${missing[*]}" \
      "then run this script again as yourself; it needs no rights beyond that"
    if [ -t 0 ]; then runner=(sudo); else runner=(sudo -n); fi
    "${runner[@]}" true 2> /dev/null || die "sudo did not let $(id -un) install packages" \
      "ask an administrator to run: apt-get install --no-install-recommends ${missing[*]}"
  fi
  quietly "${runner[@]}" apt-get update -qq || die "the package lists could not be updated (apt's message stands above)" \
    "check the network and the sources in /etc/apt, then run this script again"
  quietly "${runner[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" ||
    die "apt-get could not install the packages (its message stands above)" \
      "'Unable to locate' means that this release does not have the package; Debian 12 has them all" \
      "a disk without space or another apt that runs now are the other usual reasons"
}

check_tools() {
  local version
  have cmake || die "cmake is not on the PATH" "install CMake 3.25 or newer"
  version="$(cmake --version | awk 'NR == 1 { print $3 }')"
  [ "$(printf '%s\n3.25\n' "$version" | sort -V | head -n 1)" = 3.25 ] || die "cmake $version ($(command -v cmake)) is too old: 3.25 or newer is needed" \
    "Debian 12 has it; an older one earlier in the PATH hides it"
  have ninja || die "ninja is not on the PATH" "install the package ninja-build"
  have g++ || have clang++ || [ -n "${CXX:-}" ] || die "no C++ compiler is on the PATH" "install the package g++ (12 or newer)"
}

# The first Python of 3.11 or newer that can make environments: the one on the PATH may be a stripped build.
find_python() {
  local candidate
  for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then
      echo "$candidate" && return
    fi
  done
  die "no Python 3.11 or newer with the modules venv and ensurepip was found" \
    "install the packages python3 and python3-venv, or name another LibTorch with -DTorch_DIR=<folder>/share/cmake/Torch"
}

# pip writes INSTALLER last: a killed installation has none and is repeated.
torch_is_there() {
  local spec name version
  for spec in "${torch_wheels[@]}"; do
    name="${spec%%==*}" version="${spec##*==}"
    compgen -G "$KOMPAKT_VENV/lib/python3*/site-packages/${name//-/_}-$version.dist-info/INSTALLER" > /dev/null || return 1
  done
  if [ "$cuda" = 1 ]; then compgen -G "$KOMPAKT_VENV/lib/python3*/site-packages/nvidia/*/lib/libcublas.so*" > /dev/null || return 1; fi
  compgen -G "$KOMPAKT_VENV/lib/python3*/site-packages/torch/lib/libtorch_cpu.so" > /dev/null
}

ensure_environment() {
  if [ -e "$KOMPAKT_VENV" ] && ! "$KOMPAKT_VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    say "replacing .venv: its Python does not run any more"
    rm -rf -- "$KOMPAKT_VENV"
  fi
  [ -e "$KOMPAKT_VENV" ] && return 0
  local python
  python="$(find_python)"
  say "making the Python environment .venv with $("$python" --version)"
  "$python" -m venv "$KOMPAKT_VENV" >&2 || {
    rm -rf -- "$KOMPAKT_VENV"
    die "python could not make the environment $KOMPAKT_VENV (its message stands above)" "check the free disk space"
  }
}

install_torch() {
  torch_is_there && return 0
  if [ "$check_only" = 1 ]; then
    say "missing in .venv: ${torch_wheels[*]}"
    anything_missing=1
    return 0
  fi
  require_writable_root
  case "$(uname -m)" in
    x86_64 | aarch64) ;;
    *) die "there is no LibTorch wheel for a $(uname -m) processor" "build LibTorch yourself and name it with -DTorch_DIR=<folder>/share/cmake/Torch" ;;
  esac
  # With CUDA, torch's own list of dependencies decides; without, only what libtorch_cpu.so links.
  local free torch_megabytes=1300 needed_megabytes=4000 without=(--no-deps)
  if [ "$cuda" = 1 ]; then torch_megabytes=5300 needed_megabytes=9000 without=(); fi
  free="$(free_megabytes "$KOMPAKT_ROOT")"
  [ "$free" -ge "$needed_megabytes" ] || die "only $free MB are free in $KOMPAKT_ROOT; LibTorch and a build need $needed_megabytes MB" \
    "free some space, or clone the repository to a larger disk"
  say "installing into .venv (about $torch_megabytes MB): ${torch_wheels[*]}"
  ensure_environment
  "$KOMPAKT_VENV/bin/python" -m pip install --disable-pip-version-check ${without[@]+"${without[@]}"} --only-binary=:all: --quiet "${torch_wheels[@]}" >&2 ||
    die "pip could not install LibTorch (its message stands above)" \
      "check the network and pip's own settings ($KOMPAKT_VENV/bin/python -m pip config list), then run this script again" \
      "without a network: name another LibTorch 2.9 or newer with -DTorch_DIR=<folder>/share/cmake/Torch"
}

anything_missing=0
[ "$(uname -s)" = Linux ] || die "kompakt is built on Linux; this is $(uname -s)" "use a Debian 12 container or machine"
use_writable_cache
if [ "${KOMPAKT_SKIP_PACKAGES:-0}" != 1 ]; then install_packages; fi
[ "$check_only" = 1 ] || check_tools
torch="$(torch_option ${torch_arguments[@]+"${torch_arguments[@]}"})"
if [ -n "$torch" ]; then
  note "LibTorch as told: $torch"
elif have flock && [ -w "$KOMPAKT_ROOT" ] && ! torch_is_there && [ "$check_only" = 0 ]; then
  # Two scripts started at once must not install into one environment together.
  mkdir -p -- "$KOMPAKT_ROOT/.cache"
  exec 9> "$KOMPAKT_ROOT/.cache/bootstrap.lock"
  flock 9
  install_torch
  exec 9>&-
else
  install_torch
fi
exit "$anything_missing"
