// Command-line arguments of one verb. The door to cxxopts.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace kompakt {

struct OptionSpec {
  const char* name;    // long name without dashes
  const char* value;   // "" = flag
  const char* help;
  bool repeated = false;
};

struct Arguments {
  std::map<std::string, std::vector<std::string>> values;
  std::vector<std::string> positional;
  bool has(const std::string& name) const { return values.count(name) > 0; }
  std::string get(const std::string& name, const std::string& fallback = "") const;
  std::vector<std::string> all(const std::string& name) const;
};

// Throws Error for unknown options (with the nearest match), missing values and values where a flag stands.
// A repeated option may be followed by several values: --set a=1 b=2 (values up to the next option that hold "=").
Arguments parse_arguments(const std::string& verb, const std::vector<OptionSpec>& specs, const std::vector<std::string>& words);
std::string options_help(const std::vector<OptionSpec>& specs);

}  // namespace kompakt
