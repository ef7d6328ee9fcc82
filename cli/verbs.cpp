#include "cli/verbs.h"

#include <array>

#include "core/text.h"

namespace kompakt {
namespace {

using Options = std::vector<OptionSpec>;

const Options& run_options() {
  static const Options options = {
      {"out", "DIR", "folder of the run; default runs/NAME"},
      {"set", "KEY.PATH=VALUE", "change a value of the recipe; may be repeated", true},
      {"device", "cpu|cuda[:N]", "where tensors live; default KOMPAKT_DEVICE of the environment, else cpu"},
      {"resume", "", "go on inside the stage that was interrupted"},
      {"until", "STAGE", "stop after this stage"},
      {"quiet", "", "no progress; warnings and errors only"},
      {"json", "", "print the report as one JSON document"},
      {"help", "", "this text"},
  };
  return options;
}

const Options& plan_options() {
  static const Options options = {{"set", "KEY.PATH=VALUE", "change a value of the recipe; may be repeated", true}, {"json", "", "print one JSON document"}, {"help", "", "this text"}};
  return options;
}

const Options& stage_options() {
  static const Options options = {
      {"model", "DIR", "Hugging Face folder or .gguf file to start from"},
      {"out", "DIR", "folder of the run; default runs/STAGE"},
      {"set", "KEY.PATH=VALUE", "STAGE.key=value or data.NAME.key=value; may be repeated", true},
      {"device", "cpu|cuda[:N]", "where tensors live; default KOMPAKT_DEVICE of the environment, else cpu"},
      {"resume", "", "go on inside an interrupted stage"},
      {"quiet", "", "no progress; warnings and errors only"},
      {"json", "", "print the report as one JSON document"},
      {"help", "", "this text"},
  };
  return options;
}

const Options& json_options() {
  static const Options options = {{"json", "", "print one JSON document"}, {"help", "", "this text"}};
  return options;
}

const Options& doctor_options() {
  static const Options options = {
      {"latency-table", "FILE", "measure the matrix products of a model's layer shapes on this machine, for searches under a latency budget"},
      {"model", "DIR", "whose shapes; Hugging Face folder or .gguf file"},
      {"tokens", "N", "tokens of a forward pass in the table; default 1"},
      {"json", "", "print one JSON document"},
      {"help", "", "this text"},
  };
  return options;
}

const Options& gate_options() {
  static const Options options = {{"require", "EXPR", "condition that must hold; may be repeated", true}, {"junit", "FILE", "write the verdicts as JUnit XML"}, {"json", "", "print one JSON document"}, {"help", "", "this text"}};
  return options;
}

const Options& classify_options() {
  static const Options options = {
      {"text", "TEXT", "the text to classify; may be repeated; without it lines are read from standard input", true},
      {"top", "N", "how many labels to show; default 3"},
      {"json", "", "print one JSON document"},
      {"help", "", "this text"},
  };
  return options;
}

const Options& generate_options() {
  static const Options options = {
      {"prompt", "TEXT", "what the model goes on from"},
      {"chat", "", "wrap the prompt in the model's chat template"},
      {"tokens", "N", "how many new tokens at most; default 128"},
      {"temperature", "T", "0 = greedy (default)"},
      {"top-k", "N", "sample among the N likeliest tokens"},
      {"top-p", "P", "sample among the likeliest tokens that hold this probability"},
      {"seed", "N", "of the sampling"},
      {"json", "", "print one JSON document"},
      {"help", "", "this text"},
  };
  return options;
}

}  // namespace

std::span<const Verb> verbs() {
  static constexpr std::array<Verb, 15> rows = {{
      {"run", "RECIPE", "run a recipe: teacher in, proven artifact and report out", "kompakt run recipes/quickstart.yaml --set seed=1", 1, 1, run_options, verb_run},
      {"plan", "RECIPE", "check a recipe and predict bytes, memory and time; computes nothing", "kompakt plan recipes/quickstart.yaml", 1, 1, plan_options, verb_plan},
      {"finetune", "", "one stage alone: train on labels", "kompakt finetune --model teachers/all-MiniLM-L6-v2 --set data.train.files=[train.csv] finetune.epochs=4", 0, 0, stage_options, verb_stage<0>},
      {"distill", "", "one stage alone: train a smaller student under the model", "kompakt distill --model runs/a/01-finetune --set distill.student.keep_layers=[1,3,5] data.train.files=[train.csv]", 0, 0, stage_options, verb_stage<1>},
      {"prune", "", "one stage alone: remove neurons, heads, layers, vocabulary", "kompakt prune --model DIR --set prune.structured.ffn=0.5 data.train.files=[train.csv]", 0, 0, stage_options, verb_stage<2>},
      {"quantize", "", "one stage alone: put the weights on a grid", "kompakt quantize --model model.gguf --set quantize.weights=int4 quantize.group=32", 0, 0, stage_options, verb_stage<3>},
      {"export", "", "one stage alone: write an artifact and prove it", "kompakt export --model runs/a/04-quantize --set export.formats=[gguf]", 0, 0, stage_options, verb_stage<4>},
      {"evaluate", "", "one stage alone: measure a model", "kompakt evaluate --model DIR --set data.test.files=[test.csv]", 0, 0, stage_options, verb_stage<5>},
      {"report", "RUN", "rebuild report.json, report.md and report.html from a run folder", "kompakt report runs/quickstart", 1, 1, json_options, verb_report},
      {"gate", "RUN", "check conditions on a report; exit code 3 when one is not met", "kompakt gate runs/quickstart --require 'artifact.bytes <= 3MB'", 1, 1, gate_options, verb_gate},
      {"inspect", "FILE|DIR", "tensors, types, bytes, bits per weight and metadata of a model file", "kompakt inspect runs/quickstart/artifact", 1, 1, json_options, verb_inspect},
      {"explain", "KEY|STAGE|METHOD [RECIPE]", "help from the tables that the recipe reader uses; with a recipe also the shapes that its prune stages may lead to", "kompakt explain quantize.group", 0, 2, json_options, verb_explain},
      {"classify", "MODEL", "answer with a classifier", "kompakt classify runs/quickstart/artifact --text \"my card has not arrived\"", 1, 1, classify_options, verb_classify},
      {"generate", "MODEL", "write text with a decoder", "kompakt generate model.gguf --prompt \"Once upon a time\"", 1, 1, generate_options, verb_generate},
      {"doctor", "", "what this machine and this build can do, with a self test", "kompakt doctor", 0, 0, doctor_options, verb_doctor},
  }};
  return rows;
}

const Verb* find_verb(std::string_view name) {
  for (const Verb& verb : verbs())
    if (verb.name == name) return &verb;
  return nullptr;
}

std::span<const std::string_view> reserved_verbs() {
  static constexpr std::array<std::string_view, 3> names = {"compare", "sweep", "verify"};
  return names;
}

std::string general_help() {
  std::string out = "kompakt makes small language models out of big ones: distil, prune, quantize, export, with a report that can be trusted.\n\nusage: kompakt VERB ...\n\n";
  for (const Verb& verb : verbs()) {
    std::string left = str("  ", verb.name, verb.arguments.empty() ? "" : " ", verb.arguments);
    left.resize(std::max<std::size_t>(left.size() + 2, 28), ' ');
    out += str(left, verb.summary, "\n");
  }
  out += "\nexample:\n  kompakt run recipes/quickstart.yaml\n\nkompakt VERB --help tells more; kompakt --version what it stands on.\n";
  out += "exit codes: 0 done, 1 a bug in kompakt, 2 a mistake in recipe, file or option, 3 a gate was not met, 4 out of memory or disk, 130/143 interrupted (resumable)\n";
  return out;
}

std::string verb_help(const Verb& verb) {
  return str("usage: kompakt ", verb.name, verb.arguments.empty() ? "" : " ", verb.arguments, " [options]\n\n", verb.summary, "\n\noptions:\n", options_help(verb.options()), "\nexample:\n  ", verb.example, "\n");
}

}  // namespace kompakt
