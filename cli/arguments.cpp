#include "cli/arguments.h"

#include <algorithm>
#include <cxxopts.hpp>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {

std::string Arguments::get(const std::string& name, const std::string& fallback) const {
  const auto found = values.find(name);
  return found == values.end() || found->second.empty() ? fallback : found->second.back();
}

std::vector<std::string> Arguments::all(const std::string& name) const {
  const auto found = values.find(name);
  return found == values.end() ? std::vector<std::string>{} : found->second;
}

Arguments parse_arguments(const std::string& verb, const std::vector<OptionSpec>& specs, const std::vector<std::string>& words) {
  std::vector<std::string> names;
  for (const OptionSpec& spec : specs) names.push_back(str("--", spec.name));
  cxxopts::Options options("kompakt " + verb);
  auto add = options.add_options();
  for (const OptionSpec& spec : specs) {
    if (*spec.value) add(spec.name, spec.help, cxxopts::value<std::vector<std::string>>());
    else add(spec.name, spec.help);
  }
  add("positional", "", cxxopts::value<std::vector<std::string>>());
  options.parse_positional({"positional"});

  // cxxopts splits list values at commas; a recipe value may hold one ([0,2,4]), so the values travel beside it.
  std::vector<std::string> kept, line{"kompakt"};
  bool after_repeated = false;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto spec = std::find_if(specs.begin(), specs.end(), [&](const OptionSpec& s) { return word == str("--", s.name) || starts_with(word, str("--", s.name, "=")); });
    if (spec == specs.end() || !*spec->value) {
      if (after_repeated && !starts_with(word, "--") && word.find('=') != std::string::npos) {
        line.push_back(str("--set=", kept.size()));
        kept.push_back(word);
        continue;
      }
      after_repeated = false;
      line.push_back(word);
      continue;
    }
    std::string value;
    if (const std::size_t equals = word.find('='); equals != std::string::npos) value = word.substr(equals + 1);
    else if (i + 1 < words.size()) value = words[++i];
    else throw Error(str("option --", spec->name, " needs a value")).at("kompakt " + verb).allowed(spec->value);
    line.push_back(str("--", spec->name, "=", kept.size()));
    kept.push_back(value);
    after_repeated = spec->repeated;
  }
  std::vector<const char*> argv;
  for (const std::string& word : line) argv.push_back(word.c_str());
  Arguments out;
  try {
    const auto parsed = options.parse(static_cast<int>(argv.size()), argv.data());
    for (const OptionSpec& spec : specs) {
      if (parsed.count(spec.name) == 0) continue;
      auto& list = out.values[spec.name];
      if (!*spec.value) continue;
      for (const std::string& index : parsed[spec.name].as<std::vector<std::string>>()) list.push_back(kept.at(static_cast<std::size_t>(*parse_int(index))));
      if (list.size() > 1 && !spec.repeated) throw Error(str("option --", spec.name, " stands twice")).at("kompakt " + verb).given(join(list, " and "));
    }
    if (parsed.count("positional")) out.positional = parsed["positional"].as<std::vector<std::string>>();
  } catch (const cxxopts::exceptions::exception& error) {
    std::string given;
    for (const std::string& word : words) {
      const std::string name = word.substr(0, word.find('='));
      if (starts_with(word, "-") && std::find(names.begin(), names.end(), name) == names.end()) given = name;
    }
    if (given.empty()) throw Error(error.what()).at("kompakt " + verb).hint(str("kompakt ", verb, " --help"));
    throw Error(str("unknown option ", given, did_you_mean(given, names))).at("kompakt " + verb).allowed(join(names, ", ")).hint(str("kompakt ", verb, " --help"));
  }
  return out;
}

std::string options_help(const std::vector<OptionSpec>& specs) {
  std::string out;
  for (const OptionSpec& spec : specs) {
    std::string left = str("  --", spec.name, *spec.value ? str(" ", spec.value) : std::string());
    left.resize(std::max<std::size_t>(left.size() + 2, 30), ' ');
    out += left + spec.help + "\n";
  }
  return out;
}

}  // namespace kompakt
