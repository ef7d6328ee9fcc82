// Batches: determinism, coverage, length buckets, padding, packing with document boundaries, cutting of long texts.
#include <catch2/catch.hpp>
#include <set>

#include "core/files.h"
#include "data/batches.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;
using Ids = std::vector<std::int64_t>;

namespace {

TokenizedExamples numbered(std::int64_t count) {
  TokenizedExamples data;
  for (std::int64_t i = 0; i < count; ++i) {
    data.ids.push_back(Ids(static_cast<std::size_t>(1 + (i * 7) % 13), 100 + i));
    data.labels.push_back(i % 3);
  }
  return data;
}

}  // namespace

TEST_CASE("an epoch holds every example once, in an order that seed and epoch fix") {
  const auto data = numbered(53);
  const ClassificationBatches batches(data, 8, 3, 17, 0), same(data, 8, 3, 17, 0), other(data, 8, 3, 18, 0);
  REQUIRE(batches.batches_per_epoch() == 7);
  std::set<std::int64_t> seen;
  bool epochs_differ = false, seeds_differ = false;
  for (std::int64_t i = 0; i < 7; ++i) {
    const TokenBatch batch = batches.get(0, i);
    std::int64_t longest = 0, tokens = 0;
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const std::int64_t example = batch.examples[row];
      CHECK(seen.insert(example).second);
      CHECK(batch.labels[row] == example % 3);
      CHECK(batch.lengths[row] == static_cast<std::int64_t>(data.ids[example].size()));
      for (std::int64_t column = 0; column < batch.columns; ++column) CHECK(batch.ids[row * batch.columns + column] == (column < batch.lengths[row] ? 100 + example : 0));
      longest = std::max(longest, batch.lengths[row]);
      tokens += batch.lengths[row];
    }
    CHECK(batch.columns == longest);
    CHECK(batch.tokens() == tokens);
    CHECK(batch.documents.empty());
    // Asking out of order, or another object, changes nothing.
    CHECK(same.get(1, 6 - i).examples == batches.get(1, 6 - i).examples);
    CHECK(same.get(0, i).examples == batch.examples);
    epochs_differ = epochs_differ || batches.get(1, i).examples != batch.examples;
    seeds_differ = seeds_differ || other.get(0, i).examples != batch.examples;
  }
  CHECK(seen.size() == 53);
  CHECK(epochs_differ);
  CHECK(seeds_differ);
}

TEST_CASE("sorting inside chunks saves padding") {
  const auto data = numbered(200);
  const auto padded = [&](std::int64_t chunk) {
    const ClassificationBatches batches(data, 10, chunk, 1, 0);
    std::int64_t cells = 0;
    for (std::int64_t i = 0; i < batches.batches_per_epoch(); ++i) cells += batches.get(0, i).rows * batches.get(0, i).columns;
    return cells;
  };
  CHECK(padded(20) < padded(0));
  CHECK(padded(20) <= 1500);  // 1,394 tokens in all
}

TEST_CASE("evaluation goes by length and leaves nothing out") {
  const auto data = numbered(21);
  const auto batches = ClassificationBatches(data, 4, 0, 1, 9).evaluation(5);
  REQUIRE(batches.size() == 5);
  std::set<std::int64_t> seen;
  std::int64_t last = 0;
  for (const TokenBatch& batch : batches)
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      CHECK(batch.lengths[row] >= last);
      last = batch.lengths[row];
      seen.insert(batch.examples[row]);
    }
  CHECK(seen.size() == 21);
  CHECK(batches.back().rows == 1);
}

TEST_CASE("batches refuse impossible sizes") {
  const TokenizedExamples none, one = numbered(1);
  CHECK(contains_all(error_text([&] { ClassificationBatches(none, 4, 0, 1, 0); }), {"no examples"}));
  CHECK(contains_all(error_text([&] { ClassificationBatches(one, 0, 0, 1, 0); }), {"batch size"}));
  CHECK(ClassificationBatches(one, 8, 4, 1, 0).get(3, 0).examples == Ids{0});
  CHECK_THROWS_AS(ClassificationBatches(one, 8, 4, 1, 0).get(0, 1), std::logic_error);
  CHECK(contains_all(error_text([&] { TextBatches({{1, 2}}, 3, 1, -1, false, 1); }), {"2 tokens", "3"}));
  CHECK(contains_all(error_text([&] { TextBatches({{1, 2}}, 0, 1, -1, false, 1); }), {"length"}));
}

TEST_CASE("packing: documents end with the separator, positions restart, the tail goes") {
  const TextBatches batches({{1, 2, 3}, {4}, {5, 6, 7, 8, 9}}, 4, 2, 0, true, 7);
  // Stream: 1 2 3 0 | 4 0 5 6 | 7 8 9 0
  REQUIRE(batches.rows() == 3);
  CHECK(batches.row(0) == Ids{1, 2, 3, 0});
  CHECK(batches.row(1) == Ids{4, 0, 5, 6});
  REQUIRE(batches.batches_per_epoch() == 2);
  std::set<std::int64_t> seen;
  for (std::int64_t i = 0; i < 2; ++i) {
    const TokenBatch batch = batches.get(0, i);
    CHECK(batch.columns == 4);
    CHECK(batch.rows == (i == 0 ? 2 : 1));
    CHECK(batch.tokens() == batch.rows * 4);
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const std::int64_t number = batch.examples[row];
      seen.insert(number);
      const auto part = [&](const Ids& all) { return Ids(all.begin() + row * 4, all.begin() + row * 4 + 4); };
      CHECK(part(batch.ids) == batches.row(number));
      CHECK(part(batch.documents) == (number == 1 ? Ids{0, 0, 1, 1} : Ids{0, 0, 0, 0}));
      CHECK(part(batch.positions) == (number == 1 ? Ids{0, 1, 0, 1} : Ids{0, 1, 2, 3}));
    }
  }
  CHECK(seen.size() == 3);
  const TextBatches plain({{1, 2, 3}, {4}, {5, 6, 7, 8, 9}}, 4, 2, -1, false, 7);
  CHECK(plain.rows() == 2);  // nine tokens without separators
  CHECK(plain.get(0, 0).documents.empty());
  CHECK(plain.get(0, 0).positions.empty());
}

TEST_CASE("long texts are cut before their closing special token, or refused") {
  const TemporaryFolder folder;
  write_text(folder.path() / "vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n");
  const auto tokenizer = load_tokenizer(folder.path());
  ClassificationSet set;
  set.examples = {{"a b a b a", 0}, {"b", 1}};
  set.label_names = {"x", "y"};
  const auto data = tokenize(set, *tokenizer, 5, false);
  CHECK(data.ids[0] == Ids{2, 4, 5, 4, 3});
  CHECK(data.ids[1] == Ids{2, 5, 3});
  CHECK(data.labels == Ids{0, 1});
  CHECK(data.truncated == 1);
  CHECK(tokenize(set, *tokenizer, 0, true).truncated == 0);
  CHECK(contains_all(error_text([&] { tokenize(set, *tokenizer, 5, true); }), {"text 1", "7 tokens", "at most 5"}));
  CHECK(contains_all(error_text([&] { tokenize(set, *tokenizer, 2, false); }), {"room"}));
}
