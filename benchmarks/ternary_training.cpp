// Ternary training on a small decoder, one ingredient after the other at equal steps: fading in, sub-norms, attention relations,
// next-token training first. Divergence from the float model and loss on text that no training has seen.
//
//   python3 scripts/make_toy_model.py --out /tmp/stories --llama2c stories260K.bin --tokenizer tok512.bin stories.txt
//   ternary_training /tmp/stories [steps] [learning rate] [part of a row's name ...]
#include <ATen/ATen.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
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

constexpr std::int64_t ternary_batch = 4, ternary_length = 128;

// Keys of the stage quantize, as in a recipe; the losses of a row without `objective` are the divergence alone.
struct TernaryRow {
  const char *name, *options;
  bool ones = false;          // sub-norms with gains of one, as BitDistill starts them
  double pretrain_share = 0;  // of the steps
};
constexpr TernaryRow ternary_rows[] = {
    {"rounded, not trained", "{method: rtn}"},
    {"qad", "{method: qad}"},
    {"qad, gradual 0.3", "{method: qad, gradual: 0.3}"},
    {"qad, gradual 0.3 cosine", "{method: qad, gradual: 0.3, gradual_schedule: cosine}"},
    {"qad, subln", "{method: qad, subln: true}"},
    {"qad, sub-norms of gain 1", "{method: qad}", true},
    {"qad, relation", "{method: qad, objective: [{logits: forward_kl}, {relation: minilm, weight: 1}]}"},
    {"qad, gradual + subln + relation", "{method: qad, gradual: 0.3, subln: true, objective: [{logits: forward_kl}, {relation: minilm, weight: 1}]}"},
    {"a quarter labels, then qad", "{method: qad, pretrain: {}}", false, 0.25},
    {"qad on labels alone", "{method: qad, objective: [{labels: cross_entropy}]}"},
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw Error("no model folder").allowed("ternary_training FOLDER [steps] [learning rate] [part of a row's name ...]");
  set_verbosity(std::getenv("VERBOSE") ? Verbosity::normal : Verbosity::quiet);
  const std::filesystem::path folder = argv[1];
  const std::int64_t steps = argc > 2 ? std::atoll(argv[2]) : 200;
  const double rate = argc > 3 ? std::atof(argv[3]) : 2e-3;
  const std::shared_ptr<const Transformer> teacher = load_model(folder);
  const SafetensorsFile tokens = SafetensorsFile::open(folder / "tokens.safetensors");
  const auto text = story_windows(tokens, "calibration"), evaluation = story_windows(tokens, "evaluation");
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.train_documents.emplace_back();  // one document: the rows of the loop are exactly the windows
  for (const auto& window : text) data.train_documents[0].insert(data.train_documents[0].end(), window.begin(), window.end());
  data.hash = "ternary";
  const auto source = live_teacher(teacher);
  std::vector<std::int64_t> layer_map;
  for (std::int64_t i = 0; i < teacher->config().layers; ++i) layer_map.push_back(i);

  std::printf("%lld steps of %lld tokens, learning rate %g; %zu windows of training text, %zu held out\n", static_cast<long long>(steps), static_cast<long long>(ternary_batch * ternary_length), rate, text.size(), evaluation.size());
  std::printf("%-34s %9s %9s %7s %8s\n", "ternary, one scale a row", "KL", "loss", "top1", "seconds");
  for (const TernaryRow& row : ternary_rows) {
    if (!row_wanted(row.name, argc, argv, 4)) continue;
    QuantizeOptions options;
    Problems problems;
    read_fields(parse_yaml(row.options, row.name), row.name, problems, [&](FieldVisitor& v) { fields(v, options); });
    const Node list = options.objective.is_null() ? default_objective(false) : options.objective;
    const auto objectives = build_objectives(list, layer_map, problems, objective_shapes(*teacher, teacher->config(), 1));
    problems.throw_if_any("the options of a row");
    options.weights = "ternary", options.group = 0, options.embedding = "int8", options.embedding_group = 0;
    for (TrainOptions* train : {&options.train, &options.pretrain}) {
      train->batch_size = ternary_batch, train->sequence_length = ternary_length, train->learning_rate = rate;
      train->schedule = "cosine", train->warmup = 0.05, train->beta2 = 0.95, train->precision = "float32", train->save_every_steps = steps;
    }
    options.pretrain.steps = std::max<std::int64_t>(1, static_cast<std::int64_t>(row.pretrain_share * static_cast<double>(steps)));
    options.train.steps = row.pretrain_share > 0 ? steps - options.pretrain.steps : steps;
    StageContext context;
    context.title = "ternary", context.seed = 1, context.data = &data, context.teacher = source.get();
    context.work = row_folder("ternary");
    const auto model = teacher->clone();
    if (row.ones) model->add_sub_norms();
    const auto start = std::chrono::steady_clock::now();
    quantize(*model, options, objectives, context);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::filesystem::remove_all(context.work);
    const StoryScore score = story_score(*model, *teacher, evaluation);
    std::printf("%-34s %9.4f %9.4f %7.4f %8.1f\n", row.name, score.kl, score.loss, score.same_top1, seconds);
    std::fflush(stdout);
  }
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
