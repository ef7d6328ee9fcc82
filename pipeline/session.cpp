#include "pipeline/session.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "core/files.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "distributed/collective.h"
#include "export/exporters.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/device_memory.h"
#include "model/paged.h"
#include "model/parallel.h"
#include "pipeline/device.h"
#include "pipeline/energy.h"
#include "pipeline/version.h"
#include "quantize/held_weights.h"
#include "quantize/stage.h"
#include "train/mask.h"
#include "train/state.h"
#include "train/teacher.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

// Of the resolved recipe without what says nothing about the things made: where stages are kept, who else reads the metrics.
std::string recipe_hash(const Recipe& recipe) {
  Node resolved = recipe.resolved;
  if (const Node* store = resolved.find("store"); store && !store->scalar.empty()) resolved.set("store", Node::text("", true));
  resolved.set("tensorboard", Node::text("false"));
  return sha256(dump_yaml(resolved));
}

std::string session_teacher_hash(const fs::path& path) {
  if (fs::is_regular_file(path)) return sha256_file(path);
  Sha256 all;
  for (const char* name : {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "vocab.json", "masks.h5"})
    if (fs::exists(path / name)) all.update(name).update(sha256_file(path / name));
  std::vector<fs::path> weights;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.path().extension() == ".safetensors") weights.push_back(entry.path());
  std::sort(weights.begin(), weights.end());
  for (const fs::path& file : weights) all.update(file.filename().string()).update(sha256_file(file));
  return all.hex();
}

// Not a plain checkpoint: what an exporter has written, with codes in place of weights.
bool is_artifact(const fs::path& path) { return is_packed(path) || (fs::is_directory(path) && is_compressed(path)); }

// Of a folder that holds a GGUF file alone, that file.
fs::path session_model_file(const fs::path& path) {
  return fs::is_directory(path) && !fs::exists(path / "config.json") && fs::exists(path / "model.gguf") ? path / "model.gguf" : path;
}

// Bytes that the embedding tables take in the files of a model, by tensor name.
std::vector<std::pair<std::string, std::int64_t>> session_embedding_bytes(const Transformer& model, const fs::path& folder) {
  std::vector<std::pair<std::string, std::int64_t>> out;
  if (!fs::is_directory(folder) || !(fs::exists(folder / "model.safetensors") || fs::exists(folder / "model.safetensors.index.json"))) return out;
  const auto starts = [&](const std::string& name) {
    return starts_with(name, model.tokens.name + ".") || name.find("position_embeddings.") != std::string::npos || name.find("token_type_embeddings.") != std::string::npos;
  };
  const SafetensorsFile file = SafetensorsFile::open(folder);
  for (const TensorData& tensor : file.tensors())
    if (starts(tensor.name)) out.emplace_back(tensor.name, static_cast<std::int64_t>(tensor.bytes.size()));
  return out;
}

}  // namespace

RunSession::~RunSession() = default;
bool RunSession::leader() const { return !ranks_ || ranks_->leader(); }

RunSession::RunSession(const Recipe& recipe, const RunOptions& options)
    : recipe_(recipe),
      options_(options),
      folder_(options.out.empty() ? fs::path("runs") / recipe.name : options.out),
      store_(store_folder(recipe.store, recipe.base)),
      device_(parse_device(options.device)),
      evaluate_(evaluate_options(recipe)) {
  if (!options.until.empty()) {
    std::vector<std::string> names;
    for (const RecipeStage& stage : recipe.stages) names.insert(names.end(), {stage.title, std::string(stage.row->name)});
    if (std::find(names.begin(), names.end(), options.until) == names.end())
      throw Error(str("--until names no stage of the recipe", did_you_mean(options.until, names))).given(options.until).allowed(join(names, ", "));
  }
  const fs::path teacher = recipe.path_of(recipe.teacher.path);
  std::string hash = session_teacher_hash(teacher);
  if (!recipe.teacher.tokenizer.empty()) {
    const fs::path tokenizer = recipe.path_of(recipe.teacher.tokenizer);
    hash = sha256(hash + (fs::is_directory(tokenizer) ? sha256_folder(tokenizer) : sha256_file(tokenizer)));
  }
  position_ = {hash, teacher, "teacher", {}};
  teacher_position_ = position_;
  manifest_ = Json{{"name", recipe.name}, {"kompakt_version", kompakt_version}, {"seed", recipe.seed}, {"recipe_sha256", recipe_hash(recipe)},
                   {"environment", environment()}, {"data", nullptr}, {"teacher_source", {{"path", recipe.teacher.path}, {"sha256", hash}}}, {"teacher", nullptr},
                   {"stages", Json::array()}, {"artifact", nullptr}};
}

Json RunSession::environment() const {
  return Json{{"processor", processor_name()}, {"cores", core_count()}, {"torch", torch_version()}, {"device", device_.str()}, {"threads", at::get_num_threads()}};
}

std::string RunSession::stage_key(const RecipeStage& stage, std::size_t index) const {
  std::string artifact;  // a byte budget is one of the artifact: its format and the name in it count
  if (stage.options.find("budget"))
    for (const RecipeStage& other : recipe_.stages)
      if (other.row->name == "export") artifact += recipe_.name + "\n" + dump_yaml(other.options);
  if (const Node* budget = stage.options.find("budget"))
    if (const Node* table = budget->find("latency_table"); table && !table->scalar.empty()) artifact += sha256_file(recipe_.path_of(table->scalar));
  if (const Node* student = stage.options.find("student")) {
    if (const Node* config = student->find("config"); config && !config->scalar.empty() && fs::is_regular_file(recipe_.path_of(config->scalar))) artifact += sha256_file(recipe_.path_of(config->scalar));
    if (const Node* model = student->find("model"); model && !model->scalar.empty()) artifact += session_teacher_hash(recipe_.path_of(model->scalar));
  }
  std::string limits;  // how much of its files each data set gives
  for (const char* name : {"train", "heldout", "calibration", "rehearsal"})
    if (const DataSource* source = recipe_.find_data(name); source && (source->tokens > 0 || (source->max_length > 0 && std::string_view(name) != "train")))
      limits += str(name, " ", source->tokens, " ", source->max_length, "\n");
  return sha256(str(kompakt_version, "/", stage_revision, "\n", stage.row->name, "\n", dump_yaml(stage.options), position_.key, "\n", teacher_position_.key, "\n", data_hash_, "\n",
                    recipe_.find_data("train") ? recipe_.find_data("train")->max_length : 0, "\n", recipe_.seed, "\n", stage.row->needs_train ? index : 0, "\n",
                    stage.row->name == "export" ? recipe_.name : artifact, limits.empty() ? "" : "\n", limits, holds_teacher_apart() && learns_from_teacher(stage) ? "\nteacher as " + recipe_.teacher.precision : std::string()));
}

void RunSession::load_current(const fs::path& paging, bool shape_only) {
  if (current_.model) return;
  // An artifact that the run begins with is decoded into memory.
  const bool artifact = is_artifact(position_.folder);
  if (shape_only && !artifact) current_.model = std::make_shared<Transformer>(load_config(session_model_file(position_.folder)), 0, c10::Device(c10::kMeta));
  else current_.model = paging.empty() || artifact ? open_any_model(position_.folder) : load_model_paged(position_.folder, paging);
  if (!current_.model->device().is_meta()) current_.model->to(device_);
  const bool is_start = position_.title == "teacher";
  current_.tokenizer = load_tokenizer(is_start && !recipe_.teacher.tokenizer.empty() ? recipe_.path_of(recipe_.teacher.tokenizer) : position_.folder);
  check_tokenizer_fits(*current_.tokenizer, current_.model->config(), position_.folder.string());
  current_.masks = load_masks(position_.folder);
  check_masks_fit(current_.masks, *current_.model, position_.folder);
  current_.quantized.clear();
  if (has_quantized(position_.folder)) {
    const QuantizedModel quantized = load_quantized(position_.folder);
    for (const auto& [name, values] : quantized.tensors) current_.quantized[name] = {quantized.plan.tensors.at(name), values};
  }
}

FrozenTeacher RunSession::frozen_teacher(const std::string& precision) const {
  const fs::path path = session_model_file(teacher_position_.folder);
  const HeldPrecision& held = find_held_precision(precision);
  const bool whole = &held == &held_precisions().front();
  const auto on_device = [device = device_](std::shared_ptr<Transformer> model) {
    model->to(device);
    return model;
  };
  if (is_artifact(path)) {  // codes in place of weights: only its own reader knows what is in it
    const std::shared_ptr<Transformer> first = open_any_model(path);
    const std::string floats = fingerprint(*first);
    const auto open = [on_device, path, whole, &held]() -> std::shared_ptr<const Transformer> {
      std::shared_ptr<Transformer> model = open_any_model(path);
      if (!whole) hold_weights(*model, held);
      return on_device(std::move(model));
    };
    return FrozenTeacher(first->config(), device_, open, [floats, whole, precision] { return whole ? floats : sha256(floats + precision); });
  }
  const auto load = [on_device, path, whole, &held]() -> std::shared_ptr<const Transformer> { return on_device(whole ? load_model(path) : load_held_model(path, held)); };
  return FrozenTeacher(load_config(path), device_, load, [path, whole, precision] { return whole ? fingerprint(path) : sha256(fingerprint(path) + precision); });
}

void RunSession::name_teacher() {
  if (teacher_) return;
  teacher_ = frozen_teacher("float32");
  answering_ = recipe_.teacher.precision == "float32" ? teacher_ : frozen_teacher(recipe_.teacher.precision);
  const bool is_start = teacher_position_.title == "teacher";
  teacher_tokenizer_ = load_tokenizer(is_start && !recipe_.teacher.tokenizer.empty() ? recipe_.path_of(recipe_.teacher.tokenizer) : teacher_position_.folder);
}

TokenizedData& RunSession::data_for(const std::shared_ptr<const Tokenizer>& tokenizer, const ModelConfig& config) {
  const std::string key = str(tokenizer->fingerprint(), "/", config.max_positions);
  auto& slot = tokenized_[key];
  if (!slot) {
    slot = tokenize_data(recipe_, data_, *tokenizer, config);
    data_.truncated_train = slot->truncated_train;
    data_.truncated_test = slot->truncated_test;
  }
  slot->task.tokenizer = tokenizer.get();
  return *slot;
}

TeacherSource* RunSession::teacher_source() {
  name_teacher();
  const bool labels = recipe_.has_labels();
  if (labels && !teacher_.config().is_classifier()) return nullptr;  // not yet fit for the task
  if (!teacher_source_ || teacher_source_key_ != teacher_position_.key) {
    if (labels) {
      const TokenizedData& tokenized = data_for(teacher_tokenizer_, teacher_.config());
      teacher_source_ = cached_teacher(answering_, tokenized.task.train, std::max<std::int64_t>(teacher_tokenizer_->special().pad, 0), store_.root() / "teacher-outputs");
    } else {
      teacher_source_ = live_teacher(answering_);
    }
    teacher_source_key_ = teacher_position_.key;
  }
  return teacher_source_.get();
}

StageContext RunSession::stage_context(const RecipeStage& stage, std::size_t index, const std::string& key, Json& details) {
  if (teacher_ && holds_teacher_apart()) {  // of a teacher in fewer bits, floats are there to measure alone
    teacher_.release();
    if (!learns_from_teacher(stage)) answering_.release();
  }
  StageContext context;
  context.title = stage.title;
  context.work = folder_ / "work" / str(stage.title, "-", key.substr(0, 12), leader() ? std::string() : str("-rank-", ranks_->rank()));
  context.measurements = store_.root() / "importance";
  context.resume = options_.resume;
  if (!options_.resume) fs::remove_all(context.work);
  make_folder(context.work);
  // Block by block: the weights lie in a file, and nobody asks for the teacher's outputs.
  const bool paged = works_by_blocks(stage) && device_.is_cpu() && !is_artifact(position_.folder);
  if (current_.model && is_paged(current_.model->tokens.weight) != paged && stage.row->changes_weights) current_ = {};
  load_current(paged ? context.work : fs::path(), starts_afresh(stage));
  context.seed = recipe_.seed * 1000003 + index;
  context.device = device_;
  context.details = &details;
  context.layer_map = position_.layer_map;
  context.masks = current_.masks;
  if (!shared_trainings(stage).empty()) context.ranks = ranks_.get();
  const std::shared_ptr<const Tokenizer> tokenizer = current_.tokenizer;
  context.data = &data_for(tokenizer, current_.model->config()).task;
  return context;
}

bool RunSession::learns_from_teacher(const RecipeStage& stage) const {
  const bool is_export = stage.row->name == "export", text = data_.kind == TaskData::Kind::text;
  const bool uses_teacher = text ? stage.row->needs_teacher || stage.row->name == "quantize" || stage.row->name == "prune" : stage.row->name != "finetune" && !is_export;
  const bool tunes_text = (stage.row->name == "quantize" || stage.row->name == "tune") && text;
  return uses_teacher && !works_by_blocks(stage) && (recipe_.find_data("train") || tunes_text);
}

void RunSession::add_teacher(const RecipeStage& stage, StageContext& context) {
  if (!learns_from_teacher(stage)) return;
  context.teacher = teacher_source();
  if (holds_teacher_apart()) teacher_.release();  // one of the two at a time
}

void RunSession::run_stage(const RecipeStage& stage, std::size_t index, const std::string& key) {
  const bool is_export = stage.row->name == "export";
  std::optional<fs::path> entry = leader() ? store_.find(key) : std::nullopt;
  if (ranks_) {
    const bool stored = !ranks_->from_leader(entry ? "stored" : "").empty();
    if (!leader()) return follow_stage(stage, index, key, stored);
  }
  const bool reused = entry.has_value();
  if (!entry) {
    ++worked_;
    log_info(str("\n", bold(stage.title), "  ", stage.row->summary));
    Json details = Json::object();
    StageContext context = stage_context(stage, index, key, details);
    const bool reset = reset_peak_memory();
    reset_device_peak_memory(device_);
    const EnergyReading energy_start = read_energy(device_);
    const auto start = std::chrono::steady_clock::now();
    const double cpu_start = cpu_seconds();
    add_teacher(stage, context);
    entry = store_.add(key, [&](const fs::path& folder) {
      StageRun run{recipe_, current_, answering_, context, folder, teacher_tokenizer_};
      stage.row->run(stage.options, run);
      if (!is_export) {
        save_model(*current_.model, folder);
        current_.tokenizer->save(folder);
        save_masks(context.masks, folder);
        current_.masks = context.masks;
        if (!current_.quantized.empty()) {
          QuantizedModel quantized;
          for (const auto& [name, tensor] : current_.quantized) quantized.plan.tensors[name] = tensor.spec, quantized.tensors[name] = tensor.values;
          save_quantized(quantized, folder);
        }
      }
      Json record{{"name", stage.title}, {"stage", stage.row->name}, {"key", key}, {"seconds", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()},
                  {"cpu_seconds", cpu_seconds() - cpu_start}, {"peak_memory_bytes", peak_memory_bytes()}, {"energy_joules", nullptr}, {"layer_map", context.layer_map}};
      if (const EnergyReading energy = read_energy(device_); energy.joules && energy_start.joules) record["energy_joules"] = *energy.joules - *energy_start.joules, record["energy_note"] = "the GPU alone, other programs on it included";
      else record["energy_reason"] = energy.missing;
      if (const auto bytes = device_peak_memory_bytes(device_)) record["peak_device_memory_bytes"] = *bytes;
      if (!reset) record["peak_memory_note"] = "peak since the process started: this kernel does not allow a reset";
      const StagePrediction& predicted = predictions_[stage.title];
      record["predicted"] = Json{{"seconds", predicted.seconds}, {"peak_memory_bytes", predicted.memory_bytes}, {"bytes", predicted.bytes}};
      record["details"] = details;
      write_json(folder / "stage.json", record);
    });
    fs::remove_all(context.work);
  } else {
    log_info(str(stage.title, "  unchanged, taken from the store"));
    current_ = {};
  }
  if (ranks_) ranks_->from_leader("");  // the others may look into the store
  Json record = read_json(*entry / "stage.json");
  record["reused"] = reused;
  record["outputs"] = Store::outputs(*entry);
  const fs::path target = is_export ? folder_ / "artifact" : folder_ / stage.title;
  if (is_export) {
    publish_artifact(*entry);
    measure_teacher(index);
    std::string primary;
    const Json& reopened = record.at("details").at("reopened");
    primary = reopened.begin().key();
    const bool several = reopened.size() > 1;
    manifest_["artifact"] = measure_model("artifact", key + "/artifact", several ? target / primary : target, true);
    manifest_["artifact"]["format"] = primary;
  } else {
    Store::link_into(*entry, target);
    move_on(stage, key, *entry, record);
    measure_teacher(index);
    record["model"] = stage.row->name == "finetune" ? manifest_["teacher"] : measure_model(stage.title, key, *entry, false);
    record["model"]["label"] = stage.title;
  }
  manifest_["data"] = data_.describe();
  manifest_["stages"].push_back(record);
  write_manifest();
}

// Before all that is compared with it, example by example; the teacher that a later finetune makes is not there yet.
void RunSession::measure_teacher(std::size_t index) {
  const auto finetunes = [](const RecipeStage& stage) { return stage.row->name == "finetune"; };
  if (!manifest_["teacher"].is_null() || std::any_of(recipe_.stages.begin() + static_cast<std::ptrdiff_t>(index) + 1, recipe_.stages.end(), finetunes)) return;
  manifest_["teacher"] = measure_model("teacher", teacher_position_.key, teacher_position_.folder, false);
}

void RunSession::move_on(const RecipeStage& stage, const std::string& key, const fs::path& entry, const Json& record) {
  position_ = {key, entry, stage.title, record.at("layer_map").get<std::vector<std::int64_t>>()};
  if (stage.row->name != "finetune") return;
  teacher_position_ = position_;
  teacher_ = answering_ = {};
  teacher_source_.reset(), test_outputs_.reset();
}

void RunSession::follow_stage(const RecipeStage& stage, std::size_t index, const std::string& key, bool stored) {
  if (!stored && !shared_trainings(stage).empty()) {
    Json details = Json::object();
    StageContext context = stage_context(stage, index, key, details);
    add_teacher(stage, context);
    StageRun run{recipe_, current_, answering_, context, context.work / "output", teacher_tokenizer_};
    stage.row->run(stage.options, run);
    fs::remove_all(context.work);
  }
  ranks_->from_leader("");
  current_ = {};
  if (stage.row->name == "export") return;
  std::optional<fs::path> entry = store_.find(key);
  for (int tries = 0; !entry && tries < 100; ++tries) {  // a network file system shows a new folder late
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    entry = store_.find(key);
  }
  if (!entry) throw Error(str("the output of stage ", stage.title, ", which rank 0 has stored, is not there for rank ", ranks_->rank())).at(store_.root().string()).hint("put the store (store: FOLDER in the recipe, or XDG_CACHE_HOME) on a file system that all ranks share");
  move_on(stage, key, *entry, read_json(*entry / "stage.json"));
}

void RunSession::publish_artifact(const fs::path& entry) {
  Json lineage{{"kompakt_version", kompakt_version}, {"recipe", to_json(recipe_.resolved)}, {"recipe_sha256", manifest_.at("recipe_sha256")}, {"seed", recipe_.seed}, {"teacher", manifest_.at("teacher_source")}, {"data", data_.describe()}};
  Json stages = Json::array();
  for (const Json& stage : manifest_.at("stages")) stages.push_back(Json{{"name", stage.at("name")}, {"key", stage.at("key")}, {"outputs", stage.at("outputs")}});
  lineage["stages"] = std::move(stages);
  // Where the files lie on this machine says nothing about where the model comes from.
  lineage["recipe"]["store"] = "";
  lineage["recipe"]["tensorboard"] = false;
  lineage["files"] = Store::outputs(entry);
  AtomicFolder folder(folder_ / "artifact");
  const Json files = lineage["files"];
  for (const auto& [name, hash] : files.items()) link_or_copy(entry / name, folder.path() / name);
  write_json(folder.path() / "lineage.json", lineage);
  folder.commit();
}

TeacherSource* RunSession::test_outputs(const TokenizedData& tokenized) {
  const auto length = static_cast<std::int64_t>(tokenized.test_windows.front().size());  // that of a student with a shorter context
  if (!test_outputs_ || !test_outputs_->takes(length)) {
    const DataSource& source = *recipe_.find_data("test");
    test_text_ = {.kind = TaskData::Kind::text, .tokenizer = teacher_tokenizer_.get(), .hash = sha256(str("test windows\n", data_.test_text.hash, "\n", source.max_length, "/", source.tokens))};
    test_outputs_ = sparse_teacher(teacher_, test_text_, length, evaluate_.cache, store_.root() / "teacher-outputs");
    test_outputs_->prepare({});
  }
  return test_outputs_.get();
}

Json RunSession::measure_model(const std::string& label, const std::string& key, const fs::path& folder, bool artifact) {
  const bool is_teacher = key == teacher_position_.key;
  const bool versus_start = data_.has_previous() && !start_key_.empty() && key != start_key_;
  const std::string earlier = !data_.has_previous() ? std::string() : str("\n", data_.previous.hash, data_.previous_text.hash, "\n", recipe_.find_data("previous")->max_length, "/", recipe_.find_data("previous")->tokens, "\n", versus_start ? start_key_ : std::string());
  const std::string evaluation_key = sha256(str("evaluation/", stage_revision, "\n", key, "\n", data_.test.hash, data_.test_text.hash, data_.dev.hash, "\n", is_teacher ? std::string() : teacher_evaluation_key_, "\n",
      evaluate_.measure.latency, evaluate_.measure.latency_tokens, "/", evaluate_.measure.latency_repeats, "/", evaluate_.cascade, evaluate_.has_cache && !is_teacher ? str("/cache ", evaluate_.cache.top, " ", evaluate_.cache.tail) : std::string(), "\n", recipe_.find_data("test") ? str(recipe_.find_data("test")->max_length, "/", recipe_.find_data("test")->tokens) : std::string(), earlier));
  if (const auto entry = store_.find(evaluation_key)) {
    if (is_teacher) {
      teacher_evaluation_key_ = evaluation_key;
      teacher_scores_ = scores_from_json(read_json(*entry / "scores.json"));
      if (teacher_scores_->vectors.defined()) load_state(*entry / "vectors.safetensors", {{"vectors", teacher_scores_->vectors}});
    }
    Json out = read_json(*entry / "evaluation.json");
    out["label"] = label;
    return out;
  }
  ++worked_;
  // The artifact is read back by the reader of its format and tokenized by its own tokenizer.
  std::shared_ptr<const Transformer> model;
  std::shared_ptr<const Tokenizer> tokenizer;
  if (artifact) {
    std::shared_ptr<Transformer> reopened = open_any_model(folder);
    reopened->to(device_);
    model = reopened;
    tokenizer = load_tokenizer(fs::exists(folder / "model.gguf") ? folder / "model.gguf" : folder);
  } else if (!data_.has_test() && !data_.has_previous()) {  // nothing to run: its shape is enough
    model = std::make_shared<Transformer>(load_config(folder), 0, c10::Device(c10::kMeta));
  } else if (is_teacher) {
    name_teacher();
    if (holds_teacher_apart()) answering_.release();
    model = teacher_.model(), tokenizer = teacher_tokenizer_;
  } else {
    load_current();
    model = current_.model, tokenizer = current_.tokenizer;
  }
  Json out = describe_size(*model, folder, session_embedding_bytes(*model, folder));
  out["path"] = artifact ? "artifact" : label;
  const bool text = data_.kind == TaskData::Kind::text;
  const bool embeds = !text && !recipe_.has_labels() && model->config().family->encoder && !model->config().is_classifier();  // vectors are what it is for
  const bool measurable = (data_.has_test() || data_.has_previous()) && (text || embeds || model->config().is_classifier());
  TeacherScores scores;
  if (measurable) {
    if (text && !is_teacher) name_teacher();
    // Distributions over different tokens cannot be compared.
    const bool same_tokens = text && !is_teacher && tokenizer->fingerprint() == teacher_tokenizer_->fingerprint();
    // Rows behind the tokenizer's ids are padding: there may be more on one side.
    const auto same_rows = [&](std::int64_t mine, std::int64_t theirs) { return mine == theirs || (std::min(mine, theirs) >= tokenizer->vocab_size() && !evaluate_.has_cache); };
    const bool comparable = same_tokens && same_rows(model->config().vocab, teacher_.config().vocab);
    TokenizedData& tokenized = data_for(tokenizer, model->config());
    if (comparable && holds_teacher_apart()) answering_.release();
    const bool cached = comparable && evaluate_.has_cache && !tokenized.test_windows.empty();
    const std::shared_ptr<const Transformer> other = comparable && !cached ? teacher_.model() : nullptr;
    const Baselines baselines{is_teacher || !teacher_scores_ ? nullptr : &*teacher_scores_, other.get(), cached ? test_outputs(tokenized) : nullptr, versus_start ? &*start_scores_ : nullptr};
    scores = measure(*model, tokenized, evaluate_.measure, baselines, label, out);
    if (text && !is_teacher && !comparable) out["nulls"]["kl"] = same_tokens ? str("the model has a head of ", model->config().vocab, " rows, the teacher one of ", teacher_.config().vocab, evaluate_.has_cache ? " (leave evaluate.cache out to compare them)" : "") : "the teacher has another tokenizer";
    if (evaluate_.cascade && artifact && teacher_scores_ && !text && !scores.test.labels.empty()) out["cascade"] = cascade_curve(scores.test, teacher_scores_->test, tokenized.test.labels);
  } else {
    out["nulls"] = Json{{"accuracy", data_.has_test() ? recipe_.has_labels() ? "the model has no classifier" : "the texts have no labels" : "the recipe has no test data"}};
  }
  if (evaluate_.has_cache) teacher_.release();  // what comes next finds its outputs on disk
  if (is_teacher) {
    teacher_scores_ = scores;
    teacher_evaluation_key_ = evaluation_key;
  }
  store_.add(evaluation_key, [&](const fs::path& entry) {
    write_json(entry / "evaluation.json", out);
    write_json(entry / "scores.json", scores_to_json(scores));
    if (is_teacher && scores.vectors.defined()) save_state(entry / "vectors.safetensors", {{"vectors", scores.vectors}}, Json::object());
  });
  out["label"] = label;
  return out;
}

void RunSession::measure_start() {
  if (!data_.has_previous()) return;
  manifest_["start"] = measure_model("start", position_.key, position_.folder, false);
  start_key_ = position_.key;
  start_scores_ = teacher_scores_;  // it is the teacher as well until a stage makes another one
  // The first stage may replace both: nothing is held in memory for it.
  teacher_ = answering_ = {}, teacher_source_.reset(), test_outputs_.reset();
  current_ = {};
}

void RunSession::write_manifest() const { write_json(folder_ / "manifest.json", manifest_); }

}  // namespace kompakt
