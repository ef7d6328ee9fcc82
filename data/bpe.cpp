// Byte-pair encoding with a heap of merges over a linked list of symbols: n log n for a word of n symbols.
// Follows `tokenizers` in the order of merges, in byte fallback and in the treatment of unknown characters.
#include <algorithm>
#include <mutex>
#include <queue>
#include <shared_mutex>
#include <unordered_map>

#include "core/error.h"
#include "core/text.h"
#include "data/subword_model.h"
#include "data/unicode.h"

namespace kompakt {
namespace {

struct BpeSymbol {
  std::int32_t id = 0, previous = -1, next = -1;
  bool alive = true;
};

struct BpeCandidate {
  std::int32_t rank, position, result;
  bool operator<(const BpeCandidate& other) const {  // the heap's top is the greatest
    return rank != other.rank ? rank > other.rank : position > other.position;
  }
};

struct BpeTarget {
  std::int32_t rank, result;
};

// Pair (left, right) -> (rank, result), open addressing: the inner loop of encoding is this look-up.
class BpePairTable {
 public:
  explicit BpePairTable(const std::vector<BpeMerge>& merges) {
    std::size_t size = 16;
    while (size < merges.size() * 2) size *= 2;
    slots_.resize(size);
    mask_ = size - 1;
    for (const BpeMerge& merge : merges) {
      Slot& slot = slots_[locate(key(merge.left, merge.right))];
      // A pair that stands twice keeps its last rank, as in the reference, which collects the list into a map.
      slot = {key(merge.left, merge.right), {merge.rank, merge.result}};
    }
  }
  const BpeTarget* find(std::int32_t left, std::int32_t right) const {
    const std::uint64_t wanted = key(left, right);
    const Slot& slot = slots_[locate(wanted)];
    return slot.key == wanted ? &slot.target : nullptr;
  }

 private:
  struct Slot {
    std::uint64_t key = ~std::uint64_t{0};
    BpeTarget target{0, 0};
  };
  static std::uint64_t key(std::int32_t left, std::int32_t right) { return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right); }
  std::size_t locate(std::uint64_t wanted) const {
    std::size_t at = (wanted * 0x9E3779B97F4A7C15ull >> 20) & mask_;
    while (slots_[at].key != wanted && slots_[at].key != ~std::uint64_t{0}) at = (at + 1) & mask_;
    return at;
  }
  std::vector<Slot> slots_;
  std::size_t mask_ = 0;
};

class BpeModel : public SubwordModel {
 public:
  BpeModel(const Vocabulary& vocabulary, const std::vector<BpeMerge>& merges, const BpeOptions& options, const std::string& place)
      : vocabulary_(vocabulary), options_(options), pairs_(merges) {
    if (!options.unknown.empty()) {
      unknown_ = static_cast<std::int32_t>(vocabulary.find(options.unknown));
      if (unknown_ < 0) throw Error(str("the vocabulary has no unknown token \"", options.unknown, "\"")).at(place);
    }
    for (int byte = 0; byte < 256; ++byte) bytes_[byte] = static_cast<std::int32_t>(vocabulary.find(byte_fallback_token(static_cast<unsigned char>(byte))));
  }

  void encode(std::string_view piece, std::vector<std::int64_t>& ids) const override {
    if (piece.empty()) return;
    if (options_.ignore_merges) {
      if (const std::int64_t whole = vocabulary_.find(piece); whole >= 0) {
        ids.push_back(whole);
        return;
      }
    }
    const bool cached = piece.size() <= longest_cached;
    if (cached) {
      std::shared_lock lock(mutex_);
      if (const auto found = cache_.find(piece); found != cache_.end()) {
        ids.insert(ids.end(), found->second.begin(), found->second.end());
        return;
      }
    }
    const std::size_t before = ids.size();
    merge_piece(piece, ids);
    if (cached) {
      std::unique_lock lock(mutex_);
      if (cache_.size() >= most_cached) cache_.clear();
      cache_.emplace(std::string(piece), std::vector<std::int32_t>(ids.begin() + static_cast<std::ptrdiff_t>(before), ids.end()));
    }
  }

 private:
  static constexpr std::size_t longest_cached = 64, most_cached = 100000;

  void first_symbols(std::string_view piece, std::vector<BpeSymbol>& symbols) const {
    const auto add = [&](std::int32_t id) { symbols.push_back({id, static_cast<std::int32_t>(symbols.size()) - 1, static_cast<std::int32_t>(symbols.size()) + 1, true}); };
    bool pending = false;  // an unknown token that may still absorb its right neighbours
    std::string with_affix;
    for (std::size_t offset = 0; offset < piece.size();) {
      const std::size_t length = std::min(utf8_length(piece[offset]), piece.size() - offset);
      std::string_view character = piece.substr(offset, length);
      const bool first = offset == 0, last = offset + length == piece.size();
      offset += length;
      if ((!first && !options_.prefix.empty()) || (last && !options_.suffix.empty())) {
        with_affix = (first ? "" : options_.prefix) + std::string(character) + (last ? options_.suffix : "");
        character = with_affix;
      }
      if (const std::int64_t id = vocabulary_.find(character); id >= 0) {
        if (pending) add(unknown_);
        pending = false;
        add(static_cast<std::int32_t>(id));
        continue;
      }
      if (options_.byte_fallback && std::all_of(character.begin(), character.end(), [&](char c) { return bytes_[static_cast<unsigned char>(c)] >= 0; })) {
        for (const char c : character) add(bytes_[static_cast<unsigned char>(c)]);
        continue;
      }
      if (unknown_ < 0) continue;
      if (pending && !options_.fuse_unknown) add(unknown_);
      pending = true;
    }
    if (pending) add(unknown_);
    if (!symbols.empty()) symbols.back().next = -1;
  }

  void merge_piece(std::string_view piece, std::vector<std::int64_t>& ids) const {
    thread_local std::vector<BpeSymbol> symbols;
    thread_local std::vector<BpeCandidate> heap;
    symbols.clear();
    heap.clear();
    first_symbols(piece, symbols);
    const auto offer = [&](std::int32_t position, bool push) {
      if (position < 0) return;
      const std::int32_t next = symbols[static_cast<std::size_t>(position)].next;
      if (next < 0) return;
      const BpeTarget* target = pairs_.find(symbols[static_cast<std::size_t>(position)].id, symbols[static_cast<std::size_t>(next)].id);
      if (!target) return;
      heap.push_back({target->rank, position, target->result});
      if (push) std::push_heap(heap.begin(), heap.end());
    };
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) offer(static_cast<std::int32_t>(i), false);
    std::make_heap(heap.begin(), heap.end());
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const BpeCandidate top = heap.back();
      heap.pop_back();
      BpeSymbol& left = symbols[static_cast<std::size_t>(top.position)];
      if (!left.alive || left.next < 0) continue;
      BpeSymbol& right = symbols[static_cast<std::size_t>(left.next)];
      // An entry is out of date when the pair at its place gives something else by now.
      const BpeTarget* target = pairs_.find(left.id, right.id);
      if (!target || target->result != top.result) continue;
      left.id = top.result;
      right.alive = false;
      left.next = right.next;
      if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = top.position;
      offer(left.previous, true);
      offer(top.position, true);
    }
    for (const BpeSymbol& symbol : symbols)
      if (symbol.alive) ids.push_back(symbol.id);
  }

  const Vocabulary& vocabulary_;
  BpeOptions options_;
  BpePairTable pairs_;
  std::int32_t unknown_ = -1, bytes_[256];
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  mutable std::shared_mutex mutex_;
  mutable std::unordered_map<std::string, std::vector<std::int32_t>, Hash, std::equal_to<>> cache_;
};

}  // namespace

std::unique_ptr<SubwordModel> make_bpe(const Vocabulary& vocabulary, const std::vector<BpeMerge>& merges, const BpeOptions& options, const std::string& place) {
  return std::make_unique<BpeModel>(vocabulary, merges, options, place);
}

std::string byte_fallback_token(unsigned char byte) {
  static const char digits[] = "0123456789ABCDEF";
  return std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">";
}

}  // namespace kompakt
