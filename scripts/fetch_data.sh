#!/usr/bin/env bash
# Brings data sets that the repository may not carry into .cache/data/, where the recipes look for them.
# banking77 needs none of this: it is committed under data/banking77/.
#
# usage: scripts/fetch_data.sh [--from DIR] [trec6 | wikitext2 | all]      (default: all)
#   trec6       question types of Li and Roth (2002), for research use           -> .cache/data/trec6/
#   wikitext2   WikiText-2 of Merity et al. (2016), CC BY-SA 3.0                 -> .cache/data/wikitext2/
# Files are looked for in DIR, in $KOMPAKT_SHARED, and in ../shared/data beside the project. Without them this script
# says where they come from; it downloads nothing, because accepting a licence is your decision.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

readonly destination="$KOMPAKT_ROOT/.cache/data"

# One line a file: SHA-256, name below .cache/data/, then the names under which a source folder may have it.
trec6_files() {
  cat << 'TABLE'
538c647f6e95b4b9e9fc5bd28d8aaa759680b2b20eab1f80f7a82bfc7ac437c6 trec6/train.txt classification/trec6/train.txt trec6/train.txt TREC.train.all data/TREC.train.all
92a6a3cede5678b447ef5f1d7ec474134fcda211e6590e6fa627b4a2c68e4566 trec6/test.txt classification/trec6/test.txt trec6/test.txt TREC.test.all data/TREC.test.all
TABLE
}
trec6_origin() {
  note "TREC-6: 5,452 + 500 questions, licensed for research."
  note "  git clone https://github.com/harvardnlp/sent-conv-torch && scripts/fetch_data.sh --from sent-conv-torch trec6"
}

wikitext2_files() {
  cat << 'TABLE'
f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8 wikitext2/valid.txt lm/wikitext2/valid.txt wikitext2/valid.txt wikitext-2/valid.txt word_language_model/data/wikitext-2/valid.txt
d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0 wikitext2/test.txt lm/wikitext2/test.txt wikitext2/test.txt wikitext-2/test.txt word_language_model/data/wikitext-2/test.txt
d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7 wikitext2/calibration.txt calibration/wiki.utf8 wikitext2/calibration.txt wiki.utf8 exllamav2/conversion/standard_cal_data/wiki.utf8
TABLE
}
wikitext2_origin() {
  note "WikiText-2: validation and test text of Wikipedia (CC BY-SA 3.0); and other Wikipedia articles for calibration."
  note "  git clone https://github.com/pytorch/examples && scripts/fetch_data.sh --from examples wikitext2"
  note "  git clone https://github.com/turboderp/exllamav2 && scripts/fetch_data.sh --from exllamav2 wikitext2"
}

# place SHA256 SOURCE TARGET: copies under a temporary name, makes UTF-8 of the Latin-1 that TREC's origin has, renames.
place() {
  local sum="$1" source="$2" target="$3" part="$3.part"
  mkdir -p -- "$(dirname -- "$target")"
  cp -- "$source" "$part" && chmod u+w "$part"
  if ! check_file "$sum" "$part"; then
    iconv -f LATIN1 -t UTF-8 -- "$source" > "$part"
  fi
  if ! check_file "$sum" "$part"; then
    rm -f -- "$part"
    return 1
  fi
  mv -- "$part" "$target"
}

fetch() {
  local name="$1" sum target candidates candidate folder found missing=0
  while read -r sum target candidates; do
    if check_file "$sum" "$destination/$target"; then
      note ".cache/data/$target is in place (checksum agrees)"
      continue
    fi
    found=0
    for folder in "${sources[@]}"; do
      for candidate in $candidates; do
        [ -f "$folder/$candidate" ] || continue
        if place "$sum" "$folder/$candidate" "$destination/$target"; then
          say "$folder/$candidate -> .cache/data/$target"
          found=1
          break 2
        fi
        warn "$folder/$candidate is another version (SHA-256 differs from $sum): not taken"
      done
    done
    if [ "$found" = 0 ]; then
      warn ".cache/data/$target was not found"
      missing=1
    fi
  done < <("${name}_files")
  if [ "$missing" = 1 ]; then
    "${name}_origin"
    any_missing=1
  fi
}

sources=()
names=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --from)
      [ "$#" -ge 2 ] || die "--from needs a folder" "usage: scripts/fetch_data.sh --from DIR [trec6 | wikitext2 | all]"
      [ -d "$2" ] || die "the folder '$2' does not exist" "give the folder that holds the data files after --from"
      sources+=("$(cd -- "$2" && pwd -P)")
      shift
      ;;
    trec6 | wikitext2) names+=("$1") ;;
    all) names+=(trec6 wikitext2) ;;
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) die "unknown data set '$1'" "known: trec6, wikitext2, all; banking77 is in data/banking77 already" ;;
  esac
  shift
done
[ "${#names[@]}" -gt 0 ] || names=(trec6 wikitext2)
if [ -n "${KOMPAKT_SHARED:-}" ]; then sources+=("$KOMPAKT_SHARED"); fi
sources+=("$KOMPAKT_ROOT/../shared/data")

require_writable_root
any_missing=0
for name in "${names[@]}"; do fetch "$name"; done
if [ "$any_missing" = 1 ]; then
  die "not every file was found" "get the data as shown above and name its folder with --from"
fi
