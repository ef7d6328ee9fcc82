// The training loop: batches, hooks, optimizer, state. Losses, constraints and schedules are rows and objects of others.
#include "train/loop.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <limits>
#include <utility>

#include "core/error.h"
#include "core/log.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "distributed/collective.h"
#include "train/attachment.h"
#include "train/bad_batch.h"
#include "train/batch_loss.h"
#include "train/batch_sampler.h"
#include "train/clip.h"
#include "train/data_parallel.h"
#include "train/ema.h"
#include "train/lora.h"
#include "train/mask.h"
#include "train/optimizer.h"
#include "train/precision.h"
#include "train/rate_finder.h"
#include "train/schedule.h"
#include "train/state.h"
#include "train/step_batches.h"
#include "train/telemetry.h"

namespace kompakt {
namespace {

// A step allocates and frees the same few hundred megabytes every time. glibc would give large blocks back to the kernel at
// each free and take fresh zeroed pages at the next allocation, which costs more than the small matrix products themselves.
void loop_keep_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

class TrainingRun {
 public:
  TrainingRun(Transformer& model, const TrainOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, const std::vector<std::shared_ptr<Constraint>>& constraints, StageContext& context,
              TrainMonitor* monitor)
      : model_(model), options_(options), objectives_(objectives), constraints_(constraints), context_(context), monitor_(monitor), data_(check_data()),
        schedule_(find_schedule(options.schedule)), bf16_(use_bf16(options.precision, context.device)), classification_(data_.kind == TaskData::Kind::classification),
        loss_(model, objectives, context, bf16_) {
    if (monitor_ && context_.ranks) throw std::logic_error("train: a monitor watches one process");
    if (context_.ranks) check_world_fits(options_.batch_size, options_.accumulate, context_.ranks->world(), context_.title);
    loop_keep_memory();
    check_model();
    if (model_.device() != context_.device) model_.to(context_.device);
  }

  TrainResult run() {
    const std::uint64_t order_seed = CounterRandom(context_.seed, "data-order").key();
    const StepBatches batches(data_, options_, order_seed);
    steps_ = batches.steps();
    if (loss_.needs_teacher() || context_.watched) leader_first(context_.ranks, [&] { context_.teacher->prepare(loss_.teacher_taps()); });
    if (context_.ranks) share_weights(*context_.ranks, model_);
    identity_ = identity();
    if (context_.ranks) context_.ranks->check_equal(identity_.dump(), "model, teacher, data or options", "all ranks need the same recipe, data and version of kompakt");

    Attachment attachment(model_, constraints_, used_ids(data_), options_.dropout, options_.recompute);
    const std::vector<TrainableParameter> trainable = all_parameters();
    DataParallel parallel(context_.ranks, trainable);
    parallel_ = &parallel;
    const AdamWOptions adamw{options_.beta1, options_.beta2, options_.epsilon, optimizer_is_8bit(options_.optimizer)};
    AdamW optimizer(trainable, adamw, parallel.mine());
    optimizer_ = &optimizer;
    EmaWeights ema(weights(), options_.ema);
    ema_ = &ema;
    const Json saved = restore();
    Telemetry telemetry(context_.title, steps_, saved.is_null() ? Json() : saved.at("telemetry"), context_.device);
    telemetry_ = &telemetry;
    if (!saved.is_null() && step_ == steps_)  // killed behind its last step: what constraints know beside the weights comes back
      for (const auto& constraint : constraints_) constraint->before_forward(model_, steps_ - 1, steps_);
    if (saved.is_null() && options_.find_learning_rate) {
      AdamW sweep(trainable, adamw, parallel.mine());
      optimizer_ = &sweep;
      find_rate(batches);
      optimizer_ = &optimizer;
    }
    if (bf16_) log_info(context_.title + ": bfloat16 autocast over float32 weights");

    while (step_ < steps_ && !enough()) {
      one_step(batches.micro_batches(step_));
      ++step_;
      if (batches.ends_epoch(step_ - 1) || (options_.evaluate_every_steps > 0 && step_ % options_.evaluate_every_steps == 0)) score_epoch(batches);
      if (monitor_) monitor_->after_step(model_, step_, steps_);
      const bool stop = stopping();
      if (stop || step_ == steps_ || enough() || step_ % options_.save_every_steps == 0) save();
      if (stop && step_ < steps_ && !enough()) leave_interrupted();
    }
    if (enough() && step_ < steps_) log_info(str(context_.title, ": stopped after step ", step_, " of ", steps_, ": the best held-out score was that of step ", best_step_));
    if (options_.keep == "best" && best_step_ > 0) {
      if (best_step_ != step_ || ema.active()) {
        if (parallel.leader()) load_state(best_file(), weights());
        parallel.from_leader(weights());
      }
    } else if (ema.active()) {
      ema.swap();
    }
    telemetry.finish();
    if (telemetry.empty_steps() > 0) report_empty(telemetry.empty_steps());
    if (context_.details) {
      if (telemetry.empty_micro_batches() > 0) (*context_.details)["empty"] = {{"steps", telemetry.empty_steps()}, {"micro_batches", telemetry.empty_micro_batches()}};
      (*context_.details)["loss_curve"] = telemetry.loss_curve();
      (*context_.details)["dev_curve"] = telemetry.dev_curve();
      if (context_.watched) (*context_.details)["watched_curve"] = telemetry.watched_curve();
      (*context_.details)["steps"] = step_;
      (*context_.details)["precision"] = bf16_ ? "bf16" : "float32";
      if (context_.ranks) (*context_.details)["ranks"] = context_.ranks->world();
      if (!rate_finder_.is_null()) (*context_.details)["learning_rate_finder"] = rate_finder_;
    }
    attachment.undo();
    const bool best = options_.keep == "best" && best_step_ > 0;
    return {step_, last_loss_, best ? best_score_ : last_score_, telemetry.seconds()};
  }

 private:
  const TaskData& check_data() const {
    if (!context_.data) throw std::logic_error("train: no data");
    return *context_.data;
  }

  void check_model() const {
    if (is_unlabelled(data_)) {
      if (!model_.config().family->encoder || model_.classifier.weight.defined())
        throw Error("texts without labels train encoders that give a vector for each").at(context_.title).given(model_.classifier.weight.defined() ? "a classifier" : std::string(model_.config().family->name)).hint("give the data labels (format: classification) or running text (format: text)");
    } else if (classification_ && !model_.classifier.weight.defined()) {
      throw Error("the model has no classifier to train on class labels").at(context_.title).hint("start with the stage finetune, which adds one to an encoder");
    }
    if (is_unlabelled(data_)) return;
    if (classification_) {
      const std::int64_t classes = model_.classifier.out_features();
      for (const TokenizedExamples* set : {&data_.train, &data_.dev}) {
        for (std::int64_t label : set->labels) {
          if (label < 0 || label >= classes) throw Error(str("label ", label, " does not fit the classifier of ", classes, " classes")).at(context_.title).given(str(label)).allowed(str("0 to ", classes - 1));
        }
      }
    } else if (!model_.lm_head.weight.defined() && !model_.config().tied) {
      throw Error("the model has no output over the vocabulary, so it cannot train on text").at(context_.title).hint("use a decoder, or class labels");
    }
  }

  // What a saved state belongs to. How often it is saved does not change the weights and may differ.
  Json identity() const {
    Json out = Json::object();
    out["options"] = to_json(write_fields([this](FieldVisitor& visitor) {
      TrainOptions copy = options_;
      fields(visitor, copy);
    }));
    out["options"].erase("save_every_steps");
    out["seed"] = context_.seed;
    out["steps"] = steps_;
    out["data"] = data_.hash;
    out["model"] = fingerprint(model_);
    out["teacher"] = loss_.needs_teacher() ? Json(context_.teacher->fingerprint()) : Json();
    out["precision"] = bf16_ ? "bf16" : "float32";
    if (context_.sampler) out["sampler"] = context_.sampler->identity();
    out["constraints"] = Json::array();
    for (const auto& constraint : constraints_) out["constraints"].push_back(constraint->name());
    return out;
  }

  std::vector<TrainableParameter> all_parameters() {
    std::vector<TrainableParameter> out = trainable_parameters(model_, options_);
    const auto add = [&](const std::string& owner, const std::vector<std::pair<std::string, at::Tensor>>& extra, double rate) {
      for (const auto& [name, value] : extra) {
        at::Tensor handle = value;
        handle.requires_grad_(true);
        out.push_back({owner + name, handle, options_.learning_rate * rate, 0});
      }
    };
    for (std::size_t i = 0; i < objectives_.size(); ++i) add(str("objective.", i, "."), objectives_[i]->parameters(), 1);
    for (std::size_t i = 0; i < constraints_.size(); ++i) add(str("constraint.", i, "."), constraints_[i]->parameters(), constraints_[i]->parameter_rate());
    return out;
  }

  NamedTensors weights() const {
    NamedTensors out;
    for (const TrainableParameter& parameter : optimizer_->parameters()) out.emplace_back("weight." + parameter.name, parameter.value);
    return out;
  }

  std::filesystem::path state_file() const { return context_.work / "state.safetensors"; }
  std::filesystem::path best_file() const { return context_.work / str("best-", best_step_, ".safetensors"); }

  NamedTensors state_tensors(const NamedTensors& moments) const {
    NamedTensors tensors = weights();
    for (const NamedTensors& list : {moments, ema_->state()}) tensors.insert(tensors.end(), list.begin(), list.end());
    return tensors;
  }

  // Every rank takes part: the moments are spread over them. The first one writes.
  void save() const {
    const NamedTensors moments = parallel_->whole_state(*optimizer_);
    if (!parallel_->leader()) return;
    const auto number = [](double value) { return std::isnan(value) ? Json() : Json(value); };
    save_state(state_file(), state_tensors(moments), {{"identity", identity_}, {"step", step_}, {"last_loss", last_loss_}, {"last_score", number(last_score_)},
                                       {"best_step", best_step_}, {"best_score", number(best_score_)}, {"stale", stale_}, {"telemetry", telemetry_->save()},
                                               {"monitor", monitor_ ? monitor_->save() : Json()}, {"rate_scale", rate_scale_}, {"rate_finder", rate_finder_}});
    for (const auto& entry : std::filesystem::directory_iterator(context_.work)) {  // only what the new state points to is needed
      if (starts_with(entry.path().filename().string(), "best-") && entry.path() != best_file()) std::filesystem::remove(entry.path());
    }
  }

  Json restore() {
    if (context_.work.empty()) throw std::logic_error("train: no work folder");
    std::filesystem::create_directories(context_.work);
    if (!context_.resume) return nullptr;
    const bool leader = parallel_->leader();
    const Json saved = parse_json(parallel_->from_leader(leader ? read_state_json(state_file()).dump() : ""), state_file().string());
    if (saved.is_null()) return nullptr;
    if (leader) check_identity(saved.at("identity"), identity_, state_file());
    const NamedTensors moments = leader ? optimizer_->state() : NamedTensors();
    if (leader) load_state(state_file(), state_tensors(moments));
    parallel_->give_state(moments, *optimizer_);
    parallel_->from_leader(weights());
    parallel_->from_leader(ema_->state());
    const auto number = [](const Json& json) { return json.is_null() ? std::numeric_limits<double>::quiet_NaN() : json.get<double>(); };
    step_ = saved.at("step").get<std::int64_t>();
    last_loss_ = number(saved.at("last_loss"));
    last_score_ = number(saved.at("last_score"));
    best_step_ = saved.at("best_step").get<std::int64_t>();
    best_score_ = number(saved.at("best_score"));
    stale_ = saved.at("stale").get<std::int64_t>();
    if (monitor_) monitor_->restore(saved.at("monitor"));
    rate_scale_ = saved.at("rate_scale").get<double>();
    rate_finder_ = saved.at("rate_finder");
    log_info(str(context_.title, ": going on after step ", step_, " of ", steps_));
    return saved;
  }

  // Data without any target is refused before; texts that a model writes may still be empty.
  void report_empty(std::int64_t empty) const {
    if (empty == step_) throw Error(str("none of ", step_, " steps had anything to predict")).at(context_.title).hint("check the data: documents of one token, or completions without a token, teach nothing");
    log_warning(str(context_.title, ": ", empty, " of ", step_, " steps had nothing to predict and left the weights as they were"));
  }

  void score_epoch(const StepBatches& batches) {
    ema_->swap();
    last_score_ = parallel_->from_leader(parallel_->leader() ? loss_.held_out_score(options_.batch_size, options_.sequence_length) : 0.0);  // the others wait
    if (!std::isnan(last_score_)) keep_score(batches);
    ema_->swap();
  }

  void keep_score(const StepBatches& batches) {
    telemetry_->dev(static_cast<double>(step_) / static_cast<double>(batches.steps_per_epoch()), step_, last_score_);
    ++stale_;
    if (best_step_ > 0 && !(last_score_ > best_score_)) return;
    best_score_ = last_score_;
    best_step_ = step_;
    stale_ = 0;
    if (options_.keep == "best" && parallel_->leader()) save_state(best_file(), weights(), Json::object());
  }

  // With several ranks a step's numbers say whether a signal has come to any: all stop after the same step.
  bool stopping() const { return parallel_->several() ? stop_ : interrupted(); }
  static void leave_interrupted() {
    if (!interrupted()) request_interrupt(SIGTERM);  // it came to another rank
    check_interrupted();
  }
  bool enough() const { return (monitor_ && monitor_->enough()) || (options_.stop_after > 0 && stale_ >= options_.stop_after); }

  // Gradients of the mean loss over all micro batches of a step, and its numbers. `draws`: stream of everything random in it.
  StepRecord compute(std::vector<TokenBatch>& batches, const char* draws, std::int64_t step) {
    // Every draw of a micro batch comes from here, so that a resumed run sees the same dropout, whichever rank computes it.
    const auto reseed = [&](std::size_t micro) {
      at::manual_seed(CounterRandom(context_.seed, micro == 0 ? std::string(draws) : str(draws, "/", micro)).bits(static_cast<std::uint64_t>(step)) & 0xffffffffu);
    };
    reseed(0);
    for (const auto& constraint : constraints_) constraint->before_forward(model_, step, steps_);
    if (context_.sampler) {  // every rank gets all texts: it needs to know what the others have
      const AutocastGuard autocast(context_.device, bf16_);
      context_.sampler->sample(model_, step, batches);
    }
    optimizer_->zero_grad();
    std::vector<double> counts;
    double all_targets = 0;
    std::vector<std::size_t> ours;  // of the micro batches that predict something, those that this rank computes
    StepRecord record;
    std::size_t filled = 0;
    for (const TokenBatch& batch : batches) {
      counts.push_back(static_cast<double>(count_targets(batch)));
      all_targets += counts.back();
      record.tokens += batch.tokens();
      if (counts.back() > 0 && parallel_->takes(filled++)) ours.push_back(counts.size() - 1);
    }
    record.step = step + 1;
    record.micro_batches = static_cast<std::int64_t>(counts.size());
    record.empty_micro_batches = static_cast<std::int64_t>(counts.size() - filled);
    if (filled == 0) return record;  // every rank sees it alike

    // Means over the whole step: a micro batch counts by its targets, or by what an objective compares instead, not as one of so many.
    for (double& count : counts) count /= all_targets;
    const std::vector<std::vector<double>> comparisons = loss_.comparison_weights(batches, ours, counts, *parallel_);
    at::Tensor loss;
    std::vector<std::pair<std::string, at::Tensor>> parts;
    for (std::size_t k = 0; k < ours.size(); ++k) {
      const std::size_t i = ours[k];
      if (i > 0) reseed(i);
      const double weight = counts[i];
      std::vector<LossPart> micro_parts;
      at::Tensor value = loss_.evaluate(batches[i], micro_parts, comparisons.empty() ? std::vector<double>() : comparisons[k], std::exchange(watch_, false) ? &watched_ : nullptr);
      if (i == ours.back()) parallel_->before_last_backward();
      (weight == 1 ? value : value * weight).backward();
      at::NoGradGuard no_grad;
      const at::Tensor share = value.detach().to(at::kFloat) * weight;
      loss = loss.defined() ? loss + share : share;
      for (const LossPart& part : micro_parts) {
        const at::Tensor part_share = part.value.detach().to(at::kFloat) * weight;
        auto found = std::find_if(parts.begin(), parts.end(), [&](const auto& entry) { return entry.first == part.name; });
        if (found == parts.end()) parts.emplace_back(part.name, part_share);
        else found->second = found->second + part_share;
      }
    }
    // One transfer from the device for all numbers of the step.
    const auto to_host = [](const std::vector<at::Tensor>& numbers) { return at::stack(numbers).to(at::kCPU, at::kDouble); };
    if (parallel_->several()) {
      StepShare share;
      share.interrupted = interrupted();
      if (loss.defined()) {
        std::vector<at::Tensor> numbers = {loss};
        for (const auto& [name, value] : parts) numbers.push_back(value.to(loss.device()));
        const at::Tensor host = to_host(numbers);
        share.loss = host[0].item<double>();
        for (std::size_t i = 0; i < parts.size(); ++i) share.parts.emplace_back(parts[i].first, host[static_cast<std::int64_t>(i) + 1].item<double>());
      }
      const StepShare all = parallel_->finish_step(share);
      record.loss = all.loss, record.parts = all.parts, stop_ = all.interrupted;
      record.gradient_norm = global_norm(optimizer_->gradients()).item<double>();
      return record;
    }
    std::vector<at::Tensor> numbers = {loss, global_norm(optimizer_->gradients()).to(loss.device())};
    for (const auto& [name, value] : parts) numbers.push_back(value.to(loss.device()));
    const at::Tensor host = to_host(numbers);
    const double* values = host.const_data_ptr<double>();
    record.loss = values[0];
    record.gradient_norm = values[1];
    for (std::size_t i = 0; i < parts.size(); ++i) record.parts.emplace_back(parts[i].first, values[i + 2]);
    return record;
  }

  void update(const StepRecord& record, double factor) {
    const double divisor = clip_divisor(record.gradient_norm, options_.clip);
    optimizer_->step(factor, divisor == 1 ? at::Tensor() : at::full({}, divisor, at::TensorOptions().dtype(at::kFloat).device(context_.device)));
    parallel_->share_parameters();
    for (const auto& constraint : constraints_) constraint->after_step(model_);
  }

  void one_step(std::vector<TokenBatch> batches) {
    watch_ = context_.watched && parallel_->leader() && telemetry_->watches(step_ + 1);
    StepRecord record = compute(batches, "train-step", step_);
    watch_ = false;  // a rank without a micro batch has measured nothing
    if (record.empty()) return telemetry_->step(record);  // the weights stay
    if (!std::isfinite(record.loss) || !std::isfinite(record.gradient_norm)) stop_for_bad_batch(context_.work, context_.title, batches, record, parallel_->leader());
    const double factor = rate_scale_ * schedule_factor(schedule_, step_, steps_, options_.warmup, options_.final_ratio);
    update(record, factor);
    ema_->update(step_ + 1);
    record.learning_rate = options_.learning_rate * factor;
    last_loss_ = record.loss;
    telemetry_->step(record);
    if (watched_.empty()) return;
    std::vector<std::pair<std::string, double>> parts;
    for (const LossPart& part : watched_) parts.emplace_back(part.name, part.value.item<double>());
    watched_.clear();
    telemetry_->watched(step_ + 1, parts);
  }

  // Steps with a growing learning rate on the data of the first steps, with an optimizer of their own; the weights come back.
  void find_rate(const StepBatches& batches) {
    NamedTensors before = weights();
    for (auto& [name, value] : before) value = value.detach().clone();
    RateFinder finder;
    Progress progress(context_.title + " learning rate", RateFinder::steps);
    bool over = false;
    for (std::int64_t i = 0; i < RateFinder::steps && !over; ++i) {
      std::vector<TokenBatch> micro_batches = batches.micro_batches(i % steps_);
      const StepRecord record = compute(micro_batches, "rate-finder", i);
      if (record.empty()) continue;
      over = finder.add(RateFinder::rate(i), std::isfinite(record.gradient_norm) ? record.loss : record.gradient_norm);
      if (!over) update(record, RateFinder::rate(i) / options_.learning_rate);
      if (stopping()) leave_interrupted();  // nothing is lost: a resumed run sweeps again
      progress.update(i + 1, "loss " + fixed(record.loss, 3));
    }
    const at::NoGradGuard no_grad;
    const NamedTensors after = weights();
    for (std::size_t i = 0; i < after.size(); ++i) after[i].second.detach().copy_(before[i].second);
    optimizer_->zero_grad();
    const std::optional<double> rate = finder.steepest();
    rate_finder_ = Json{{"learning_rate", rate.value_or(options_.learning_rate)}, {"falls", rate.has_value()}, {"curve", Json::array()}};
    for (const RatePoint& point : finder.curve()) rate_finder_["curve"].push_back({{"learning_rate", point.rate}, {"loss", point.loss}});
    if (rate) rate_scale_ = *rate / options_.learning_rate;
    progress.finish(rate ? "learning rate " + shortest(*rate) : std::string());
    if (!rate) log_warning(str(context_.title, ": the loss fell at no learning rate of the sweep; ", shortest(options_.learning_rate), " of the recipe stays"));
  }

  Transformer& model_;
  const TrainOptions& options_;
  const std::vector<std::shared_ptr<Objective>>& objectives_;
  const std::vector<std::shared_ptr<Constraint>>& constraints_;
  StageContext& context_;
  TrainMonitor* const monitor_;
  const TaskData& data_;
  const Schedule& schedule_;
  const bool bf16_, classification_;
  BatchLoss loss_;
  DataParallel* parallel_ = nullptr;  // live in run(), as the next three
  AdamW* optimizer_ = nullptr;
  EmaWeights* ema_ = nullptr;
  Telemetry* telemetry_ = nullptr;
  Json identity_;
  bool watch_ = false;               // the next micro batch is measured: the first that this rank computes in the step
  std::vector<LossPart> watched_;    // what was found
  Json rate_finder_;       // null: no sweep
  double rate_scale_ = 1;  // found learning rate / that of the recipe
  bool stop_ = false;      // a signal has come to some rank
  std::int64_t steps_ = 0, step_ = 0;  // step_: done
  double last_loss_ = 0, last_score_ = std::numeric_limits<double>::quiet_NaN(), best_score_ = std::numeric_limits<double>::quiet_NaN();
  std::int64_t best_step_ = 0;  // 0 = none yet
  std::int64_t stale_ = 0;      // scores since the best
};

}  // namespace

TrainResult train(Transformer& model, const TrainOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives,
                  const std::vector<std::shared_ptr<Constraint>>& constraints, StageContext& context, TrainMonitor* monitor) {
  if (options.stop_after > 0 && context.data && context.data->heldout.empty() && context.data->dev.ids.empty())
    throw Error("stop_after needs held-out data").at(context.title).hint("give data.heldout (text) or data.dev (classes)");
  std::vector<std::shared_ptr<Constraint>> all;
  if (!context.masks.empty()) all.push_back(mask_constraint(context.masks));  // first: fake quantization rounds what it leaves
  all.insert(all.end(), constraints.begin(), constraints.end());
  if (!options.has_lora) return TrainingRun(model, options, objectives, all, context, monitor).run();
  if (!all.empty()) throw Error("lora trains adapters beside the weights, and this stage trains under constraints on the weights themselves").at(context.title).given(all.front()->name()).hint("remove lora from this stage");
  const std::vector<std::shared_ptr<Constraint>> adapters{std::make_shared<LoraAdapters>(options.lora, context.seed)};
  return TrainingRun(model, options, objectives, adapters, context, monitor).run();
}

}  // namespace kompakt
