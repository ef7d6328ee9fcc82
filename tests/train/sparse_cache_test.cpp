// The cache of likeliest tokens and draws: its code, what it gives beside the live teacher, resume, and what it refuses.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>

#include "core/files.h"
#include "core/json.h"
#include "formats/hdf5_file.h"
#include "formats/zstd.h"
#include "model/checkpoint.h"
#include "tests/distill/tokenizers.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/dev_score.h"
#include "train/frozen_teacher.h"
#include "train/sparse_codec.h"
#include "train/step_batches.h"
#include "train/targets.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Rows of a falling Zipf-like distribution over `vocabulary` tokens.
SparseRow zipf_row(const SparseLayout& layout, std::uint64_t seed) {
  const CounterRandom random(seed, "zipf");
  SparseRow row;
  std::uint64_t at = 0;
  for (std::int64_t t = 0; t < layout.tokens; ++t) {
    std::vector<double> p(static_cast<std::size_t>(layout.vocabulary));
    double sum = 0;
    for (std::size_t i = 0; i < p.size(); ++i) sum += p[i] = std::exp(1.5 * random.normal(at++)) / static_cast<double>(i + 1);
    std::sort(p.begin(), p.end(), std::greater<>());
    double rest = sum;
    for (std::int64_t i = 0; i < layout.top; ++i) {
      row.ids.push_back((i * 7 + t) % layout.vocabulary);
      row.log_p.push_back(static_cast<float>(std::log(p[static_cast<std::size_t>(i)] / sum)));
      rest -= p[static_cast<std::size_t>(i)];
    }
    row.log_rest.push_back(static_cast<float>(std::log(std::max(rest, 1e-9) / sum)));
    for (std::int64_t i = 0; i < layout.draws; ++i) {
      const auto token = static_cast<std::size_t>(layout.top + i);
      row.draws.push_back(static_cast<std::int64_t>(token));
      row.draw_log_p.push_back(static_cast<float>(std::log(p[token] / std::max(rest, 1e-9))));
    }
  }
  return row;
}

std::shared_ptr<Transformer> cache_decoder(std::uint64_t seed = 5) {
  std::shared_ptr<Transformer> model = tiny_llama(true, seed);
  const at::NoGradGuard no_grad;
  for (const NamedParameter& parameter : model->parameters())
    if (parameter.value->dim() == 2) parameter.value->mul_(20);
  return model;
}

std::vector<std::filesystem::path> parts_of(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> out;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.path().extension() == ".h5") out.push_back(entry.path());
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace

TEST_CASE("bits are packed least significant first, for vocabularies of 2^k and of one more") {
  const std::vector<std::int64_t> values{5, 0, 7, 2};
  const auto bytes = pack_bits(values, 3);
  REQUIRE(bytes.size() == 2);
  CHECK(bytes[0] == std::byte{0b11000101});  // 101, 000, then the low two bits of 111
  CHECK(bytes[1] == std::byte{0b00000101});
  CHECK(unpack_bits(bytes, 4, 3) == values);
  for (const std::int64_t vocabulary : {2, 3, 256, 257, 49152, 65536, 65537, 262144}) {
    const int bits = SparseLayout{1, 1, 0, vocabulary}.id_bits();
    INFO(vocabulary << " needs " << bits);
    CHECK((std::int64_t{1} << bits) >= vocabulary);
    CHECK((std::int64_t{1} << (bits - 1)) < vocabulary);
    const std::vector<std::int64_t> ids{vocabulary - 1, 0, vocabulary / 2, 1, vocabulary - 1};
    CHECK(unpack_bits(pack_bits(ids, bits), ids.size(), bits) == ids);
  }
  CHECK(SparseLayout{1, 1, 0, 1}.id_bits() == 1);
  CHECK(pack_bits({}, 9).empty());
  CHECK_THROWS_AS(unpack_bits(bytes, 6, 3), std::logic_error);
}

TEST_CASE("a coded row comes back: tokens exactly, probabilities to a divergence far below any model's") {
  const SparseLayout layout{40, 24, 6, 300};
  const SparseRow row = zipf_row(layout, 3);
  const auto frame = encode_sparse_row(row, layout);
  const SparseRow back = decode_sparse_row(frame, layout, "test");
  CHECK(back.ids == row.ids);
  CHECK(back.draws == row.draws);
  double worst = 0, mean = 0;
  for (std::int64_t t = 0; t < layout.tokens; ++t) {
    double kl = 0, sum = std::exp(back.log_rest[static_cast<std::size_t>(t)]), known = 0;
    for (std::int64_t i = 0; i < layout.top; ++i) {
      const auto at = static_cast<std::size_t>(t * layout.top + i);
      known += std::exp(row.log_p[at]);
      sum += std::exp(back.log_p[at]);
      kl += std::exp(row.log_p[at]) * (row.log_p[at] - back.log_p[at]);
    }
    kl += (1 - known) * (row.log_rest[static_cast<std::size_t>(t)] - back.log_rest[static_cast<std::size_t>(t)]);
    CHECK(sum == Approx(1).epsilon(1e-5));
    worst = std::max(worst, kl);
    mean += kl / static_cast<double>(layout.tokens);
    for (std::int64_t i = 0; i < layout.draws; ++i) {
      const auto at = static_cast<std::size_t>(t * layout.draws + i);
      CHECK(back.draw_log_p[at] == Approx(row.draw_log_p[at]).margin(0.15));
    }
  }
  CHECK(worst < 2e-4);  // half the square of the largest step of a gap, 0.02
  CHECK(mean < 3e-5);
  CHECK(mean > -1e-6);
  CHECK(frame.size() <= layout.packed_bytes() + 32);
  // A single known token, no draws, and a teacher that is certain.
  const SparseLayout one{2, 1, 0, 5};
  const SparseRow certain = decode_sparse_row(encode_sparse_row({{4, 0}, {}, {0, -0.7f}, {-90, std::log(1 - std::exp(-0.7f))}, {}}, one), one, "test");
  CHECK(certain.log_p[0] == Approx(0).margin(1e-6));
  CHECK(certain.log_p[1] == Approx(-0.7).epsilon(1e-3));
  CHECK(certain.log_rest[0] == Approx(-17));
}

TEST_CASE("damaged rows are refused") {
  const SparseLayout layout{8, 4, 2, 50};
  auto frame = encode_sparse_row(zipf_row(layout, 4), layout);
  CHECK(contains_all(error_text([&] { decode_sparse_row(std::span(frame).first(frame.size() - 3), layout, "part.h5: row 3"); }), {"damaged", "part.h5: row 3"}));
  CHECK(contains_all(error_text([&] { decode_sparse_row({}, layout, "here"); }), {"here"}));
  SparseLayout other = layout;
  other.top = 5;
  CHECK(contains_all(error_text([&] { decode_sparse_row(frame, other, "here"); }), {"here"}));
  for (const std::size_t at : {std::size_t{0}, frame.size() / 2, frame.size() - 1}) {  // the checksum of the frame sees a flipped bit
    auto flipped = frame;
    flipped[at] ^= std::byte{4};
    CHECK(contains_all(error_text([&] { decode_sparse_row(flipped, layout, "here"); }), {"here"}));
  }
  SparseLayout small = layout;
  small.vocabulary = 40;  // as many bits, fewer tokens
  SparseRow row = zipf_row(layout, 4);
  row.ids[2] = 49;
  CHECK(contains_all(error_text([&] { decode_sparse_row(encode_sparse_row(row, layout), small, "here"); }), {"token 49", "0 to 39"}));
}

TEST_CASE("the cache gives the live teacher's likeliest tokens, the rest and draws from it") {
  const TaskData data = tiny_text();
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  const auto cached = sparse_teacher(model, data, 16, {6, 4}, folder.path());
  const auto live = live_teacher(model);
  cached->prepare({});
  live->prepare({});
  TrainOptions options = tiny_options();
  options.batch_size = 3;
  options.sequence_length = 16;
  const StepBatches batches(data, options, 1);
  const at::NoGradGuard no_grad;
  const TokenBatch batch = batches.micro_batches(0).at(0);
  const TeacherTargets a = cached->targets(batch), b = live->targets(batch);
  CHECK(!b.logits.defined());
  const at::Tensor log_p = at::log_softmax(at::matmul(b.hidden, b.head_weight.t()), -1);
  const auto [best, ids] = log_p.topk(6, -1);
  CHECK(at::equal(a.sparse.ids, ids));
  CHECK(at::allclose(a.sparse.log_p, best, 0, 0.05));
  CHECK(at::allclose(a.sparse.log_rest.exp(), 1 - best.exp().sum(-1), 0, 2e-3));
  CHECK(at::allclose(a.sparse.log_p.exp().sum(-1) + a.sparse.log_rest.exp(), at::ones({3, 16}), 0, 1e-5));
  CHECK(a.sparse.vocabulary == 50);
  CHECK(a.sparse.draws.unsqueeze(-1).eq(a.sparse.ids.unsqueeze(-2)).any().item<bool>() == false);  // the rest is what is not among the likeliest
  CHECK(at::allclose(a.sparse.draw_log_p, log_p.gather(-1, a.sparse.draws) - a.sparse.log_rest.unsqueeze(-1), 0, 0.15));
  // Asked again, in any company: the same.
  TokenBatch again = batches.micro_batches(0).at(0);
  const TeacherTargets c = cached->targets(again);
  CHECK(at::equal(c.sparse.log_p, a.sparse.log_p));
  CHECK(at::equal(c.sparse.draws, a.sparse.draws));
}

TEST_CASE("a cache for a student with fewer rows knows nothing of the teacher's other tokens") {
  const TaskData data = tiny_text();
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  const auto cached = sparse_teacher(model, data, 16, {.top = 6, .tail = 4, .columns = 41}, folder.path()), whole = sparse_teacher(model, data, 16, {.top = 6, .tail = 4}, folder.path());
  const auto live = live_teacher(model);
  for (TeacherSource* source : {cached.get(), whole.get(), live.get()}) source->prepare({});
  TrainOptions options = tiny_options();
  options.batch_size = 3, options.sequence_length = 16;
  const at::NoGradGuard no_grad;
  const TokenBatch batch = StepBatches(data, options, 1).micro_batches(0).at(0);
  const TeacherTargets a = cached->targets(batch), b = live->targets(batch);
  const auto [best, ids] = at::log_softmax(at::matmul(b.hidden, b.head_weight.narrow(0, 0, 41).t()), -1).topk(6, -1);
  CHECK(a.sparse.vocabulary == 41);
  CHECK(at::equal(a.sparse.ids, ids));
  CHECK(at::allclose(a.sparse.log_p, best, 0, 0.05));
  CHECK(a.sparse.draws.max().item<std::int64_t>() < 41);
  // Another cache than that of all tokens, in a folder of its own.
  const TeacherTargets c = whole->targets(batch);
  CHECK(c.sparse.ids.max().item<std::int64_t>() >= 41);
  CHECK(cached->fingerprint() != whole->fingerprint());
}

TEST_CASE("a tokenizer without an end token puts none between documents, and none is learned") {
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.train_documents = {{5, 6, 7}, {8, 9}, {10, 11, 12}};
  const auto rows = [&] {
    TrainOptions options = tiny_options();
    options.batch_size = 1, options.sequence_length = 4;
    const StepBatches batches(data, options, 1);
    std::map<std::int64_t, std::vector<std::int64_t>> out;
    for (std::int64_t step = 0; step < batches.steps_per_epoch(); ++step)
      for (const TokenBatch& batch : batches.micro_batches(step)) out[batch.examples[0]] = batch.ids;
    return out;
  };
  const TemporaryFolder folder;
  word_tokenizer()->save(folder.path());
  Json json = read_json(folder.path() / "tokenizer.json");
  json["added_tokens"] = Json::array();
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) files.push_back(entry.path());
  for (const auto& file : files) std::filesystem::remove(file);
  write_text(folder.path() / "tokenizer.json", json.dump());
  const auto endless = load_tokenizer(folder.path());
  REQUIRE(endless->special().eos < 0);
  data.tokenizer = endless.get();
  CHECK(rows() == std::map<std::int64_t, std::vector<std::int64_t>>{{0, {5, 6, 7, 8}}, {1, {9, 10, 11, 12}}});
}

TEST_CASE("rows written by scripts/capture_teacher.py are read") {
  for (const Json& item : read_json(source_folder() / "tests/goldens/capture.json")) {
    const SparseLayout layout{item.at("tokens").get<std::int64_t>(), item.at("top").get<std::int64_t>(), 0, item.at("vocabulary").get<std::int64_t>()};
    CAPTURE(layout.vocabulary);
    const std::string hex = item.at("bytes").get<std::string>();
    std::vector<std::byte> bytes;
    for (std::size_t i = 0; i < hex.size(); i += 2) bytes.push_back(static_cast<std::byte>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    const SparseRow written{item.at("ids").get<std::vector<std::int64_t>>(), {}, item.at("log_p").get<std::vector<float>>(), item.at("log_rest").get<std::vector<float>>(), {}};
    const bool same = zstd_compress(bytes) == encode_sparse_row(written, layout);  // byte for byte what is written here
    CHECK(same);
    CHECK(decode_sparse_row(zstd_compress(bytes), layout, "golden").ids == written.ids);
  }
}

TEST_CASE("rows that come from elsewhere: the run says what it wants, and takes what it gets") {
  TaskData data = tiny_text();
  std::vector<std::int64_t> window;
  for (std::int64_t i = 0; i < 40; ++i) window.push_back(i);
  data.heldout = {window};
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  const SparseCacheOptions options{.top = 6, .tail = 0, .fill = "elsewhere"};
  const auto source = [&] { return sparse_teacher(model, data, 16, options, folder.path()); };
  const auto first = source();
  CHECK(contains_all(error_text([&] { first->prepare({}); }), {"from elsewhere", "wanted.h5", "capture_teacher.py"}));
  const std::filesystem::path place = std::filesystem::directory_iterator(folder.path())->path();
  std::vector<std::int64_t> rows, ids;
  {
    const Hdf5File file(place / "wanted.h5", Hdf5File::Mode::read);
    const auto numbers = [&](const char* name) {
      const TensorData tensor = file.read(name);
      std::vector<std::int64_t> out(tensor.bytes.size() / sizeof(std::int64_t));
      std::memcpy(out.data(), tensor.bytes.data(), tensor.bytes.size());
      return out;
    };
    rows = numbers("rows"), ids = numbers("ids");
    CHECK(numbers("documents").size() == ids.size());
    CHECK(parse_json(file.attribute("identity"), "wanted").at("top") == 6);
  }
  CHECK(ids.size() == rows.size() * 16);
  CHECK(std::count_if(rows.begin(), rows.end(), [](std::int64_t row) { return row < 0; }) == 2);  // held out
  TrainOptions train = tiny_options();
  train.batch_size = 1, train.sequence_length = 16;
  const StepBatches batches(data, train, 1);
  CHECK(contains_all(error_text([&] { first->targets(batches.micro_batches(0).at(0)); }), {"not in the teacher's cache", "elsewhere"}));
  // The same rows by another way fill the same folder.
  {
    SparseCacheOptions here = options;
    here.fill = "teacher";
    const auto filler = sparse_teacher(model, data, 16, here, folder.path());
    filler->prepare({});
    CHECK(filler->fingerprint() == first->fingerprint());
    for (std::int64_t step = 0; step < batches.steps_per_epoch(); ++step) filler->targets(batches.micro_batches(step).at(0));
  }
  CHECK(contains_all(error_text([&] { source()->prepare({}); }), {"2 of", "wanted.h5"}));
  data.heldout.clear();
  const auto last = source();
  CHECK_NOTHROW(last->prepare({}));
  CHECK(last->targets(batches.micro_batches(0).at(0)).sparse.ids.size(-1) == 6);
}

TEST_CASE("held-out windows under a cache are cut to its rows") {
  const TaskData data = tiny_text();
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  const auto cached = sparse_teacher(model, data, 16, {6, 4}, folder.path());
  const auto live = live_teacher(model);
  const std::vector<std::int64_t> window = [] {
    std::vector<std::int64_t> out;
    for (std::int64_t i = 0; i < 40; ++i) out.push_back(i);
    return out;
  }();
  const std::vector<std::vector<std::int64_t>> windows = {window, {1, 2, 3}, std::vector<std::int64_t>(window.begin(), window.begin() + 16)};
  const auto whole = held_out_batches(windows, *live, 16);
  REQUIRE(whole.size() == 3);
  for (std::size_t i = 0; i < 3; ++i) CHECK(whole[i].ids == windows[i]);
  cached->prepare({});
  const auto rows = held_out_batches(windows, *cached, 16);
  REQUIRE(rows.size() == 4);
  CHECK(rows[0].ids == windows[2]);
  CHECK(rows[1].ids == std::vector<std::int64_t>(window.begin() + 16, window.begin() + 32));
  CHECK(rows[1].examples == std::vector<std::int64_t>{-2});
  // Too short for a row: filled up, and only its own tokens count.
  CHECK(rows[2].columns == 16);
  CHECK(rows[2].lengths == std::vector<std::int64_t>{3});
  CHECK(count_targets(rows[2]) == 2);
  const at::NoGradGuard no_grad;
  live->prepare({});
  const TeacherTargets full = live->targets(whole[1]), kept = cached->targets(rows[2]);
  const at::Tensor best = at::log_softmax(at::matmul(full.hidden[0], full.head_weight.t()), -1).argmax(-1);
  CHECK(at::equal(kept.sparse.ids[0].narrow(0, 0, 3).select(1, 0), best));
  CHECK(held_out_batches({{7}}, *cached, 16).empty());  // nothing to predict
}

TEST_CASE("a cache that has every row never loads the teacher") {
  const TaskData data = tiny_text();
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  int loads = 0;
  const auto teacher = [&](bool readable) {
    return FrozenTeacher(model->config(), c10::Device(c10::kCPU), [&loads, model, readable]() -> std::shared_ptr<const Transformer> {
      ++loads;
      if (!readable) throw Error("the weights cannot be read");
      return model;
    }, [model] { return fingerprint(*model); });
  };
  TrainOptions options = tiny_options();
  options.batch_size = 2, options.sequence_length = 16;
  const StepBatches batches(data, options, 1);
  const auto all = [&](TeacherSource& source) {
    std::vector<at::Tensor> out;
    source.prepare({});
    for (std::int64_t step = 0; step < batches.steps_per_epoch(); ++step)
      for (const TokenBatch& batch : batches.micro_batches(step)) out.push_back(source.targets(batch).sparse.log_p);
    return at::cat(out);
  };
  at::Tensor first;
  {
    const FrozenTeacher there = teacher(true);
    const auto source = sparse_teacher(there, data, 16, {6, 4}, folder.path());
    CHECK(loads == 0);
    first = all(*source);
    CHECK(loads == 1);
    CHECK(there.loaded());
    there.release();
    CHECK_FALSE(there.loaded());
  }
  const auto again = sparse_teacher(teacher(false), data, 16, {6, 4}, folder.path());
  CHECK(at::equal(all(*again), first));
  CHECK(loads == 1);
  const auto other = sparse_teacher(teacher(false), data, 16, {7, 4}, folder.path());  // another cache: empty
  CHECK(contains_all(error_text([&] { all(*other); }), {"cannot be read"}));
}

TEST_CASE("draws of the cache are unbiased: over many rows their shares are the teacher's probabilities") {
  // One text in every row, so that all rows have one distribution at each position.
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.hash = "repeated";
  data.train_documents = {std::vector<std::int64_t>(4 * 400, 9)};
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  const auto cached = sparse_teacher(model, data, 4, {3, 2}, folder.path());
  cached->prepare({});
  TrainOptions options = tiny_options();
  options.batch_size = 400;
  options.sequence_length = 4;
  const TeacherTargets targets = cached->targets(StepBatches(data, options, 1).micro_batches(0).at(0));
  const at::NoGradGuard no_grad;
  const auto live = live_teacher(model);
  live->prepare({});
  const TeacherTargets full = live->targets(StepBatches(data, options, 1).micro_batches(0).at(0));
  at::Tensor p = at::softmax(at::matmul(full.hidden[0][2], full.head_weight.t()), -1);
  p.index_fill_(0, targets.sparse.ids[0][2], 0);
  p /= p.sum();
  const at::Tensor draws = targets.sparse.draws.select(1, 2).flatten();  // 800 draws at position 2
  const at::Tensor share = at::bincount(draws, {}, 50).to(at::kFloat) / 800;
  const at::Tensor deviations = (share - p).abs() / (p * (1 - p) / 800).sqrt().clamp_min(1e-3);
  CHECK(deviations.max().item<double>() < 4.5);  // standard errors, the largest of 47
}

TEST_CASE("a cache grows, is resumed, and is read while it grows") {
  const TaskData data = tiny_text(6, 400);
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  TrainOptions options = tiny_options();
  options.batch_size = 2;
  options.sequence_length = 16;
  const StepBatches batches(data, options, 1);
  const auto batch = [&](std::int64_t step) { return batches.micro_batches(step).at(0); };
  auto first = sparse_teacher(model, data, 16, {6, 2}, folder.path());
  first->prepare({});
  const TeacherTargets a = first->targets(batch(0));
  CHECK(parts_of(folder.path()).empty());  // not yet enough for a part
  first.reset();
  REQUIRE(parts_of(folder.path()).size() == 1);
  const std::string bytes = read_text(parts_of(folder.path())[0]);

  auto reader = sparse_teacher(model, data, 16, {6, 2}, folder.path());
  reader->prepare({});
  CHECK(at::equal(reader->targets(batch(0)).sparse.log_p, a.sparse.log_p));
  {
    const auto writer = sparse_teacher(model, data, 16, {6, 2}, folder.path());
    writer->prepare({});
    writer->targets(batch(1));
  }
  CHECK(parts_of(folder.path()).size() == 2);
  reader->targets(batch(1));  // there since: read, not computed
  reader.reset();
  CHECK(parts_of(folder.path()).size() == 2);

  // Other options, data or teacher: another folder. The same again: the same bytes.
  sparse_teacher(model, data, 16, {6, 4}, folder.path())->prepare({});
  TaskData other = data;
  other.hash = "other";
  CHECK(sparse_teacher(model, other, 16, {6, 2}, folder.path())->fingerprint() != sparse_teacher(model, data, 16, {6, 2}, folder.path())->fingerprint());
  CHECK(sparse_teacher(cache_decoder(6), data, 16, {6, 2}, folder.path())->fingerprint() != sparse_teacher(model, data, 16, {6, 2}, folder.path())->fingerprint());
  const TemporaryFolder fresh;
  auto repeated = sparse_teacher(model, data, 16, {6, 2}, fresh.path());
  repeated->prepare({});
  repeated->targets(batch(0));
  repeated.reset();
  CHECK(read_text(parts_of(fresh.path()).at(0)) == bytes);
}

TEST_CASE("the text cache refuses what does not belong to it") {
  const TaskData data = tiny_text(6, 400);
  const TemporaryFolder folder;
  const auto model = cache_decoder();
  TrainOptions options = tiny_options();
  options.batch_size = 2;
  options.sequence_length = 16;
  const TokenBatch batch = StepBatches(data, options, 1).micro_batches(0).at(0);
  const auto open = [&](const TaskData& set) { return sparse_teacher(model, set, 16, {6, 2}, folder.path()); };
  {
    const auto cache = open(data);
    CHECK(contains_all(error_text([&] { cache->prepare({"layer.0.output"}); }), {"layer.0.output", "cache"}));
    cache->prepare({});
    cache->targets(batch);
    TokenBatch longer = batch;
    longer.columns = 8;
    CHECK(contains_all(error_text([&] { cache->targets(longer); }), {"rows of 16 tokens", "8"}));
  }
  const auto part = parts_of(folder.path()).at(0);
  {
    const auto cache = open(data);
    cache->prepare({});
    TokenBatch changed = batch;
    changed.ids[3] += 1;
    CHECK(contains_all(error_text([&] { cache->targets(changed); }), {"another text", "part-"}));
  }
  // A part of another cache, copied in.
  TaskData other = data;
  other.hash = "other";
  {
    const auto cache = open(other);
    cache->prepare({});
    cache->targets(batch);
  }
  std::filesystem::path foreign;
  for (const auto& path : parts_of(folder.path()))
    if (path != part) foreign = path;
  const auto copied = part.parent_path() / "part-copied.h5";
  std::filesystem::copy_file(foreign, copied);
  CHECK(contains_all(error_text([&] { open(data)->prepare({}); }), {"part-copied.h5", "another teacher's cache"}));
  std::filesystem::remove(copied);
  // Cut short.
  const std::string bytes = read_text(part);
  for (const std::size_t size : {bytes.size() - 1, bytes.size() / 2, std::size_t{100}, std::size_t{0}}) {
    std::ofstream(part, std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<std::streamsize>(size));
    INFO(size << " of " << bytes.size() << " bytes");
    CHECK(contains_all(error_text([&] {
                         const auto cache = open(data);
                         cache->prepare({});
                         cache->targets(batch);
                       }),
                       {"part-"}));
  }
}
