// Quantization rung by rung on a small decoder: divergence from the float model on held-out text after GPTQ, polish, teacher
// target, block tuning and tuning of the whole model.
//
//   python3 scripts/make_toy_model.py --out /tmp/toy book.txt && tuning_ladder /tmp/toy [grid] [group] [part of a rung's name ...]
#include <ATen/ATen.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "benchmarks/story_model.h"
#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "distill/stage.h"
#include "quantize/stage.h"
#include "train/teacher.h"

using namespace kompakt;

namespace {

struct Rung {
  const char* name;
  double bar;  // largest share of the rung before that the algorithms should reach; 0 = no bar
  std::function<void(QuantizeOptions&)> set;
};

constexpr std::int64_t ladder_few = 64, ladder_all = 256, ladder_held = 16;  // calibration windows of the closed-form rungs, of the others, and held out

void ladder_trifit(QuantizeOptions& o, std::int64_t windows) { o.method = "trifit", o.calibration_sequences = windows; }
void ladder_blocks(QuantizeOptions& o) {
  ladder_trifit(o, ladder_all);
  o.has_block_tune = true, o.block_tune.iterations = 300;
}
void ladder_kl(QuantizeOptions& o, const char* mode) {
  o.tune = mode, o.tuning.steps = 300, o.tuning.batch = 12, o.tuning.patience = 0;
  o.tuning.holdout = static_cast<double>(ladder_held) / static_cast<double>(ladder_all + ladder_held);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw Error("no model folder").allowed("tuning_ladder FOLDER [grid] [group] [part of a rung's name ...]");
  set_verbosity(std::getenv("VERBOSE") ? Verbosity::normal : Verbosity::quiet);
  const std::filesystem::path folder = argv[1];
  const std::shared_ptr<const Transformer> teacher = load_model(folder);
  const SafetensorsFile tokens = SafetensorsFile::open(folder / "tokens.safetensors");
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.calibration = story_windows(tokens, "calibration");
  data.hash = "ladder";
  const auto evaluation = story_windows(tokens, "evaluation");
  const auto source = live_teacher(teacher);
  Problems problems;
  const auto objectives = build_objectives(default_objective(false), {}, problems, objective_shapes(*teacher, teacher->config(), 1));

  const std::vector<Rung> rungs = {
      {"rtn", 0, [](QuantizeOptions& o) { o.method = "rtn"; }},
      {"gptq", 0, [](QuantizeOptions& o) { o.method = "gptq", o.calibration_sequences = ladder_few; }},
      {"+ polish", 0.73, [](QuantizeOptions& o) { o.method = "gptq", o.polish_rounds = 4, o.calibration_sequences = ladder_few; }},
      {"+ teacher target (trifit)", 0.78, [](QuantizeOptions& o) { ladder_trifit(o, ladder_few); }},
      {"+ block_tune", 0.75, ladder_blocks},
      {"+ tune: weights", 0.64, [](QuantizeOptions& o) { ladder_blocks(o), ladder_kl(o, "weights"); }},
      {"block_tune + tune: scales", 0, [](QuantizeOptions& o) { ladder_blocks(o), ladder_kl(o, "scales"); }},
      {"trifit, all windows", 0, [](QuantizeOptions& o) { ladder_trifit(o, ladder_all); }},
      {"trifit + tune: scales", 0, [](QuantizeOptions& o) { ladder_trifit(o, ladder_all), ladder_kl(o, "scales"); }},
      {"trifit + tune: weights", 0, [](QuantizeOptions& o) { ladder_trifit(o, ladder_all), ladder_kl(o, "weights"); }},
      {"rtn + block_tune", 0, [](QuantizeOptions& o) { ladder_blocks(o), o.method = "rtn"; }},
  };
  std::printf("%-30s %9s %7s %9s %7s %8s  %s\n", "rung", "KL", "ratio", "bar", "top1", "seconds", "kept");
  double before = 0;
  for (const Rung& rung : rungs) {
    if (!row_wanted(rung.name, argc, argv, 4)) continue;
    QuantizeOptions options;
    options.weights = argc > 2 ? argv[2] : "ternary", options.group = argc > 3 ? std::atoll(argv[3]) : 64;
    options.embedding = "none";
    rung.set(options);
    // For trials: BLOCK='margin: 0.49, learning_rate: 0.01' and TUNE='...' change the options of all rungs.
    for (const auto& [variable, visit] : std::initializer_list<std::pair<const char*, std::function<void(FieldVisitor&)>>>{
             {"BLOCK", [&](FieldVisitor& v) { fields(v, options.block_tune); }}, {"TUNE", [&](FieldVisitor& v) { fields(v, options.tuning); }}})
      if (const char* text = std::getenv(variable)) read_fields(parse_yaml(str("{", text, "}"), variable), variable, problems, visit);
    problems.throw_if_any("the options of a rung");
    Json details = Json::object();
    StageContext context;
    context.title = "ladder", context.seed = 1, context.data = &data, context.teacher = source.get(), context.details = &details;
    context.work = row_folder("ladder");
    const auto model = teacher->clone();
    const auto start = std::chrono::steady_clock::now();
    quantize(*model, options, objectives, context);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::filesystem::remove_all(context.work);
    const auto [kl, same, loss] = story_score(*model, *teacher, evaluation);
    const Json& tuning = details.contains("tuning") ? details.at("tuning") : Json();
    std::printf("%-30s %9.4f %7.3f %9s %7.4f %8.1f  %s\n", rung.name, kl, before > 0 ? kl / before : 1.0, rung.bar > 0 ? ("<= " + fixed(rung.bar, 2)).c_str() : "", same, seconds,
                tuning.is_null() ? "" : str(tuning.at("winner").get<std::string>(), ", held out ", fixed(tuning.at("untuned_heldout_kl").get<double>(), 4), " -> ", fixed(tuning.at("heldout_kl").get<double>(), 4)).c_str());
    if (std::getenv("VERBOSE") && !tuning.is_null()) std::printf("  %s\n", tuning.dump().c_str());
    std::fflush(stdout);
    before = kl;
  }
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
