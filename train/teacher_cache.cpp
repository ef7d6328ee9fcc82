// A frozen classifier's outputs on the training set, computed once into a safetensors file and memory-mapped.
//
// File: "logits" [N,C] float32; "lengths" [N] int32; "first_row" [N] int64; "tokens" [rows, width] bfloat16 where a row holds all
// taps of one token side by side and the rows of an example follow each other; "examples" [N, width'] bfloat16 for taps without
// a token dimension ("pooled"). Rows are written in the order in which they are computed, so no more than one batch is in memory.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "formats/safetensors.h"
#include "formats/safetensors_header.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

constexpr std::int64_t cache_batch_size = 64;

// Where a tap lies in a row, and how its shape comes back.
struct CachedTap {
  std::string name;
  std::int64_t offset = 0, width = 0;
  std::int64_t heads = 0;     // > 0: [B,H,T,width/H], else [B,T,width]
  bool per_example = false;   // [B,width]
};

std::vector<CachedTap> cache_layout(const TapMap& taps, std::int64_t& token_width, std::int64_t& example_width) {
  std::vector<CachedTap> out;
  for (const std::string& name : taps.wanted()) {
    if (!taps.values().count(name)) throw Error(str("the teacher has no value \"", name, "\"")).at("taps").given(name).hint("layers count from 0; see docs for the names of taps");
    const at::Tensor& value = taps.at(name);
    CachedTap row{name, 0, value.size(-1), 0, value.dim() == 2};
    if (value.dim() == 4) {
      row.heads = value.size(1);
      row.width *= row.heads;
    }
    std::int64_t& width = row.per_example ? example_width : token_width;
    row.offset = width;
    width += row.width;
    out.push_back(row);
  }
  // Multiples of 4 bfloat16 keep what follows 8-aligned in the file.
  token_width = (token_width + 3) / 4 * 4;
  example_width = (example_width + 3) / 4 * 4;
  return out;
}

// [B,H,T,hd] -> [B,T,H*hd]
at::Tensor cache_rows(const at::Tensor& value, const CachedTap& tap) { return tap.heads ? value.transpose(1, 2).flatten(2) : value; }

Json cache_layout_json(const std::vector<CachedTap>& layout) {
  Json json = Json::array();
  for (const CachedTap& tap : layout) json.push_back({{"name", tap.name}, {"offset", tap.offset}, {"width", tap.width}, {"heads", tap.heads}, {"per_example", tap.per_example}});
  return json;
}

std::vector<CachedTap> cache_layout_from_json(const Json& json, const std::string& place) {
  std::vector<CachedTap> out;
  for (const Json& row : json) {
    out.push_back({json_get<std::string>(row, "name", place), json_get<std::int64_t>(row, "offset", place), json_get<std::int64_t>(row, "width", place),
                   json_get<std::int64_t>(row, "heads", place), json_get<bool>(row, "per_example", place)});
  }
  return out;
}

template <class T>
std::span<const std::byte> cache_bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

float cache_widen(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

class CachedTeacher final : public TeacherSource {
 public:
  CachedTeacher(FrozenTeacher teacher, const TokenizedExamples& examples, std::int64_t pad, std::filesystem::path folder)
      : teacher_(std::move(teacher)), config_(teacher_.config()), examples_(examples), pad_(pad), folder_(std::move(folder)) {
    Sha256 hash;
    hash.update("examples").update(str(examples.ids.size()));
    for (const std::vector<std::int64_t>& ids : examples.ids) hash.update(str("|", ids.size(), "|")).update(std::as_bytes(std::span(ids)));
    fingerprint_ = sha256(teacher_.fingerprint() + hash.hex());
  }

  void prepare(const std::set<std::string>& taps) override {
    std::string key = "teacher cache 1|" + fingerprint_;
    for (const std::string& name : taps) key += "|" + name;
    const std::filesystem::path file = folder_ / ("teacher-" + sha256(key).substr(0, 16) + ".safetensors");
    if (!std::filesystem::exists(file)) {
      make_folder(folder_);
      compute(file, taps);
    }
    open(file);
  }

  TeacherTargets targets(const TokenBatch& batch) override {
    if (!file_) throw std::logic_error("CachedTeacher::targets before prepare");
    const std::int64_t known = static_cast<std::int64_t>(examples_.ids.size());
    TeacherTargets out;
    out.logits = at::empty({batch.rows, classes_}, at::kFloat);
    for (std::int64_t r = 0; r < batch.rows; ++r) {
      const std::int64_t example = batch.examples[r];
      if (example < 0 || example >= known) throw Error(str("example ", example, " is not in the teacher's cache of ", known, " examples")).at(file_path_).hint("teacher and student must see the same training set");
      std::memcpy(out.logits.mutable_data_ptr<float>() + r * classes_, logits_ + example * classes_, static_cast<std::size_t>(classes_) * sizeof(float));
      if (!layout_.empty() && batch.lengths[r] != lengths_[example]) {
        throw Error(str("example ", example, " has ", batch.lengths[r], " tokens for the student and ", lengths_[example], " for the teacher")).at(file_path_)
            .hint("values per token can only be compared when both split a text alike: use an objective on logits alone, or the teacher's tokenizer");
      }
    }
    for (const CachedTap& tap : layout_) out.taps[tap.name] = gather(tap, batch);
    const c10::Device device = device_;
    if (!device.is_cpu()) {
      out.logits = out.logits.to(device);
      for (auto& [name, value] : out.taps) value = value.to(device);
    }
    return out;
  }

  const ModelConfig& config() const override { return config_; }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  at::Tensor gather(const CachedTap& tap, const TokenBatch& batch) const {
    if (tap.per_example) {
      at::Tensor out = at::empty({batch.rows, tap.width}, at::kFloat);
      float* to = out.mutable_data_ptr<float>();
      for (std::int64_t r = 0; r < batch.rows; ++r) {
        const std::uint16_t* from = example_rows_ + batch.examples[r] * example_width_ + tap.offset;
        for (std::int64_t c = 0; c < tap.width; ++c) *to++ = cache_widen(from[c]);
      }
      return out;
    }
    at::Tensor out = at::empty({batch.rows, batch.columns, tap.width}, at::kFloat);
    float* to = out.mutable_data_ptr<float>();
    for (std::int64_t r = 0; r < batch.rows; ++r) {
      const std::int64_t length = batch.lengths[r];
      const std::uint16_t* from = token_rows_ + first_row_[batch.examples[r]] * token_width_ + tap.offset;
      for (std::int64_t t = 0; t < length; ++t, from += token_width_, to += tap.width) {
        for (std::int64_t c = 0; c < tap.width; ++c) to[c] = cache_widen(from[c]);
      }
      std::fill_n(to, (batch.columns - length) * tap.width, 0.0f);
      to += (batch.columns - length) * tap.width;
    }
    if (tap.heads) return out.view({batch.rows, batch.columns, tap.heads, tap.width / tap.heads}).transpose(1, 2);
    return out;
  }

  void compute(const std::filesystem::path& path, const std::set<std::string>& taps) const {
    at::NoGradGuard no_grad;
    const std::int64_t count = static_cast<std::int64_t>(examples_.ids.size());
    if (count == 0) throw Error("the training set is empty").at("data.train").allowed("at least one example");
    const std::vector<TokenBatch> batches = ClassificationBatches(examples_, cache_batch_size, 0, 0, pad_).evaluation(cache_batch_size);
    std::vector<std::int32_t> lengths(examples_.ids.size());
    std::vector<std::int64_t> first_row(examples_.ids.size());
    std::int64_t rows = 0;
    for (const TokenBatch& batch : batches) {
      for (std::int64_t r = 0; r < batch.rows; ++r) {
        const auto example = static_cast<std::size_t>(batch.examples[r]);
        lengths[example] = static_cast<std::int32_t>(batch.lengths[r]);
        first_row[example] = rows;
        rows += batch.lengths[r];
      }
    }
    AtomicFile file(path);
    std::vector<float> logits;
    std::vector<std::uint16_t> example_rows;
    std::int64_t token_width = 0, example_width = 0, classes = 0, done = 0;
    std::vector<CachedTap> layout;
    const std::shared_ptr<const Transformer> model = teacher_.model();
    Progress progress("teacher cache", count, "text");
    for (const TokenBatch& batch : batches) {
      check_interrupted();
      TapMap sink(taps);
      const at::Tensor scores = model->forward(to_input(batch, teacher_.device()), &sink).to(at::kCPU, at::kFloat).contiguous();
      if (logits.empty()) {
        layout = cache_layout(sink, token_width, example_width);
        classes = scores.size(1);
        logits.resize(static_cast<std::size_t>(count * classes));
        example_rows.resize(static_cast<std::size_t>(count * example_width));
        file.write(header(count, rows, classes, token_width, example_width, layout));
      }
      if (!scores.isfinite().all().item<bool>()) throw Error("the teacher's logits are not finite").at(str("examples from ", batch.examples.front())).hint("check the teacher: a NaN in its weights or a text it cannot take");
      for (std::int64_t r = 0; r < batch.rows; ++r) std::memcpy(logits.data() + batch.examples[r] * classes, scores.const_data_ptr<float>() + r * classes, static_cast<std::size_t>(classes) * sizeof(float));
      write_taps(file, batch, sink, layout, token_width, example_width, example_rows);
      done += batch.rows;
      progress.update(done);
    }
    file.write(cache_bytes(example_rows));
    file.write(cache_bytes(first_row));
    file.write(cache_bytes(logits));
    file.write(cache_bytes(lengths));
    file.commit();
    progress.finish(human_bytes(static_cast<double>(file.written())));
  }

  // Token rows go to the file, example rows to memory.
  static void write_taps(AtomicFile& file, const TokenBatch& batch, const TapMap& sink, const std::vector<CachedTap>& layout, std::int64_t token_width,
                         std::int64_t example_width, std::vector<std::uint16_t>& example_rows) {
    at::Tensor block = token_width ? at::zeros({batch.rows, batch.columns, token_width}, at::kBFloat16) : at::Tensor();
    for (const CachedTap& tap : layout) {
      const at::Tensor value = cache_rows(sink.at(tap.name), tap).to(at::kCPU, at::kBFloat16);
      if (!tap.per_example) {
        block.narrow(2, tap.offset, tap.width).copy_(value);
        continue;
      }
      const at::Tensor flat = value.contiguous();
      for (std::int64_t r = 0; r < batch.rows; ++r) {
        std::memcpy(example_rows.data() + batch.examples[r] * example_width + tap.offset, flat.const_data_ptr<at::BFloat16>() + r * tap.width, static_cast<std::size_t>(tap.width) * 2);
      }
    }
    if (!block.defined()) return;
    const auto* data = reinterpret_cast<const std::byte*>(block.const_data_ptr<at::BFloat16>());
    const std::size_t row = static_cast<std::size_t>(token_width) * 2;
    for (std::int64_t r = 0; r < batch.rows; ++r) {
      file.write(std::span(data + static_cast<std::size_t>(r * batch.columns) * row, static_cast<std::size_t>(batch.lengths[r]) * row));
    }
  }

  // The header of tensors whose bytes come later; only their sizes count here.
  static std::string header(std::int64_t count, std::int64_t rows, std::int64_t classes, std::int64_t token_width, std::int64_t example_width, const std::vector<CachedTap>& layout) {
    std::vector<TensorData> tensors;
    const auto announce = [&](const char* name, DType dtype, std::vector<std::int64_t> shape) {
      TensorData tensor{name, dtype, std::move(shape), {}, {}};
      // A span with a size and no memory: written as text, never read.
      tensor.bytes = std::span<const std::byte>(static_cast<const std::byte*>(nullptr), static_cast<std::size_t>(tensor.elements()) * size_of(dtype));
      tensors.push_back(std::move(tensor));
    };
    if (token_width) announce("tokens", DType::bf16, {rows, token_width});
    if (example_width) announce("examples", DType::bf16, {count, example_width});
    announce("first_row", DType::i64, {count});
    announce("logits", DType::f32, {count, classes});
    announce("lengths", DType::i32, {count});
    const std::string text = write_safetensors_header(tensors, {{"layout", cache_layout_json(layout).dump()}});
    std::string out(8, '\0');
    const std::uint64_t size = text.size();
    for (int i = 0; i < 8; ++i) out[static_cast<std::size_t>(i)] = static_cast<char>((size >> (8 * i)) & 0xff);
    return out + text;
  }

  void open(const std::filesystem::path& path) {
    file_path_ = path.string();
    file_ = std::make_unique<SafetensorsFile>(SafetensorsFile::open(path));
    const auto need = [&](const char* name, DType dtype) -> const TensorData& {
      const TensorData* tensor = file_->find(name);
      if (!tensor || tensor->dtype != dtype) throw Error(str("the teacher cache has no usable tensor \"", name, "\"")).at(file_path_).hint("delete the file: it will be computed again");
      return *tensor;
    };
    const auto layout = file_->metadata().find("layout");
    if (layout == file_->metadata().end()) throw Error("the teacher cache has no layout").at(file_path_).hint("delete the file: it will be computed again");
    layout_ = cache_layout_from_json(parse_json(layout->second, file_path_), file_path_);
    const TensorData& logits = need("logits", DType::f32);
    classes_ = logits.shape.at(1);
    logits_ = reinterpret_cast<const float*>(logits.bytes.data());
    lengths_ = reinterpret_cast<const std::int32_t*>(need("lengths", DType::i32).bytes.data());
    first_row_ = reinterpret_cast<const std::int64_t*>(need("first_row", DType::i64).bytes.data());
    for (const CachedTap& tap : layout_) {
      const TensorData& rows = need(tap.per_example ? "examples" : "tokens", DType::bf16);
      (tap.per_example ? example_rows_ : token_rows_) = reinterpret_cast<const std::uint16_t*>(rows.bytes.data());
      (tap.per_example ? example_width_ : token_width_) = rows.shape.at(1);
    }
    device_ = teacher_.device();
  }

  FrozenTeacher teacher_;
  ModelConfig config_;
  const TokenizedExamples& examples_;
  std::int64_t pad_;
  std::filesystem::path folder_;
  std::string fingerprint_, file_path_;
  c10::Device device_ = c10::Device(c10::kCPU);
  std::unique_ptr<SafetensorsFile> file_;
  std::vector<CachedTap> layout_;
  std::int64_t classes_ = 0, token_width_ = 0, example_width_ = 0;
  const float* logits_ = nullptr;
  const std::int32_t* lengths_ = nullptr;
  const std::int64_t* first_row_ = nullptr;
  const std::uint16_t *token_rows_ = nullptr, *example_rows_ = nullptr;
};

}  // namespace

std::unique_ptr<TeacherSource> cached_teacher(FrozenTeacher teacher, const TokenizedExamples& examples, std::int64_t pad, std::filesystem::path folder) {
  return std::make_unique<CachedTeacher>(std::move(teacher), examples, pad, std::move(folder));
}

}  // namespace kompakt
