// The stage `finetune`: labels as objective, and a classifier head that starts from class centroids.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <map>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "train/dev_score.h"
#include "train/loop.h"
#include "train/state.h"
#include "train/step_batches.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

constexpr std::int64_t centroid_batch_size = 64;
constexpr double centroid_scale = 8;

// A head of centroids costs one pass over the data: a resumed stage takes it from its work folder.
void finetune_centroids(Transformer& model, std::int64_t per_class, StageContext& context) {
  const std::filesystem::path file = context.work / "centroid_head.safetensors";
  const NamedTensors head = {{"weight", model.classifier.weight}, {"bias", model.classifier.bias}};
  if (context.resume && std::filesystem::exists(file)) {
    load_state(file, head);
    return;
  }
  set_centroid_head(model, context.data->train, padding_id(*context.data), per_class);
  std::filesystem::create_directories(context.work);
  save_state(file, {{"weight", model.classifier.weight}, {"bias", model.classifier.bias}}, Json::object());
}

// Rows of labels that the model knew come back; those of new ones, which start from class centroids or at zero, get their mean length, so that
// no side drowns the other.
void finetune_keep_rows(Transformer& model, const at::Tensor& weight, const at::Tensor& bias) {
  const at::NoGradGuard no_grad;
  const std::int64_t known = weight.size(0), all = model.classifier.weight.size(0);
  const at::Tensor fresh = model.classifier.weight.narrow(0, known, all - known);
  const double scale = at::linalg_vector_norm(weight.to(at::kDouble), 2, at::IntArrayRef{1}).mean().item<double>() / centroid_scale;
  fresh.mul_(scale);
  model.classifier.weight.narrow(0, 0, known).copy_(weight);
  if (!model.classifier.bias.defined()) return;
  model.classifier.bias.narrow(0, known, all - known).mul_(scale);
  model.classifier.bias.narrow(0, 0, known).copy_(bias);
}

TokenizedExamples finetune_first(const TokenizedExamples& all, std::int64_t per_class) {
  if (per_class == 0) return all;
  TokenizedExamples out;
  std::map<std::int64_t, std::int64_t> taken;
  for (std::size_t i = 0; i < all.ids.size(); ++i) {
    if (taken[all.labels[i]]++ >= per_class) continue;
    out.ids.push_back(all.ids[i]);
    out.labels.push_back(all.labels[i]);
  }
  return out;
}

}  // namespace

void fields(FieldVisitor& visitor, FinetuneOptions& options) {
  fields(visitor, options.train);
  visitor.choice("pooling", options.pooling, "how token states become one vector", {"mean", "cls", "pooler"});
  visitor.flag("centroid_head", options.centroid_head, "start a new classifier from the class means of the pooled vectors");
  visitor.integer("centroid_examples", options.centroid_examples, "examples of each class that make its mean; 0 = all", {.min = 0});
}

void set_centroid_head(Transformer& model, const TokenizedExamples& all, std::int64_t pad, std::int64_t per_class) {
  at::NoGradGuard no_grad;
  const TokenizedExamples examples = finetune_first(all, per_class);
  if (examples.ids.empty()) throw Error("the training set is empty").at("data.train").allowed("at least one example");
  const std::int64_t count = static_cast<std::int64_t>(examples.ids.size()), classes = model.classifier.out_features(), width = model.classifier.in_features();
  // In double and in the order of the examples: the same head on any number of threads.
  at::Tensor units = at::empty({count, width}, at::kDouble);
  at::Tensor lengths = at::empty({count}, at::kDouble);
  Progress progress("class centroids", count, "text");
  std::int64_t done = 0;
  for (const TokenBatch& batch : ClassificationBatches(examples, centroid_batch_size, 0, 0, pad).evaluation(centroid_batch_size)) {
    check_interrupted();
    const ModelInput input = to_input(batch, model.device());
    const at::Tensor vectors = model.pooled(model.hidden(input), input).to(at::kCPU, at::kDouble);
    const at::Tensor norms = at::linalg_vector_norm(vectors, 2, at::IntArrayRef{1}).clamp_min(1e-12);
    const at::Tensor places = at::tensor(at::ArrayRef<std::int64_t>(batch.examples), at::kLong);
    units.index_copy_(0, places, vectors / norms.unsqueeze(1));
    lengths.index_copy_(0, places, norms);
    progress.update(done += batch.rows);
  }
  progress.finish();
  const at::Tensor labels = at::tensor(at::ArrayRef<std::int64_t>(examples.labels), at::kLong);
  const at::Tensor center = units.mean(0);
  at::Tensor sums = at::zeros({classes, width}, at::kDouble).index_add_(0, labels, units - center);
  const at::Tensor norms = at::linalg_vector_norm(sums, 2, at::IntArrayRef{1}).unsqueeze(1);
  // A class without an example keeps a zero row, whose logit is that of an indifferent text.
  const at::Tensor rows = at::where(norms > 1e-12, sums / norms.clamp_min(1e-12), at::zeros_like(sums)) * centroid_scale;
  // The pooled vector x that the head will see has its own length; at the mean length, W x + b = length * W (x/length - center).
  const at::Tensor bias = -rows.matmul(center) * lengths.mean();
  model.classifier.weight.copy_(rows);
  if (model.classifier.bias.defined()) model.classifier.bias.copy_(bias);
}

TrainResult finetune(Transformer& model, const FinetuneOptions& options, StageContext& context) {
  if (!context.data) throw std::logic_error("finetune: no data");
  const TaskData& data = *context.data;
  if (data.kind == TaskData::Kind::classification) {
    const bool fits = model.classifier.weight.defined() && model.config().labels == data.labels;
    if (!fits) {
      const std::vector<std::string> known = model.classifier.weight.defined() ? model.config().labels : std::vector<std::string>();
      const bool extends = !known.empty() && known.size() < data.labels.size() && std::equal(known.begin(), known.end(), data.labels.begin());
      const at::Tensor old_weight = model.classifier.weight, old_bias = model.classifier.bias;
      if (extends) log_info(str(context.title, ": the classifier of ", known.size(), " labels gets rows for ", data.labels.size() - known.size(), " more"));
      else if (!known.empty()) log_info(str(context.title, ": the classifier of ", known.size(), " labels is replaced by one of ", data.labels.size()));
      if (model.device() != context.device) model.to(context.device);
      model.add_classifier(data.labels, extends ? model.config().pooling : options.pooling);
      if (options.centroid_head) finetune_centroids(model, options.centroid_examples, context);
      if (extends) finetune_keep_rows(model, old_weight, old_bias);
      if (context.details && extends) (*context.details)["new_labels"] = std::vector<std::string>(data.labels.begin() + static_cast<std::ptrdiff_t>(known.size()), data.labels.end());
      if (context.details) (*context.details)["head"] = options.centroid_head ? "centroids" : "zero";
      if (options.centroid_head && context.details && !data.dev.ids.empty()) {
        (*context.details)["centroid_dev_accuracy"] = accuracy(model, data.dev, padding_id(data));
      }
    }
  }
  return train(model, options.train, {label_cross_entropy(options.train.label_smoothing)}, {}, context);
}

}  // namespace kompakt
