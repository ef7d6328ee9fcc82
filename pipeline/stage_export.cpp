// The stage `export`: write, reopen with a separate reader, compare, and only then let the pipeline publish.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/text.h"
#include "data/tokenizer_gguf.h"
#include "evaluate/classify.h"
#include "evaluate/inputs.h"
#include "export/exporters.h"
#include "formats/zstd.h"
#include "pipeline/recipe.h"
#include "pipeline/stage_options.h"
#include "pipeline/stages.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

// Up to `count` texts that no test set holds: dev when there is one, else train.
TokenizedExamples proof_examples(const TaskData& data, std::int64_t count) {
  const TokenizedExamples& from = data.dev.ids.empty() ? data.train : data.dev;
  TokenizedExamples out;
  const std::size_t n = std::min(from.ids.size(), static_cast<std::size_t>(count));
  out.ids.assign(from.ids.begin(), from.ids.begin() + static_cast<std::ptrdiff_t>(n));
  out.labels.assign(from.labels.begin(), from.labels.begin() + static_cast<std::ptrdiff_t>(n));
  return out;
}

double proof_difference_text(const Transformer& trained, const Transformer& reopened, const TaskData& data, std::int64_t count, std::int64_t& checked) {
  const at::NoGradGuard no_grad;
  std::vector<std::vector<std::int64_t>> windows = !data.calibration.empty() ? data.calibration : data.heldout;
  if (windows.empty()) windows = proof_examples(data, count).ids;  // of an encoder without classes
  if (windows.empty()) {  // no text at all: ids spread over the vocabulary
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < 64; ++i) ids.push_back(i * 7919 % trained.config().vocab);
    windows.push_back(ids);
  }
  const auto n = std::min<std::size_t>({windows.size(), static_cast<std::size_t>(count), 4});
  double worst = 0;
  for (std::size_t w = 0; w < n; ++w) {
    windows[w].resize(std::min<std::size_t>(windows[w].size(), 128));
    const ModelInput input = window_input(windows, w, 1, trained.device());
    const double difference = (trained.forward(input) - reopened.forward(input)).abs().max().item<double>();
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    checked += static_cast<std::int64_t>(windows[w].size());
  }
  return worst;
}

// Bytes of all files of a folder when each is compressed by Zstandard, in frames of 64 MiB: what masked weights, which every format
// stores densely, take in a download.
std::int64_t export_compressed_bytes(const fs::path& folder) {
  constexpr std::size_t frame = std::size_t{64} << 20;
  std::int64_t total = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file() || entry.file_size() == 0) continue;
    const MappedFile file(entry.path());
    const std::span<const std::byte> bytes = file.bytes();
    for (std::size_t first = 0; first < bytes.size(); first += frame) total += static_cast<std::int64_t>(zstd_compress(bytes.subspan(first, std::min(frame, bytes.size() - first))).size());
  }
  return total;
}

}  // namespace

void run_export(const Node& node, StageRun& run) {
  ExportOptions options;
  Problems problems;
  read_fields(node, "stage \"export\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("the export cannot run");
  const Transformer& trained = *run.current.model;
  std::map<std::string, GridSpec> plan;
  for (const auto& [name, tensor] : run.current.quantized) plan[name] = tensor.spec;

  Json proofs = Json::object();
  for (const std::string& format : options.formats) {
    const Exporter& exporter = *find_exporter(format);
    for (const std::string& obstacle : exporter.obstacles(trained.config(), plan))
      throw Error(str("the model cannot be written as ", format, ": ", obstacle)).at("stage \"export\"").hint("choose another format, or a grid that this format can hold");
    const fs::path folder = options.formats.size() == 1 ? run.output : run.output / format;
    make_folder(folder);
    ExportRequest request{trained, run.current.quantized, run.recipe.name, {}};
    if (exporter.needs_gguf_tokenizer) request.gguf_tokenizer = gguf_tokenizer_metadata(*run.current.tokenizer, trained.config().vocab);
    exporter.write(request, folder);
    std::unique_ptr<const Tokenizer> tokenizer;
    if (!exporter.needs_gguf_tokenizer) run.current.tokenizer->save_compact(folder);
    tokenizer = load_tokenizer(exporter.needs_gguf_tokenizer ? folder / "model.gguf" : folder);

    const std::unique_ptr<Transformer> reopened = exporter.reopen(folder);
    reopened->to(trained.device());
    double difference = 0;
    std::int64_t checked = 0;
    if (trained.config().is_classifier() && !run.context.data->train.ids.empty()) {
      const TokenizedExamples examples = proof_examples(*run.context.data, options.check_examples);
      const std::int64_t pad = std::max<std::int64_t>(run.current.tokenizer->special().pad, 0);
      difference = max_difference(predict(trained, examples, pad).logits, predict(*reopened, examples, pad).logits);
      checked = static_cast<std::int64_t>(examples.ids.size());
    } else {
      difference = proof_difference_text(trained, *reopened, *run.context.data, options.check_examples, checked);
    }
    // Unused rows of the embedding become tokens of a GGUF file; then the two differ by those.
    const bool padded = exporter.needs_gguf_tokenizer && trained.config().vocab != run.current.tokenizer->vocab_size();
    if (!padded && tokenizer->fingerprint() != run.current.tokenizer->fingerprint()) throw Error(str("the tokenizer of the reopened ", format, " artifact is not the one that was written"), ExitCode::bug).at(folder.string());
    if (!(difference <= options.tolerance))
      throw Error(str("the reopened ", format, " artifact does not compute what the trained model computes"), ExitCode::bug)
          .at("stage \"export\"").given(str("largest logit difference ", shortest(difference))).allowed(str("at most ", shortest(options.tolerance))).hint("nothing was published; please report this");
    log_info(str("  ", format, ": reopened, largest logit difference ", shortest(difference), " over ", checked, trained.config().is_classifier() ? " texts" : " tokens"));
    proofs[format] = Json{{"max_logit_difference", difference}, {"checked", checked}, {"bytes", bytes_on_disk(folder)}};
    if (run.context.masks.empty()) continue;
    proofs[format]["zstd_bytes"] = export_compressed_bytes(folder);
    std::int64_t weights = 0, zeros = 0;
    for (const auto& [name, mask] : run.context.masks) weights += mask.numel(), zeros += mask.numel() - mask.sum().item<std::int64_t>();
    proofs[format]["masked"] = Json{{"matrices", run.context.masks.size()}, {"weights", weights}, {"zeros", zeros}};
    log_info(str("  ", format, ": ", human_bytes(proofs[format]["bytes"].get<double>()), " with zeros stored like any weight, ", human_bytes(proofs[format]["zstd_bytes"].get<double>()), " after zstd"));
  }
  (*run.context.details)["reopened"] = proofs;
  (*run.context.details)["reopened_max_logit_difference"] = proofs.begin().value().at("max_logit_difference");
}

}  // namespace kompakt
