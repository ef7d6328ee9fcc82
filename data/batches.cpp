// Batches as pure functions of (seed, epoch, index): nothing of a run's state is needed to resume in the middle of an epoch.
#include "data/batches.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "core/error.h"
#include "core/random.h"
#include "core/text.h"
#include "data/dataset.h"
#include "data/tokenizer.h"

namespace kompakt {
namespace {

TokenBatch padded_batch(const TokenizedExamples& data, const std::vector<std::int64_t>& examples, std::int64_t pad) {
  TokenBatch batch;
  batch.rows = static_cast<std::int64_t>(examples.size());
  for (const std::int64_t example : examples) batch.columns = std::max(batch.columns, static_cast<std::int64_t>(data.ids[static_cast<std::size_t>(example)].size()));
  batch.ids.assign(static_cast<std::size_t>(batch.rows * batch.columns), pad);
  batch.examples = examples;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const auto example = static_cast<std::size_t>(examples[static_cast<std::size_t>(row)]);
    std::copy(data.ids[example].begin(), data.ids[example].end(), batch.ids.begin() + row * batch.columns);
    batch.lengths.push_back(static_cast<std::int64_t>(data.ids[example].size()));
    if (!data.labels.empty()) batch.labels.push_back(data.labels[example]);
  }
  return batch;
}

void check_batch_size(std::int64_t batch_size) {
  if (batch_size < 1) throw Error("the batch size must be positive").given(std::to_string(batch_size)).allowed("1 or more");
}

void check_index(std::int64_t index, std::int64_t count) {
  if (index < 0 || index >= count) throw std::logic_error(str("batch ", index, " of ", count));
}

// How many tokens the post-processor puts behind a text.
std::int64_t closing_tokens(const Tokenizer& tokenizer) {
  const auto frame = static_cast<std::int64_t>(tokenizer.encode("").size());
  const auto plain = tokenizer.encode("a", false), full = tokenizer.encode("a");
  for (std::int64_t before = 0; before <= frame && plain.size() + static_cast<std::size_t>(before) <= full.size(); ++before)
    if (std::equal(plain.begin(), plain.end(), full.begin() + before)) return frame - before;
  throw std::logic_error("the tokenizer changes a text when it adds special tokens");
}

}  // namespace

std::int64_t TokenBatch::tokens() const { return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}); }

TokenizedExamples tokenize(const ClassificationSet& set, const Tokenizer& tokenizer, std::int64_t max_length, bool refuse_long) {
  const std::int64_t closing = closing_tokens(tokenizer);
  const auto frame = static_cast<std::int64_t>(tokenizer.encode("").size());
  if (max_length < 0 || (max_length > 0 && max_length <= frame))
    throw Error("the maximal length leaves no room for text").given(std::to_string(max_length)).allowed(str("more than the ", frame, " special tokens of the tokenizer, or 0 for no limit"));
  TokenizedExamples out;
  for (std::size_t i = 0; i < set.examples.size(); ++i) {
    std::vector<std::int64_t> ids = tokenizer.encode(set.examples[i].text);
    if (max_length > 0 && static_cast<std::int64_t>(ids.size()) > max_length) {
      if (refuse_long)
        throw Error(str("text ", i + 1, " has ", ids.size(), " tokens")).given(set.examples[i].text.substr(0, 80)).allowed(str("at most ", max_length)).hint("raise max_length, or set refuse_long: false to cut long texts");
      ids.erase(ids.begin() + (max_length - closing), ids.end() - closing);
      ++out.truncated;
    }
    out.ids.push_back(std::move(ids));
    out.labels.push_back(set.examples[i].label);
  }
  return out;
}

ClassificationBatches::ClassificationBatches(const TokenizedExamples& data, std::int64_t batch_size, std::int64_t chunk_batches, std::uint64_t seed, std::int64_t pad)
    : data_(data), batch_size_(batch_size), chunk_batches_(chunk_batches), pad_(pad), seed_(seed) {
  check_batch_size(batch_size);
  if (chunk_batches < 0) throw Error("the number of batches sorted together is negative").given(std::to_string(chunk_batches)).allowed("0 or more");
  if (data.ids.empty()) throw Error("there are no examples to make batches of");
}

std::int64_t ClassificationBatches::batches_per_epoch() const { return (static_cast<std::int64_t>(data_.ids.size()) + batch_size_ - 1) / batch_size_; }

TokenBatch ClassificationBatches::get(std::int64_t epoch, std::int64_t index) const {
  check_index(index, batches_per_epoch());
  if (cached_epoch_ != epoch) {
    const auto count = static_cast<std::int64_t>(data_.ids.size());
    std::vector<std::int64_t> order = CounterRandom(seed_, str("data-order/epoch-", epoch)).permutation(count);
    const std::int64_t chunk = batch_size_ * chunk_batches_;
    for (std::int64_t start = 0; chunk > 0 && start < count; start += chunk)
      std::stable_sort(order.begin() + start, order.begin() + std::min(start + chunk, count),
                       [&](std::int64_t a, std::int64_t b) { return data_.ids[static_cast<std::size_t>(a)].size() < data_.ids[static_cast<std::size_t>(b)].size(); });
    std::vector<std::vector<std::int64_t>> batches;
    for (const std::int64_t batch : CounterRandom(seed_, str("batch-order/epoch-", epoch)).permutation(batches_per_epoch())) {
      const std::int64_t start = batch * batch_size_;
      batches.emplace_back(order.begin() + start, order.begin() + std::min(start + batch_size_, count));
    }
    order_ = std::move(batches);
    cached_epoch_ = epoch;
  }
  return padded_batch(data_, order_[static_cast<std::size_t>(index)], pad_);
}

std::vector<TokenBatch> ClassificationBatches::evaluation(std::int64_t batch_size) const {
  check_batch_size(batch_size);
  const auto count = static_cast<std::int64_t>(data_.ids.size());
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return data_.ids[static_cast<std::size_t>(a)].size() < data_.ids[static_cast<std::size_t>(b)].size(); });
  std::vector<TokenBatch> batches;
  for (std::int64_t start = 0; start < count; start += batch_size)
    batches.push_back(padded_batch(data_, {order.begin() + start, order.begin() + std::min(start + batch_size, count)}, pad_));
  return batches;
}

TextBatches::TextBatches(std::vector<std::vector<std::int64_t>> documents, std::int64_t length, std::int64_t batch_size, std::int64_t separator, bool boundaries, std::uint64_t seed)
    : length_(length), batch_size_(batch_size), boundaries_(boundaries), seed_(seed) {
  check_batch_size(batch_size);
  if (length < 1) throw Error("the row length must be positive").given(std::to_string(length)).allowed("1 or more");
  std::size_t total = 0;
  for (const auto& document : documents) total += document.size() + (separator >= 0 ? 1 : 0);
  tokens_.reserve(total);
  documents_.reserve(total);
  std::int64_t number = 0;
  for (const auto& document : documents) {
    tokens_.insert(tokens_.end(), document.begin(), document.end());
    if (separator >= 0) tokens_.push_back(separator);  // belongs to the document it ends
    documents_.resize(tokens_.size(), number++);
  }
  if (rows() == 0) throw Error(str("the text has only ", tokens_.size(), " tokens")).allowed(str("at least one row of ", length, " tokens")).hint("give more text or a smaller length");
}

std::int64_t TextBatches::rows() const { return static_cast<std::int64_t>(tokens_.size()) / length_; }

std::int64_t TextBatches::batches_per_epoch() const { return (rows() + batch_size_ - 1) / batch_size_; }

std::vector<std::int64_t> TextBatches::row(std::int64_t index) const {
  check_index(index, rows());
  return {tokens_.begin() + index * length_, tokens_.begin() + (index + 1) * length_};
}

TokenBatch TextBatches::get(std::int64_t epoch, std::int64_t index) const {
  check_index(index, batches_per_epoch());
  if (cached_epoch_ != epoch) {
    order_ = CounterRandom(seed_, str("text-order/epoch-", epoch)).permutation(rows());
    cached_epoch_ = epoch;
  }
  TokenBatch batch;
  batch.rows = std::min(batch_size_, rows() - index * batch_size_);
  batch.columns = length_;
  for (std::int64_t i = 0; i < batch.rows; ++i) {
    const std::int64_t number = order_[static_cast<std::size_t>(index * batch_size_ + i)], start = number * length_;
    batch.examples.push_back(number);
    batch.lengths.push_back(length_);
    batch.ids.insert(batch.ids.end(), tokens_.begin() + start, tokens_.begin() + start + length_);
    std::int64_t document = 0, position = 0;
    for (std::int64_t column = 0; boundaries_ && column < length_; ++column, ++position) {
      const auto at = static_cast<std::size_t>(start + column);
      if (column > 0 && documents_[at] != documents_[at - 1]) {
        ++document;
        position = 0;
      }
      batch.documents.push_back(document);
      batch.positions.push_back(position);
    }
  }
  return batch;
}

}  // namespace kompakt
