// Text of a gate to its tree: recursive descent, one token ahead, every mistake with its column.
#include <algorithm>
#include <array>
#include <cctype>
#include <optional>

#include "core/error.h"
#include "core/text.h"
#include "report/gate_expression.h"
#include "report/gates.h"
#include "report/metrics.h"

namespace kompakt {
namespace {

struct GateUnit {
  const char* name;
  double factor;
  Unit measures;
};
constexpr std::array<GateUnit, 11> gate_units = {{{"%", 0.01, Unit::share}, {"B", 1, Unit::bytes}, {"kB", 1e3, Unit::bytes}, {"MB", 1e6, Unit::bytes}, {"GB", 1e9, Unit::bytes}, {"KiB", 1024, Unit::bytes}, {"MiB", 1048576, Unit::bytes}, {"GiB", 1073741824, Unit::bytes}, {"s", 1, Unit::seconds}, {"min", 60, Unit::seconds}, {"h", 3600, Unit::seconds}}};
constexpr std::array<const char*, 6> gate_comparisons = {"<=", ">=", "==", "!=", "<", ">"};
constexpr int gate_depth_limit = 100;

bool gate_letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool gate_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)); }

class GateParser {
 public:
  GateParser(const std::string& text, const std::vector<std::string>& stages) : text_(text), stages_(stages) {}

  Gate parse() {
    Gate gate;
    gate.text = trim(text_);
    skip_blanks();
    if (at_end()) fail("the gate is empty", "a comparison, such as: accuracy >= 0.92");
    gate.left = sum(0);
    gate.comparison = comparison();
    gate.right = sum(0);
    if (peek() == '@') gate.level = level();
    if (!at_end()) {
      for (const char* op : gate_comparisons) {
        if (text_.compare(at_, std::char_traits<char>::length(op), op) == 0) fail("a gate has one comparison", "write two gates instead of a chain");
      }
      fail(str("unexpected \"", rest(), "\""), "an operator (+ - * /), \"@ 95%\" or the end");
    }
    check_scale(*gate.left, *gate.right);
    check_scale(*gate.right, *gate.left);
    return gate;
  }

 private:
  using Tree = std::shared_ptr<const GateExpression>;

  [[noreturn]] void fail(const std::string& what, const std::string& allowed, std::size_t column = 0, const std::string& hint = {}) const {
    Error error(str("gate: ", what));
    error.at(str("column ", column ? column : at_ + 1, " of the gate")).given(text_).allowed(allowed);
    if (!hint.empty()) error.hint(hint);
    throw error;
  }
  bool at_end() const { return at_ >= text_.size(); }
  char peek() const { return at_end() ? '\0' : text_[at_]; }
  std::string rest() const {  // not cut inside a code point
    std::size_t end = std::min(text_.size(), at_ + 20);
    while (end < text_.size() && (static_cast<unsigned char>(text_[end]) & 0xC0) == 0x80) ++end;
    return text_.substr(at_, end - at_);
  }
  void skip_blanks() {
    while (!at_end() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }
  void advance(std::size_t count = 1) {
    at_ += count;
    skip_blanks();
  }

  std::string comparison() {
    for (const char* op : gate_comparisons) {
      const std::size_t length = std::char_traits<char>::length(op);
      if (text_.compare(at_, length, op) != 0) continue;
      advance(length);
      return op;
    }
    const std::string allowed = "<=, >=, <, >, == or !=";
    if (peek() == '=') fail("\"=\" is no comparison", allowed, 0, "write ==");
    if (at_end()) fail("the comparison is missing", allowed);
    fail(str("expected a comparison, found \"", rest(), "\""), allowed);
  }

  double level() {
    const std::size_t column = at_ + 1;
    advance();
    if (!gate_digit(peek())) fail("a level must follow \"@\"", "@ 95%");
    const double value = number()->number;
    if (value != 0.95) fail("only 95% intervals are measured", "@ 95%", column);
    return value;
  }

  Tree binary(char kind, Tree first, Tree second, std::size_t column) const {
    auto tree = std::make_shared<GateExpression>();
    tree->kind = kind;
    tree->first = std::move(first);
    tree->second = std::move(second);
    tree->column = column;
    return tree;
  }

  Tree sum(int depth) {
    Tree tree = product(depth);
    while (peek() == '+' || peek() == '-') {
      const char op = peek();
      const std::size_t column = at_ + 1;
      advance();
      tree = binary(op, tree, product(depth), column);
    }
    return tree;
  }

  Tree product(int depth) {
    Tree tree = factor(depth);
    while (peek() == '*' || peek() == '/') {
      const char op = peek();
      const std::size_t column = at_ + 1;
      advance();
      tree = binary(op, tree, factor(depth), column);
    }
    return tree;
  }

  Tree factor(int depth) {
    if (depth > gate_depth_limit) fail("nested too deeply", str("at most ", gate_depth_limit, " levels"));
    const std::size_t column = at_ + 1;
    if (peek() == '-') {
      advance();
      return binary('-', factor(depth + 1), nullptr, column);
    }
    if (peek() == '(') {
      advance();
      Tree tree = sum(depth + 1);
      if (peek() != ')') fail(str("the parenthesis of column ", column, " is not closed"), ")");
      advance();
      return tree;
    }
    if (stage_name_ahead() || gate_letter(peek())) return name();
    if (gate_digit(peek()) || peek() == '.') return number();
    if (at_end()) fail("the gate ends too early", "a name, a number or a parenthesis");
    fail(str("expected a name or a number, found \"", rest(), "\""), "a name such as accuracy, teacher.bytes or distill.kl, a number such as 0.01, 25% or 2.9 MB");
  }

  // "02-distill": digits, a hyphen, a letter, without blanks.
  bool stage_name_ahead() const {
    std::size_t i = at_;
    while (i < text_.size() && gate_digit(text_[i])) ++i;
    return i > at_ && i + 1 < text_.size() && text_[i] == '-' && gate_letter(text_[i + 1]);
  }

  Tree number() {
    const std::size_t column = at_ + 1;
    std::size_t end = at_;
    while (end < text_.size() && (gate_digit(text_[end]) || text_[end] == '.')) ++end;
    // An exponent only when digits follow: "1e6", but not the unit of "1 e".
    if (end < text_.size() && (text_[end] == 'e' || text_[end] == 'E')) {
      std::size_t digits = end + 1;
      if (digits < text_.size() && (text_[digits] == '+' || text_[digits] == '-')) ++digits;
      if (digits < text_.size() && gate_digit(text_[digits])) {
        end = digits;
        while (end < text_.size() && gate_digit(text_[end])) ++end;
      }
    }
    const std::string digits = text_.substr(at_, end - at_);
    const auto value = parse_double(digits);
    if (!value) fail(str("\"", digits, "\" is not a number"), "a number such as 0.01 or 1e6");
    at_ = end;
    skip_blanks();
    auto tree = std::make_shared<GateExpression>();
    tree->number = *value;
    tree->column = column;
    std::size_t stop = at_;
    while (stop < text_.size() && gate_letter(text_[stop])) ++stop;
    const std::string unit = peek() == '%' ? "%" : text_.substr(at_, stop - at_);
    if (unit.empty()) return tree;
    std::vector<std::string> names;
    for (const GateUnit& row : gate_units) {
      names.emplace_back(row.name);
      if (unit != row.name) continue;
      tree->number = unit == "%" ? *value / 100 : *value * row.factor;
      tree->unit = unit;
      advance(unit.size());
      return tree;
    }
    fail(str("\"", unit, "\" is no unit", did_you_mean(unit, names)), join(names, ", "));
  }

  Tree name() {
    auto tree = std::make_shared<GateExpression>();
    tree->kind = 'n';
    tree->column = at_ + 1;
    const bool numbered = stage_name_ahead();
    while (true) {
      std::string part;
      if (peek() == '\'' || peek() == '"') {
        const std::size_t close = text_.find(peek(), at_ + 1);
        if (close == std::string::npos) fail("the quote is not closed", str(std::string(1, peek())));
        part = text_.substr(at_ + 1, close - at_ - 1);
        at_ = close + 1;
      } else {
        std::size_t end = at_;
        // A hyphen is part of a numbered stage's name and a minus everywhere else.
        while (end < text_.size() && (gate_letter(text_[end]) || gate_digit(text_[end]) || (numbered && tree->path.empty() && text_[end] == '-' && end + 1 < text_.size() && (gate_letter(text_[end + 1]) || gate_digit(text_[end + 1]))))) ++end;
        part = text_.substr(at_, end - at_);
        at_ = end;
      }
      if (part.empty()) fail("a name must follow the dot", "a key of report.json");
      tree->path.push_back(part);
      if (peek() != '.') break;
      ++at_;
    }
    skip_blanks();
    check_name(*tree);
    return tree;
  }

  static bool in(const std::vector<std::string>& names, const std::string& name) { return std::find(names.begin(), names.end(), name) != names.end(); }

  void check_name(const GateExpression& tree) const {
    const std::string& first = tree.path[0];
    std::vector<std::string> inside = metric_names();  // what an entry holds
    inside.insert(inside.end(), entry_keys().begin(), entry_keys().end());
    std::vector<std::string> subjects = {"artifact", "teacher", "start"};
    const bool numbered = gate_digit(first[0]);
    subjects.insert(subjects.end(), stages_.begin(), stages_.end());
    if (stages_.empty()) subjects.insert(subjects.end(), stage_kinds().begin(), stage_kinds().end());
    if (in(subjects, first) || (stages_.empty() && numbered)) {
      if (tree.path.size() == 1) fail(str("\"", first, "\" is a model, not a figure"), join(metric_names(), ", "), tree.column, str("write ", first, ".accuracy or ", first, ".bytes"));
      if (!in(inside, tree.path[1])) fail(str("\"", tree.path[1], "\" is not known of ", first, did_you_mean(tree.path[1], inside)), join(inside, ", "), tree.column + first.size() + 1);
      return;
    }
    if (in(inside, first) || in(report_keys(), first)) return;
    std::vector<std::string> all = inside;
    all.insert(all.end(), subjects.begin(), subjects.end());
    all.insert(all.end(), report_keys().begin(), report_keys().end());
    fail(str("\"", first, "\" is not known", did_you_mean(first, all)), str("a metric (", join(metric_names(), ", "), ") or one of ", join(subjects, ", "), " with a metric after a dot"), tree.column);
  }

  // accuracy >= 93 can never be met; latency_ms <= 5 MB and latency_ms <= 5 s compare unlike things.
  void check_scale(const GateExpression& name, const GateExpression& number) const {
    if (name.kind != 'n' || number.kind != '#') return;
    const Metric* metric = find_metric(name.path.back());
    for (const GateUnit& row : gate_units) {
      if (metric && number.unit == row.name && row.measures != metric->unit && row.measures != Unit::share) fail(str(metric->name, " is not measured in ", row.name), "a number without a unit", number.column, metric->unit == Unit::milliseconds ? "latency_ms counts milliseconds" : "");
    }
    if (metric && metric->unit == Unit::share && number.number > 1) fail(str(metric->name, " is a share between 0 and 1, never above ", shortest(number.number)), "0 to 1, or 0% to 100%", number.column, str("write ", shortest(number.number), "% if percent is meant"));
  }

  const std::string& text_;
  const std::vector<std::string>& stages_;
  std::size_t at_ = 0;
};

}  // namespace

const std::vector<std::string>& entry_keys() {
  static const std::vector<std::string> keys = {"tasks", "language", "embeddings", "shape", "versus_teacher", "versus_start", "ratio_to_teacher", "predicted", "cpu_seconds", "inference_peak_memory_bytes", "details"};
  return keys;
}
const std::vector<std::string>& report_keys() {
  static const std::vector<std::string> keys = {"totals", "data", "environment"};
  return keys;
}
const std::vector<std::string>& stage_kinds() {
  static const std::vector<std::string> kinds = {"finetune", "distill", "prune", "quantize", "export", "evaluate", "search", "tune"};
  return kinds;
}

Gate parse_gate(const std::string& text, const std::vector<std::string>& stages) { return GateParser(text, stages).parse(); }

}  // namespace kompakt
