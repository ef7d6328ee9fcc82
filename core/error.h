// Errors that a user can cause, with everything needed to mend them.
//
// Every message has four parts: where it happened, what was given, what is allowed, what to do.
// Broken invariants of our own are not an Error: they throw std::logic_error (exit code 1, "a bug").
#pragma once

#include <exception>
#include <string>
#include <vector>

namespace kompakt {

// Exit codes of the command line. A contract: scripts and CI pipelines rely on the numbers.
enum class ExitCode : int {
  ok = 0,
  bug = 1,           // a bug in kompakt
  user = 2,          // the user's mistake: recipe, file, option
  gate = 3,          // a gate was not met
  resource = 4,      // out of memory, disk or another resource
  interrupted = 130, // SIGINT, resumable
  terminated = 143,  // SIGTERM, resumable
};

class Error : public std::exception {
 public:
  // `what_happened` is one sentence that contains the offending value.
  explicit Error(std::string what_happened, ExitCode code = ExitCode::user);

  // Fluent parts; each may be set once: throw Error("...").at("a.csv:3").allowed("...").hint("...").
  Error& at(std::string place);        // file, file:line:column, tensor or key
  Error& given(std::string value);     // the value as the user wrote it
  Error& allowed(std::string values);  // the accepted set or range
  Error& hint(std::string action);     // what to do now

  const std::string& message() const { return message_; }
  const std::string& place() const { return place_; }
  ExitCode code() const { return code_; }
  // One line per part, no trailing newline. What the command line prints.
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  void compose();
  std::string message_, place_, given_, allowed_, hint_, text_;
  ExitCode code_;
};

// Several mistakes found in one pass (a recipe, a name map). `throw_if_any` throws one Error that lists all.
class Problems {
 public:
  void add(const Error& error) { errors_.push_back(error); }
  bool empty() const { return errors_.empty(); }
  std::size_t size() const { return errors_.size(); }
  const std::vector<Error>& errors() const { return errors_; }
  void throw_if_any(const std::string& summary) const;

 private:
  std::vector<Error> errors_;
};

}  // namespace kompakt
