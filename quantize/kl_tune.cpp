// A constraint that makes scales and latents learn, and a monitor that scores checkpoints on held-out text.
#include "quantize/kl_tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/text.h"
#include "quantize/code_price.h"
#include "quantize/latent.h"
#include "quantize/tensors.h"
#include "train/loop.h"
#include "train/precision.h"
#include "train/state.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

constexpr TuneMode kl_modes[] = {
    {"scales", "group scales, norms and biases; the codes stay", false, 0.02, 1, 0.03},
    {"weights", "latent weights too, rounded to the grid in every forward pass", true, 0.01, 0.3, 0.03},
};
constexpr double kl_beyond = 0.4;                           // how far a latent may leave the grid, in codes
constexpr double kl_factor_low = 0.25, kl_factor_high = 4;  // of a starting scale
constexpr std::int64_t kl_micro_tokens = 2048;              // of a micro batch: the graph of a block's activations is what it costs
constexpr std::int64_t kl_score_rows = 128;                 // positions whose logits exist at once while scoring

bool kl_own_scale_rate(const KlTuneOptions& tuning, const TuneMode& mode) { return mode.codes_learn && tuning.scale_learning_rate > 0; }

std::map<std::string, at::Tensor> kl_vectors(Transformer& model) {
  std::map<std::string, at::Tensor> out;
  for (const NamedParameter& parameter : model.parameters())
    if (parameter.value->dim() == 1) out[parameter.name] = parameter.value->detach().clone();
  return out;
}

void kl_set_vectors(Transformer& model, const std::map<std::string, at::Tensor>& vectors) {
  for (const NamedParameter& parameter : model.parameters())
    if (const auto found = vectors.find(parameter.name); found != vectors.end()) *parameter.value = found->second;
}

// Linears of blocks that take part. Rows of the embedding and the head belong to tokens, most of which tuning text never holds: with scales
// of theirs learning too, SmolLM2-135M in 46 MB came out slightly worse.
std::vector<Linear*> kl_linears(Transformer& model, const QuantizationPlan& plan) {
  std::vector<Linear*> out;
  for (Linear* linear : model.linears())
    if (const auto found = plan.tensors.find(linear->name); found != plan.tensors.end() && !found->second.grid->levels && !found->second.grid->kquant) out.push_back(linear);
  return out;
}

// The weight slots of the tuned linears hold latents in units of codes while this is attached.
class LearnedGrid final : public Constraint {
 public:
  LearnedGrid(const QuantizedModel& quantized, const std::map<std::string, at::Tensor>& original, const TuneMode& mode, double margin, double scale_rate)
      : quantized_(quantized), original_(original), mode_(mode), margin_(margin), scale_rate_(scale_rate) {}

  std::string name() const override { return str("learned_grid ", mode_.name, " margin=", shortest(margin_), " scale_rate=", shortest(scale_rate_)); }

  void attach(Transformer& model) override {
    for (Linear* linear : kl_linears(model, quantized_.plan)) {
      if (linear->transform) throw std::logic_error("learned_grid: another constraint holds " + linear->name);
      const Quantized& start = quantized_.tensors.at(linear->name);
      Slot& slot = slots_[linear->name];
      slot.grid = latent_grid(quantized_.plan.tensors.at(linear->name), start);
      // Where the float weights are not known, latents start in the middle of their codes.
      const auto floats = mode_.codes_learn ? original_.find(linear->name) : original_.end();
      slot.values = latent_start(slot.grid, floats != original_.end() ? floats->second : linear->weight, start.codes, mode_.codes_learn ? margin_ : 0);
      linear->weight = slot.values.codes;
      if (slot.coded()) start_bytes_ += stored_bytes(slot.grid.spec, start);
      linear->transform = [&slot](const at::Tensor& latent) {
        if (slot.settled.defined() && !at::GradMode::is_enabled()) return decode(slot.grid.spec, quantized_slot(slot));
        return latent_weight(slot.grid, {latent, slot.values.scale_factor, slot.values.offset_shift});
      };
    }
  }

  void detach(Transformer& model) override {
    for (auto& [name, slot] : slots_) {
      Linear& linear = *model.find_linear(name);
      linear.transform = {};
      linear.weight = decode(slot.grid.spec, latent_codes(slot.grid, slot.values));
    }
  }

  void after_step(Transformer&) override {
    at::NoGradGuard no_grad;
    for (auto& [name, slot] : slots_) {
      const Grid& grid = *slot.grid.spec.grid;
      if (mode_.codes_learn) slot.values.codes.clamp_(grid.code_min - kl_beyond, grid.code_max + kl_beyond);
      slot.values.scale_factor.clamp_(kl_factor_low, kl_factor_high);
    }
  }

  std::vector<std::pair<std::string, at::Tensor>> parameters() override {
    std::vector<std::pair<std::string, at::Tensor>> out;
    for (auto& [name, slot] : slots_) {
      out.emplace_back("factor." + name, slot.values.scale_factor);
      if (slot.values.offset_shift.defined()) out.emplace_back("shift." + name, slot.values.offset_shift);
    }
    return out;
  }
  double parameter_rate() const override { return scale_rate_; }

  // Between settle and loosen the model computes, without gradients, with codes that take no more bytes in a file than the start's: as
  // latents wander, codes whose lengths are their own grow longer. Returns what was paid for it; null where no such code learns.
  Json settle() {
    if (!mode_.codes_learn || start_bytes_ == 0) return Json();
    std::vector<PricedMatrix> matrices;
    for (auto& [name, slot] : slots_)
      if (slot.coded()) matrices.push_back({slot.grid.spec, slot.values.codes, slot.grid.scales});
    PricedCodes priced = codes_within(matrices, start_bytes_);
    fits_ = priced.bytes <= start_bytes_;
    std::size_t next = 0;
    for (auto& [name, slot] : slots_)
      if (slot.coded()) slot.settled = std::move(priced.codes[next++]);
    return Json{{"bytes", priced.bytes}, {"untuned_bytes", start_bytes_}, {"price", priced.price}};
  }
  bool fits() const { return fits_; }  // false: settle() found no codes that are short enough
  void loosen() {
    for (auto& [name, slot] : slots_) slot.settled = at::Tensor();
  }

  std::map<std::string, Quantized> codes() const {
    std::map<std::string, Quantized> out;
    for (const auto& [name, slot] : slots_) out[name] = quantized_slot(slot);
    return out;
  }

 private:
  struct Slot {
    LatentGrid grid;
    LatentValues values;
    at::Tensor settled;  // codes that settle() chose
    bool coded() const { return grid.spec.grid->entropy_coded(); }
  };
  static Quantized quantized_slot(const Slot& slot) {
    Quantized q = latent_codes(slot.grid, slot.values);
    if (slot.settled.defined()) q.codes = slot.settled;
    return q;
  }

  const QuantizedModel& quantized_;
  const std::map<std::string, at::Tensor>& original_;
  const TuneMode& mode_;
  const double margin_, scale_rate_;  // scale_rate: of scales / that of latents
  std::int64_t start_bytes_ = 0;  // of the entropy-coded matrices
  bool fits_ = true;
  std::map<std::string, Slot> slots_;  // nodes stay where they are: transforms hold references
};

class KlMonitor final : public TrainMonitor {
 public:
  KlMonitor(LearnedGrid& grid, const QuantizationPlan& plan, const TuningText& text, const KlTuneOptions& options, double start, StageContext& context)
      : grid_(grid), plan_(plan), text_(text), options_(options), teacher_(*context.teacher), title_(context.title), work_(context.work), best_(start) {}

  void after_step(Transformer& model, std::int64_t step, std::int64_t steps) override {
    const std::int64_t every = std::max<std::int64_t>(1, (steps + options_.evaluations - 1) / options_.evaluations);
    if (step % every != 0 && step != steps) return;
    const Json coded = grid_.settle();
    const double kl = mean_divergence(model, teacher_, text_.heldout);
    checkpoints_.push_back(Json{{"name", str("step ", step)}, {"step", step}, {"heldout_kl", kl}});
    if (!coded.is_null()) checkpoints_.back()["coded"] = coded;
    log_metric("tune", Json{{"stage", title_}, {"step", step}, {"heldout_kl", kl}});
    log_info(str(title_, ": step ", step, " of ", steps, ", held-out KL ", fixed(kl, 4), coded.is_null() ? "" : str(", ", human_bytes(coded.at("bytes").get<double>()), " of entropy-coded matrices at price ", fixed(coded.at("price").get<double>(), 3))));
    // Against the best checkpoint, not the start: latents may begin behind it and pass it later.
    stale_ = kl < best_checkpoint_ ? 0 : stale_ + 1;
    best_checkpoint_ = std::min(best_checkpoint_, kl);
    if (kl < best_ && grid_.fits()) {
      best_ = kl, best_step_ = step;
      tensors_ = grid_.codes(), vectors_ = kl_vectors(model);
      write();
    }
    grid_.loosen();
  }
  bool enough() const override { return options_.patience > 0 && stale_ >= options_.patience; }

  Json save() const override {
    saved_step_ = best_step_;
    return {{"best_step", best_step_}, {"best", best_}, {"stale", stale_}, {"best_checkpoint", std::isfinite(best_checkpoint_) ? Json(best_checkpoint_) : Json()}, {"checkpoints", checkpoints_}};
  }
  void restore(const Json& saved) override {
    best_step_ = saved_step_ = saved.at("best_step").get<std::int64_t>();
    best_ = saved.at("best").get<double>();
    stale_ = saved.at("stale").get<std::int64_t>();
    if (!saved.at("best_checkpoint").is_null()) best_checkpoint_ = saved.at("best_checkpoint").get<double>();
    checkpoints_ = saved.at("checkpoints");
    if (best_step_ > 0) tensors_ = load_quantized(folder(best_step_)).tensors;
  }

  // The best checkpoint into `model`, which holds the start; nothing when that is the best.
  void take(Transformer& model, QuantizedModel& quantized) {
    if (best_step_ == 0) return;
    if (vectors_.empty()) {  // resumed behind the best step
      vectors_ = kl_vectors(model);
      load_state(folder(best_step_) / "vectors.safetensors", {vectors_.begin(), vectors_.end()});
    }
    for (auto& [name, q] : tensors_) {
      model.find_linear(name)->weight = decode(plan_.tensors.at(name), q).to(model.device());
      quantized.tensors[name] = std::move(q);
    }
    kl_set_vectors(model, vectors_);
  }

  std::int64_t best_step() const { return best_step_; }
  const Json& checkpoints() const { return checkpoints_; }

 private:
  std::filesystem::path folder(std::int64_t step) const { return work_ / str("tuned-", step); }

  // What the saved state points to stays until a newer state is saved.
  void write() const {
    QuantizedModel model;
    model.tensors = tensors_;
    for (const auto& [name, q] : tensors_) model.plan.tensors[name] = plan_.tensors.at(name);
    AtomicFolder target(folder(best_step_));
    save_state(target.path() / "vectors.safetensors", {vectors_.begin(), vectors_.end()}, Json::object());
    save_quantized(model, target.path());
    target.commit();
    for (const auto& entry : std::filesystem::directory_iterator(work_))
      if (starts_with(entry.path().filename().string(), "tuned-") && entry.path() != folder(best_step_) && entry.path() != folder(saved_step_)) std::filesystem::remove_all(entry.path());
  }

  LearnedGrid& grid_;
  const QuantizationPlan& plan_;
  const TuningText& text_;
  const KlTuneOptions& options_;
  TeacherSource& teacher_;
  const std::string title_;
  const std::filesystem::path work_;
  double best_, best_checkpoint_ = std::numeric_limits<double>::infinity();
  std::int64_t best_step_ = 0, stale_ = 0;  // best_step_ 0: the start
  mutable std::int64_t saved_step_ = 0;
  std::map<std::string, Quantized> tensors_;  // of the best checkpoint
  std::map<std::string, at::Tensor> vectors_;
  Json checkpoints_ = Json::array();
};

}  // namespace

const TuneMode* find_tune_mode(std::string_view name) {
  for (const TuneMode& row : kl_modes)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> tune_mode_names() {
  std::vector<std::string> names = {"none"};
  for (const TuneMode& row : kl_modes) names.emplace_back(row.name);
  return names;
}

void fields(FieldVisitor& visitor, KlTuneOptions& options) {
  visitor.integer("steps", options.steps, "optimizer steps; 0 = as many as epochs make", {.min = 0});
  visitor.number("epochs", options.epochs, "passes over the calibration text, without what is held out; not used with steps", {.min = 0, .max = 100000, .open_min = true});
  visitor.integer("batch", options.batch, "calibration windows per step", {.min = 1, .max = 65536});
  visitor.number("learning_rate", options.learning_rate, "peak rate of latents (in codes) and scales (as a share), with warm-up and cosine; 0 = 0.01 for weights, 0.02 for scales", {.min = 0, .max = 1});
  visitor.number("scale_learning_rate", options.scale_learning_rate, "tune: weights; peak rate of scales (as a share); 0 = 0.3 of learning_rate", {.min = 0, .max = 1});
  visitor.number("norm_learning_rate", options.norm_learning_rate, "peak rate of norms and biases; 0 = 0.03 of learning_rate", {.min = 0, .max = 1});
  visitor.number("margin", options.margin, "tune: weights; how far from its code, in codes, a latent may start", {.min = 0, .max = 0.49});
  visitor.integer("evaluations", options.evaluations, "how many times the decoded model is scored on held-out text", {.min = 1});
  visitor.integer("patience", options.patience, "scores in a row without a better checkpoint that end the tuning; 0 = never", {.min = 0});
  visitor.choice("precision", options.precision, "of the passes that learn: auto = bf16 autocast where the hardware multiplies bf16; scores are float32", precision_names());
  visitor.number("holdout", options.holdout, "share of the calibration text that nothing but the scores sees, when the data has no set heldout", {.min = 0, .max = 0.5});
}

std::int64_t held_out_windows(std::int64_t windows, double holdout) { return std::max<std::int64_t>(1, std::llround(std::ceil(holdout * static_cast<double>(windows)))); }

TuningText tuning_text(const StageContext& context, double holdout) {
  const TaskData* data = context.data;
  if (!data || data->kind != TaskData::Kind::text || data->calibration.empty())
    throw Error("tuning towards the teacher's predictions needs calibration text and the run has none").at(context.title).hint("name text files under data.calibration, or set tune: none");
  TuningText text;
  const auto& all = data->calibration;
  const auto count = static_cast<std::int64_t>(all.size());
  text.own_heldout = !data->heldout.empty();
  const std::int64_t held = text.own_heldout ? 0 : held_out_windows(count, holdout);
  if (count - held < 1)
    throw Error("the calibration text is too short to tune on and to hold a part out").at(context.title).given(str(count, count == 1 ? " window" : " windows")).allowed("at least 2 windows, or 1 and a data set heldout").hint("give more calibration text or shorter windows (max_length)");
  text.tuning.assign(all.begin(), all.end() - held);
  text.heldout = text.own_heldout ? data->heldout : decltype(text.heldout)(all.end() - held, all.end());
  return text;
}

double mean_divergence(const Transformer& model, TeacherSource& teacher, const std::vector<std::vector<std::int64_t>>& windows) {
  at::NoGradGuard no_grad;
  double total = 0;
  std::int64_t positions = 0;
  for (const auto& window : windows) {
    TokenBatch batch;
    batch.ids = window, batch.rows = 1, batch.columns = static_cast<std::int64_t>(window.size()), batch.lengths = {batch.columns}, batch.examples = {0};
    const TeacherTargets target = teacher.targets(batch);  // logits, or hidden states and the head that makes logits of them
    TORCH_CHECK(target.logits.defined() || target.hidden.defined(), "the teacher gives no whole distribution");
    const at::Tensor wide = (target.logits.defined() ? target.logits : target.hidden).squeeze(0), hidden = model.hidden(to_input(batch, model.device())).squeeze(0);
    for (std::int64_t first = 0; first < batch.columns - 1; first += kl_score_rows) {
      const std::int64_t rows = std::min(kl_score_rows, batch.columns - 1 - first);
      const at::Tensor some = wide.narrow(0, first, rows), student = model.head(hidden.narrow(0, first, rows)).to(at::kFloat);
      const at::Tensor wanted = (target.logits.defined() ? some : target.head_bias.defined() ? at::linear(some, target.head_weight, target.head_bias) : at::linear(some, target.head_weight)).to(at::kFloat);
      const std::int64_t shared = std::min(student.size(1), wanted.size(1));  // a padded vocabulary on one side
      const at::Tensor p = at::log_softmax(wanted.narrow(1, 0, shared), 1), q = at::log_softmax(student.narrow(1, 0, shared), 1);
      total += (p.exp() * (p - q)).sum(1).sum(at::kDouble).item<double>();
      positions += rows;
    }
  }
  return positions > 0 ? total / static_cast<double>(positions) : std::numeric_limits<double>::quiet_NaN();
}

TrainOptions kl_train_options(const std::string& mode_name, const KlTuneOptions& tuning, std::int64_t windows, std::int64_t length) {
  const TuneMode* mode = find_tune_mode(mode_name);
  if (!mode) throw std::logic_error("kl_tune: mode none");
  const std::int64_t batch = std::clamp<std::int64_t>(tuning.batch, 1, std::max<std::int64_t>(1, windows));
  TrainOptions train;
  train.steps = tuning.steps > 0 ? tuning.steps : std::max<std::int64_t>(1, std::llround(std::ceil(tuning.epochs * static_cast<double>(windows) / static_cast<double>(batch))));
  train.sequence_length = length;
  train.batch_size = std::min(batch, std::max<std::int64_t>(1, kl_micro_tokens / std::max<std::int64_t>(1, length)));
  while (batch % train.batch_size != 0) --train.batch_size;
  train.accumulate = batch / train.batch_size;
  train.learning_rate = tuning.learning_rate > 0 ? tuning.learning_rate : mode->learning_rate;
  train.norm_learning_rate = tuning.norm_learning_rate > 0 ? tuning.norm_learning_rate : train.learning_rate * mode->norm_rate;
  train.weight_decay = 0, train.beta1 = 0.9, train.beta2 = 0.95, train.epsilon = 1e-10;  // gradients in units of codes are small
  train.schedule = "cosine", train.final_ratio = 0.02, train.warmup = std::min(0.1, 20.0 / static_cast<double>(train.steps));
  train.dropout = 0, train.precision = tuning.precision;
  train.save_every_steps = std::max<std::int64_t>(1, (train.steps + tuning.evaluations - 1) / tuning.evaluations);
  return train;
}

Json kl_tune(Transformer& model, QuantizedModel& quantized, const std::map<std::string, at::Tensor>& original, const std::string& mode_name, const KlTuneOptions& tuning, const std::vector<std::shared_ptr<Objective>>& objectives,
             const TuningText& text, StageContext& context) {
  if (objectives.empty()) throw Error("tuning trains, and no loss is given").at(context.title).hint("give quantize.objective a list of losses as in distill");
  if (!context.teacher || !context.work.has_parent_path()) throw std::logic_error("kl_tune: no teacher or no work folder");
  const auto started = std::chrono::steady_clock::now();
  context.teacher->prepare({});
  // As many tuning windows as held-out ones, spread over the text: what has been seen, beside what has not.
  std::vector<std::vector<std::int64_t>> seen;
  const std::size_t some = std::min(text.heldout.size(), text.tuning.size());
  for (std::size_t i = 0; i < some; ++i) seen.push_back(text.tuning[i * text.tuning.size() / some]);
  const double start = mean_divergence(model, *context.teacher, text.heldout), start_seen = mean_divergence(model, *context.teacher, seen);
  log_info(str(context.title, ": untuned, held-out KL ", fixed(start, 4), ", on calibration text ", fixed(start_seen, 4)));

  const TuneMode& mode = *find_tune_mode(mode_name);
  TrainOptions train_options = kl_train_options(mode_name, tuning, static_cast<std::int64_t>(text.tuning.size()), static_cast<std::int64_t>(text.tuning.front().size()));
  std::map<std::string, at::Tensor> weights;  // of the start, which comes back when no checkpoint is better
  std::set<std::string> latents;              // parameters that learn
  for (const Linear* linear : kl_linears(model, quantized.plan)) {
    weights[linear->name] = linear->weight;
    if (mode.codes_learn) latents.insert(linear->name + ".weight");
  }
  const std::map<std::string, at::Tensor> vectors = kl_vectors(model);
  for (const NamedParameter& parameter : model.parameters())
    if (parameter.value->dim() != 1 && !latents.count(parameter.name)) train_options.freeze.push_back(parameter.name);
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.tokenizer = context.data->tokenizer;
  data.train_documents.emplace_back();  // one document: the rows of the loop are exactly the windows
  for (const auto& ids : text.tuning) data.train_documents[0].insert(data.train_documents[0].end(), ids.begin(), ids.end());
  Sha256 hash;
  hash.update(std::as_bytes(std::span(data.train_documents[0])));
  data.hash = hash.hex();
  Json details = Json::object();
  StageContext inner = context;
  inner.data = &data, inner.details = &details;

  const auto grid = std::make_shared<LearnedGrid>(quantized, original, mode, tuning.margin, kl_own_scale_rate(tuning, mode) ? tuning.scale_learning_rate / train_options.learning_rate : mode.scale_rate);
  KlMonitor monitor(*grid, quantized.plan, text, tuning, start, context);
  const TrainResult trained = train(model, train_options, objectives, {grid}, inner, &monitor);
  for (const auto& [name, weight] : weights) model.find_linear(name)->weight = weight;
  kl_set_vectors(model, vectors);
  monitor.take(model, quantized);

  Json candidates = Json::array({Json{{"name", "untuned"}, {"step", 0}, {"heldout_kl", start}, {"calibration_kl", start_seen}}});
  for (const Json& checkpoint : monitor.checkpoints()) candidates.push_back(checkpoint);
  const Json* winner = nullptr;
  for (Json& candidate : candidates) {
    if (candidate.at("step") != monitor.best_step()) continue;
    if (monitor.best_step() > 0) candidate["calibration_kl"] = mean_divergence(model, *context.teacher, seen);
    winner = &candidate;
  }
  log_info(str(context.title, ": kept ", winner->at("name").get<std::string>(), ", held-out KL ", fixed(winner->at("heldout_kl").get<double>(), 4), " (untuned ", fixed(start, 4), ")"));
  if (context.details) (*context.details)["loss_curve"] = details.at("loss_curve");
  const auto tokens = [](const std::vector<std::vector<std::int64_t>>& windows) { return windows.size() * windows.front().size(); };
  return Json{{"mode", mode.name}, {"winner", winner->at("name")}, {"winner_step", monitor.best_step()}, {"heldout_kl", winner->at("heldout_kl")}, {"calibration_kl", winner->at("calibration_kl")}, {"untuned_heldout_kl", start}, {"candidates", candidates},
              {"steps", trained.steps}, {"planned_steps", train_options.steps}, {"tokens_per_step", train_options.batch_size * train_options.accumulate * train_options.sequence_length}, {"tuning_tokens", tokens(text.tuning)}, {"heldout_tokens", tokens(text.heldout)},
              {"heldout", text.own_heldout ? "data set heldout" : "end of the calibration text"}, {"seconds", std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count()}};
}

}  // namespace kompakt
