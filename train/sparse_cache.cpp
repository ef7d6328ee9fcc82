// A language model's outputs on packed text in short, kept on disk as they are computed.
//
// Folder `teacher-<key>`: parts of some ten thousand tokens, each a whole HDF5 file that is renamed into place, so that a kill leaves
// no half of one and a reader may come at any time. Data sets of a part: "rows" [R] i64, numbers of rows of packed text; "texts" [R]
// u64, a hash of their tokens and document boundaries; "offsets" [R+1] i64 into "bytes" u8, one zstd frame a row (sparse_codec.h). The
// attribute "identity" is JSON: what the key was made of. A part is named after its rows, so that equal work gives equal files.
// `wanted.h5`, where rows come from elsewhere: "rows" and "texts" of those that are missing, "ids" and "documents" [R T] i64 of their tokens,
// and the same attribute. scripts/capture_teacher.py reads it and writes parts.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_set>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "formats/hdf5_file.h"
#include "train/chunked_loss.h"
#include "train/dev_score.h"
#include "train/precision.h"
#include "train/sparse_codec.h"
#include "train/step_batches.h"
#include "train/teacher.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

constexpr std::int64_t sparse_part_tokens = 32768;
constexpr std::int64_t sparse_chunk_elements = std::int64_t{1} << 23;  // logits at a time: 32 MiB

// FNV-1a over tokens and document numbers of a row.
std::uint64_t sparse_text_hash(const TokenBatch& batch, std::int64_t row) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  const auto add = [&](const std::vector<std::int64_t>& values) {
    for (std::int64_t t = 0; t < batch.columns && !values.empty(); ++t) hash = (hash ^ static_cast<std::uint64_t>(values[static_cast<std::size_t>(row * batch.columns + t)])) * 0x100000001b3ull;
  };
  add(batch.ids);
  add(batch.documents);
  return hash;
}

TokenBatch sparse_single_row(const TokenBatch& batch, std::int64_t row) {
  const auto part = [&](const std::vector<std::int64_t>& values, std::int64_t width) {
    if (values.empty()) return values;
    return std::vector<std::int64_t>(values.begin() + row * width, values.begin() + (row + 1) * width);
  };
  TokenBatch out;
  out.ids = part(batch.ids, batch.columns), out.lengths = part(batch.lengths, 1), out.examples = part(batch.examples, 1);
  out.documents = part(batch.documents, batch.columns), out.positions = part(batch.positions, batch.columns);
  out.rows = 1, out.columns = batch.columns;
  return out;
}

template <class T>
void sparse_write(Hdf5File& file, const char* name, DType dtype, const std::vector<T>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  file.write(name, make_tensor(name, dtype, {static_cast<std::int64_t>(values.size())}, std::move(bytes)));
}

template <class T>
std::vector<T> sparse_values(const Hdf5File& file, const char* name, DType dtype, const std::string& place) {
  const TensorData data = file.read(name);
  if (data.dtype != dtype || data.shape.size() != 1) throw Error(str("\"", name, "\" of the teacher's cache has another type or shape")).at(place).hint("delete the file: its rows will be computed again");
  std::vector<T> out(data.bytes.size() / sizeof(T));
  std::memcpy(out.data(), data.bytes.data(), data.bytes.size());
  return out;
}

class SparseTeacher final : public TeacherSource {
 public:
  SparseTeacher(FrozenTeacher teacher, const TaskData& data, std::int64_t sequence_length, const SparseCacheOptions& options, fs::path folder)
      : teacher_(std::move(teacher)), config_(teacher_.config()) {
    const std::int64_t rows = config_.vocab, vocabulary = options.columns > 0 ? std::min(rows, options.columns) : rows, top = std::min(options.top, vocabulary);
    if (options.top < 1 || options.tail < 0 || options.tail % 2 != 0) throw std::logic_error("sparse_teacher: top must be positive, tail even");
    layout_ = {sequence_length, top, top == vocabulary ? 0 : options.tail, vocabulary};
    identity_ = {{"format", "kompakt teacher cache 1"}, {"teacher", teacher_.fingerprint()}, {"data", data.hash}, {"tokenizer", data.tokenizer ? data.tokenizer->fingerprint() : std::string()},
                 {"sequence_length", sequence_length}, {"top", layout_.top}, {"tail", layout_.draws}, {"vocabulary", vocabulary}};
    fingerprint_ = sha256(identity_.dump());
    folder_ = folder / ("teacher-" + fingerprint_.substr(0, 16));
    elsewhere_ = options.fill == "elsewhere", data_ = &data;
  }
  ~SparseTeacher() override {
    try {
      flush();
    } catch (const std::exception& error) {
      log_warning(str("the teacher's cache: ", error.what()));
    }
  }

  void prepare(const std::set<std::string>& taps) override {
    if (!taps.empty()) throw Error("the teacher's cache holds probabilities of tokens, not values of its layers").given(*taps.begin()).hint("remove the objectives on layers, or the cache");
    make_folder(folder_);
    scan();
    log_info(str("teacher cache: ", places_.size(), " rows of ", layout_.tokens, " tokens are there"));
    if (elsewhere_) ask_elsewhere();
  }

  TeacherTargets targets(const TokenBatch& batch) override {
    if (batch.columns != layout_.tokens) throw Error(str("the teacher's cache is for rows of ", layout_.tokens, " tokens")).at(folder_.string()).given(str(batch.columns));
    const auto rows = static_cast<std::size_t>(batch.rows);
    std::vector<SparseRow> found(rows);
    std::vector<std::size_t> missing;
    for (std::size_t r = 0; r < rows; ++r)
      if (!read(batch, static_cast<std::int64_t>(r), found[r])) missing.push_back(r);
    if (!missing.empty()) scan();  // another process may have written them since
    for (const std::size_t r : missing) {
      const auto row = static_cast<std::int64_t>(r);
      if (!read(batch, row, found[r])) found[r] = compute(batch, row);
    }
    return collect(found);
  }

  bool takes(std::int64_t columns) const override { return columns == layout_.tokens; }
  const ModelConfig& config() const override { return config_; }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  struct Place {
    std::size_t part;
    std::int64_t begin, end;
    std::uint64_t text;
  };
  struct Pending {
    std::vector<std::byte> bytes;
    std::uint64_t text;
  };

  std::string described(std::int64_t row, const std::string& where) const { return str(where, ": row ", row); }

  void check_text(std::uint64_t known, const TokenBatch& batch, std::int64_t r, const std::string& where) const {
    if (known != sparse_text_hash(batch, r))
      throw Error("the row of the teacher's cache is of another text").at(described(batch.examples[static_cast<std::size_t>(r)], where)).hint("the cache belongs to other data: delete its folder, or name another store");
  }

  bool read(const TokenBatch& batch, std::int64_t r, SparseRow& out) const {
    const std::int64_t number = batch.examples[static_cast<std::size_t>(r)];
    if (const auto held = pending_.find(number); held != pending_.end()) {
      check_text(held->second.text, batch, r, folder_.string());
      out = decode_sparse_row(held->second.bytes, layout_, described(number, folder_.string()));
      return true;
    }
    const auto found = places_.find(number);
    if (found == places_.end()) return false;
    const fs::path& path = parts_[found->second.part];
    check_text(found->second.text, batch, r, path.string());
    const Hdf5File file(path, Hdf5File::Mode::read);
    const TensorData frame = file.read_rows("bytes", found->second.begin, found->second.end - found->second.begin);
    out = decode_sparse_row(frame.bytes, layout_, described(number, path.string()));
    return true;
  }

  // Adds parts that were not there at the last look.
  void scan() {
    std::vector<fs::path> files;
    for (const auto& entry : fs::directory_iterator(folder_)) {
      const std::string name = entry.path().filename().string();
      if (starts_with(name, "part-") && entry.path().extension() == ".h5" && !names_.count(name)) files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());
    for (const fs::path& path : files) {
      const std::string place = path.string();
      const Hdf5File file(path, Hdf5File::Mode::read);
      const Json identity = parse_json(file.attribute("identity"), place);
      if (identity != identity_) throw Error("the file belongs to another teacher's cache").at(place).given(identity.dump()).allowed(identity_.dump()).hint("it was copied here from elsewhere: delete it");
      const auto rows = sparse_values<std::int64_t>(file, "rows", DType::i64, place);
      const auto texts = sparse_values<std::uint64_t>(file, "texts", DType::u64, place);
      const auto offsets = sparse_values<std::int64_t>(file, "offsets", DType::i64, place);
      bool good = texts.size() == rows.size() && offsets.size() == rows.size() + 1 && offsets.front() == 0 && offsets.back() == file.rows("bytes") && std::is_sorted(offsets.begin(), offsets.end());
      if (!good) throw Error("the offsets of the teacher's cache do not fit its bytes").at(place).hint("delete the file: its rows will be computed again");
      parts_.push_back(path);
      names_.insert(path.filename().string());
      for (std::size_t i = 0; i < rows.size(); ++i) places_.try_emplace(rows[i], Place{parts_.size() - 1, offsets[i], offsets[i + 1], texts[i]});
    }
  }

  // Writes down what is missing, of the training text and of held-out windows, and ends the run.
  void ask_elsewhere() {
    std::vector<std::int64_t> rows, ids, documents;
    std::vector<std::uint64_t> texts;
    std::size_t all = 0;
    const auto want = [&](const TokenBatch& batch) {
      ++all;
      if (places_.count(batch.examples[0])) return;
      rows.push_back(batch.examples[0]), texts.push_back(sparse_text_hash(batch, 0));
      ids.insert(ids.end(), batch.ids.begin(), batch.ids.end());
      if (batch.documents.empty()) documents.insert(documents.end(), batch.ids.size(), 0);
      else documents.insert(documents.end(), batch.documents.begin(), batch.documents.end());
    };
    TrainOptions single;
    single.batch_size = 1, single.sequence_length = layout_.tokens;
    const StepBatches batches(*data_, single, 0);
    for (std::int64_t step = 0; step < batches.steps_per_epoch(); ++step)
      for (const TokenBatch& batch : batches.micro_batches(step)) want(batch);
    for (const TokenBatch& batch : held_out_batches(data_->heldout, *this, layout_.tokens)) want(batch);
    if (rows.empty()) return;
    const fs::path path = folder_ / "wanted.h5";
    Hdf5File file(path, Hdf5File::Mode::create);
    file.set_attribute("identity", identity_.dump());
    sparse_write(file, "rows", DType::i64, rows);
    sparse_write(file, "texts", DType::u64, texts);
    sparse_write(file, "ids", DType::i64, ids);
    sparse_write(file, "documents", DType::i64, documents);
    file.close();
    throw Error(str("the recipe says that the teacher's outputs come from elsewhere, and ", rows.size(), " of ", all, " rows are not there")).at(path.string())
        .hint(str("python scripts/capture_teacher.py ", folder_.string(), " --model TEACHER, on a machine of your choice; bring the part-*.h5 back into this folder and run again"));
  }

  // One row alone, so that its values do not depend on which others are missing.
  SparseRow compute(const TokenBatch& batch, std::int64_t r) {
    if (elsewhere_) throw Error("the row is not in the teacher's cache, and the recipe says that rows come from elsewhere").at(described(batch.examples[static_cast<std::size_t>(r)], folder_.string())).hint("run the recipe anew: it writes down what is missing");
    const at::NoGradGuard no_grad;
    const NoAutocast float32;
    const std::int64_t number = batch.examples[static_cast<std::size_t>(r)];
    const std::shared_ptr<const Transformer> model = teacher_.model();
    at::Tensor hidden = model->hidden(to_input(sparse_single_row(batch, r), teacher_.device()));
    if (model->lm_head.input_transform) hidden = model->lm_head.input_transform(hidden);
    const HeadWeights head = head_weights(*model);
    const at::Tensor weight = head.weight.narrow(0, 0, layout_.vocabulary), bias = head.bias.defined() ? head.bias.narrow(0, 0, layout_.vocabulary) : at::Tensor();
    const CounterRandom random(0, "teacher-cache");
    SparseRow row;
    const std::int64_t chunk = std::max<std::int64_t>(1, sparse_chunk_elements / layout_.vocabulary);
    for (std::int64_t begin = 0; begin < layout_.tokens; begin += chunk) {
      const std::int64_t size = std::min(chunk, layout_.tokens - begin);
      const at::Tensor logits = at::linear(hidden[0].narrow(0, begin, size), weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
      append(row, at::log_softmax(logits.to(at::kFloat), -1), random, number * layout_.tokens + begin);
    }
    Pending entry{encode_sparse_row(row, layout_), sparse_text_hash(batch, r)};
    SparseRow out = decode_sparse_row(entry.bytes, layout_, described(number, folder_.string()));  // what a later run will read
    pending_.emplace(number, std::move(entry));
    if (static_cast<std::int64_t>(pending_.size()) * layout_.tokens >= sparse_part_tokens) flush();
    return out;
  }

  // log_p [c, V] of positions from `first` of all text.
  void append(SparseRow& row, const at::Tensor& log_p, const CounterRandom& random, std::int64_t first) const {
    const std::int64_t count = log_p.size(0), draws = layout_.draws, half = draws / 2;
    const auto [best, ids] = log_p.topk(layout_.top, -1);
    if (!best.isfinite().all().item<bool>()) throw Error("the teacher's logits are not finite").at(str("row ", first / layout_.tokens)).hint("check the teacher: a NaN in its weights or a text it cannot take");
    const at::Tensor rest = log_p.exp().scatter_(1, ids, 0), running = rest.cumsum(1, at::kDouble), total = running.narrow(1, layout_.vocabulary - 1, 1);
    const at::Tensor log_rest = total.log().to(at::kFloat).squeeze(1).clamp_min(-100).to(at::kCPU).contiguous();
    const auto take = [](auto& out, const at::Tensor& values) {
      using T = typename std::remove_reference_t<decltype(out)>::value_type;
      const at::Tensor flat = values.to(at::kCPU).contiguous();
      out.insert(out.end(), flat.const_data_ptr<T>(), flat.const_data_ptr<T>() + flat.numel());
    };
    take(row.ids, ids);
    take(row.log_p, best);
    take(row.log_rest, log_rest);
    if (draws == 0) return;
    // Two independent combs of equal distance over the probabilities: unbiased, and less noise than independent draws.
    at::Tensor points = at::empty({count, draws}, at::kDouble);
    double* to = points.mutable_data_ptr<double>();
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t h = 0; h < 2; ++h) {
        const double start = random.uniform(static_cast<std::uint64_t>(2 * (first + t) + h));
        for (std::int64_t i = 0; i < half; ++i) *to++ = (static_cast<double>(i) + start) / static_cast<double>(half);
      }
    }
    const at::Tensor drawn = at::searchsorted(running, points.to(running.device()) * total * (1 - 1e-12), false, /*right=*/true).clamp_max(layout_.vocabulary - 1);
    take(row.draws, drawn);
    take(row.draw_log_p, (log_p.gather(1, drawn) - log_rest.to(log_p.device()).unsqueeze(1)).clamp(-100, 0));
  }

  TeacherTargets collect(const std::vector<SparseRow>& rows) const {
    const auto count = static_cast<std::int64_t>(rows.size());
    const auto stack = [&](auto member, at::ScalarType type, std::vector<std::int64_t> shape) {
      shape.insert(shape.begin(), {count, layout_.tokens});
      at::Tensor out = at::empty(shape, type);
      auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
      for (const SparseRow& row : rows) {
        const auto& values = row.*member;
        std::memcpy(to, values.data(), values.size() * sizeof(values[0]));
        to += values.size() * sizeof(values[0]);
      }
      return out.to(teacher_.device());
    };
    TeacherTargets out;
    out.sparse.ids = stack(&SparseRow::ids, at::kLong, {layout_.top});
    out.sparse.log_p = stack(&SparseRow::log_p, at::kFloat, {layout_.top});
    out.sparse.log_rest = stack(&SparseRow::log_rest, at::kFloat, {});
    out.sparse.draws = stack(&SparseRow::draws, at::kLong, {layout_.draws});
    out.sparse.draw_log_p = stack(&SparseRow::draw_log_p, at::kFloat, {layout_.draws});
    out.sparse.vocabulary = layout_.vocabulary;
    return out;
  }

  void flush() {
    if (pending_.empty()) return;
    std::vector<std::int64_t> rows, offsets{0};
    std::vector<std::uint64_t> texts;
    std::vector<std::byte> bytes;
    for (const auto& [number, entry] : pending_) {
      rows.push_back(number);
      texts.push_back(entry.text);
      bytes.insert(bytes.end(), entry.bytes.begin(), entry.bytes.end());
      offsets.push_back(static_cast<std::int64_t>(bytes.size()));
    }
    Sha256 name;
    name.update(std::as_bytes(std::span(rows)));
    const fs::path path = folder_ / ("part-" + name.hex().substr(0, 16) + ".h5");
    Hdf5File file(path, Hdf5File::Mode::create);
    file.set_attribute("identity", identity_.dump());
    sparse_write(file, "rows", DType::i64, rows);
    sparse_write(file, "texts", DType::u64, texts);
    sparse_write(file, "offsets", DType::i64, offsets);
    sparse_write(file, "bytes", DType::u8, bytes);
    file.close();
    pending_.clear();
    scan();
  }

  FrozenTeacher teacher_;
  ModelConfig config_;
  SparseLayout layout_;
  Json identity_;
  std::string fingerprint_;
  fs::path folder_;
  bool elsewhere_ = false;
  const TaskData* data_ = nullptr;
  std::vector<fs::path> parts_;
  std::unordered_set<std::string> names_;   // of parts_
  std::map<std::int64_t, Place> places_;    // row -> where its bytes lie
  std::map<std::int64_t, Pending> pending_;  // computed, not yet in a file
};

}  // namespace

std::unique_ptr<TeacherSource> sparse_teacher(FrozenTeacher teacher, const TaskData& data, std::int64_t sequence_length, const SparseCacheOptions& options, fs::path folder) {
  return std::make_unique<SparseTeacher>(std::move(teacher), data, sequence_length, options, std::move(folder));
}

}  // namespace kompakt
