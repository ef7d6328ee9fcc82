// Reads the data sets of a recipe. A file's form follows from its name and from how `text` and `label` are written.
#include "data/dataset.h"

#include <algorithm>
#include <cctype>
#include <map>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/random.h"
#include "core/text.h"
#include "data/records.h"

namespace kompakt {
namespace {
namespace fs = std::filesystem;

struct RawExample {
  std::string text, label, place;
};

std::string dataset_place(const fs::path& file, std::int64_t line) { return str(file.string(), ":", line); }

// Column of a header, or a column number from 1 for files without a header.
std::size_t dataset_column(const std::string& wanted, const std::vector<std::string>& header, const std::string& place, const char* key) {
  const auto found = std::find(header.begin(), header.end(), wanted);
  if (found == header.end())
    throw Error(str("the column \"", wanted, "\" of `", key, "` is missing", did_you_mean(wanted, header))).at(place).allowed(join(header, ", ")).hint("column numbers from 1 serve files without a header line");
  return static_cast<std::size_t>(found - header.begin());
}

void read_table(const DataSource& source, const fs::path& file, std::vector<Record> records, std::vector<RawExample>& out) {
  if (records.empty()) return;
  const bool labelled = source.format != "sentences";
  const auto text_number = parse_int(source.text), label_number = labelled ? parse_int(source.label) : text_number;
  std::size_t text_column, label_column, first = 0, columns = records[0].cells.size();
  if (text_number && label_number) {
    for (const auto number : {*text_number, *label_number})
      if (number < 1 || number > static_cast<std::int64_t>(columns)) throw Error(str("the column number ", number, " does not exist")).at(dataset_place(file, 1)).allowed(str("1 to ", columns));
    text_column = static_cast<std::size_t>(*text_number - 1);
    label_column = static_cast<std::size_t>(*label_number - 1);
  } else {
    text_column = dataset_column(source.text, records[0].cells, dataset_place(file, records[0].line), "text");
    label_column = labelled ? dataset_column(source.label, records[0].cells, dataset_place(file, records[0].line), "label") : text_column;
    first = 1;
  }
  for (std::size_t i = first; i < records.size(); ++i) {
    Record& record = records[i];
    if (record.cells.size() != columns) throw Error(str("the line has ", record.cells.size(), " cells, the first one has ", columns)).at(dataset_place(file, record.line));
    out.push_back({record.cells[text_column], labelled ? record.cells[label_column] : std::string(), dataset_place(file, record.line)});
  }
}

void read_json_lines(const DataSource& source, const fs::path& file, const std::string& text, std::vector<RawExample>& out) {
  for (const Record& record : read_lines(text)) {
    if (trim(record.cells[0]).empty()) continue;
    const std::string place = dataset_place(file, record.line);
    const Json json = parse_json(record.cells[0], place);
    if (!json.is_object()) throw Error("the line is not a JSON object").at(place);
    if (source.format == "sentences") {
      out.push_back({json_get<std::string>(json, source.text, place), std::string(), place});
      continue;
    }
    const Json label = json_get<Json>(json, source.label, place);
    if (!label.is_string() && !label.is_number_integer() && !label.is_boolean()) throw Error(str("the label is neither a text nor a whole number")).at(place).given(label.dump());
    out.push_back({json_get<std::string>(json, source.text, place), label.is_string() ? label.get<std::string>() : label.dump(), place});
  }
}

// "LABEL:fine text" (TREC) and "label text": the label ends at the first space; a fine label behind a colon is dropped.
void read_label_lines(const fs::path& file, const std::string& text, std::vector<RawExample>& out) {
  for (const Record& record : read_lines(text)) {
    const std::string& line = record.cells[0];
    const std::size_t space = line.find(' ');
    if (space == std::string::npos || space == 0) throw Error("the line is not a label, a space and a text").at(dataset_place(file, record.line)).given(line.substr(0, 60));
    out.push_back({line.substr(space + 1), line.substr(0, std::min(space, line.find(':'))), dataset_place(file, record.line)});
  }
}

// "text@label": the label stands behind the last separator.
void read_label_behind(const fs::path& file, const std::string& text, char separator, std::vector<RawExample>& out) {
  for (const Record& record : read_lines(text)) {
    const std::string& line = record.cells[0];
    const std::size_t mark = line.rfind(separator);
    if (mark == std::string::npos) throw Error(str("the line has no \"", separator, "\" before its label")).at(dataset_place(file, record.line)).given(line.substr(0, 60));
    out.push_back({line.substr(0, mark), line.substr(mark + 1), dataset_place(file, record.line)});
  }
}

// One text a line, and the labels in a file of their own.
void read_parallel(const fs::path& file, const std::string& text, const fs::path& label_file, std::vector<RawExample>& out) {
  const auto texts = read_lines(text), labels = read_lines(read_utf8_text(label_file));
  if (texts.size() != labels.size()) throw Error(str("the file has ", texts.size(), " texts and its label file has ", labels.size(), " labels")).at(file.string()).given(label_file.string());
  for (std::size_t i = 0; i < texts.size(); ++i) out.push_back({texts[i].cells[0], labels[i].cells[0], dataset_place(file, texts[i].line)});
}

void read_examples(const DataSource& source, const fs::path& base, const fs::path& file, std::vector<RawExample>& out) {
  const std::string text = read_utf8_text(file);
  const std::string extension = file.extension().string();
  if (extension == ".csv") return read_table(source, file, read_csv(text, ',', file.string()), out);
  if (extension == ".tsv") return read_table(source, file, read_tsv(text), out);
  if (extension == ".jsonl" || extension == ".ndjson" || extension == ".json") return read_json_lines(source, file, text, out);
  if (source.format == "sentences") {
    for (const Record& record : read_lines(text)) out.push_back({record.cells[0], std::string(), dataset_place(file, record.line)});
    return;
  }
  if (parse_int(source.text) && parse_int(source.label)) return read_table(source, file, read_tsv(text), out);
  if (source.label.size() == 1 && std::ispunct(static_cast<unsigned char>(source.label[0]))) return read_label_behind(file, text, source.label[0], out);
  if (ends_with(source.label, ".txt")) return read_parallel(file, text, base / source.label, out);
  read_label_lines(file, text, out);
}

std::vector<std::string> sorted_labels(const std::vector<RawExample>& raw) {
  std::vector<std::string> names;
  for (const RawExample& example : raw) names.push_back(example.label);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  // Numbers in the order of their value: label 10 stands behind label 9.
  if (std::all_of(names.begin(), names.end(), [](const std::string& name) { return parse_int(name).has_value(); }))
    std::stable_sort(names.begin(), names.end(), [](const std::string& a, const std::string& b) { return *parse_int(a) < *parse_int(b); });
  return names;
}

std::string set_hash(const ClassificationSet& set) {
  Sha256 hash;
  for (const Example& example : set.examples) hash.update(str(example.text.size(), ":")).update(example.text).update(str(set.label_names.empty() ? std::string() : set.label_names[static_cast<std::size_t>(example.label)], "\n"));
  return hash.hex();
}

void check_files(const DataSource& source, const fs::path& base) {
  if (source.files.empty()) throw Error("the data source names no files").at(base.string()).allowed("files: [one or more names]");
}

}  // namespace

void fields(FieldVisitor& visitor, DataSource& source) {
  visitor.texts("files", source.files, "files, relative to the recipe");
  visitor.choice("format", source.format, "kind of data: texts with labels; running text for language models; sentences = texts without labels, for encoders that embed (a column or key of a table, or lines)", {"classification", "text", "sentences"});
  visitor.text("text", source.text, "column or key of the text; a column number from 1 for files without a header");
  visitor.text("label", source.label, "column or key of the label; a number, a separator such as @ before the label, or a .txt file with one label a line");
  visitor.text("split", source.split, "where documents end in text files: empty = whole file, blank = at an empty line, line, or a text such as <|endoftext|>");
  visitor.integer("tokens", source.tokens, "stop after this many tokens of text; 0 = all", {.min = 0});
  visitor.integer("max_length", source.max_length, "tokens per text, special tokens included; 0 = the model's limit", {.min = 0});
  visitor.flag("refuse_long", source.refuse_long, "longer texts are an error instead of being cut");
  visitor.number("holdout", source.holdout, "share of the training examples held out as development set", {.min = 0.0, .max = 0.9});
}

ClassificationSet read_classification(const DataSource& source, const fs::path& base, const std::vector<std::string>& label_names) {
  check_files(source, base);
  std::vector<RawExample> raw;
  for (const std::string& name : source.files) {
    const std::size_t before = raw.size();
    read_examples(source, base, base / name, raw);
    if (raw.size() == before) throw Error("the file holds no example").at((base / name).string());
  }
  ClassificationSet set;
  const bool labelled = source.format != "sentences";
  if (labelled) set.label_names = label_names.empty() ? sorted_labels(raw) : label_names;
  std::map<std::string, std::int64_t> index;
  for (std::size_t i = 0; i < set.label_names.size(); ++i) index[set.label_names[i]] = static_cast<std::int64_t>(i);
  Problems problems;
  for (RawExample& example : raw) {
    if (problems.size() >= 20) break;
    if (trim(example.text).empty()) problems.add(Error("the text is empty").at(example.place));
    if (!labelled) {
      set.examples.push_back({std::move(example.text), 0});
      continue;
    }
    if (example.label.empty()) problems.add(Error("the label is empty").at(example.place));
    const auto found = index.find(example.label);
    if (found == index.end()) {
      problems.add(Error(str("the label \"", example.label, "\" does not occur in the training data", did_you_mean(example.label, set.label_names))).at(example.place));
      continue;
    }
    set.examples.push_back({std::move(example.text), found->second});
  }
  problems.throw_if_any("the data set has mistakes");
  set.hash = set_hash(set);
  return set;
}

std::pair<ClassificationSet, ClassificationSet> hold_out(const ClassificationSet& set, double share, std::uint64_t seed) {
  if (!(share >= 0 && share < 1)) throw Error("the held-out share is out of range").given(shortest(share)).allowed("0 up to, not including, 1");
  std::vector<std::vector<std::size_t>> by_label(std::max<std::size_t>(1, set.label_names.size()));  // without labels all are of one kind
  for (std::size_t i = 0; i < set.examples.size(); ++i) by_label[static_cast<std::size_t>(set.examples[i].label)].push_back(i);
  std::vector<bool> held(set.examples.size(), false);
  for (std::size_t label = 0; label < by_label.size(); ++label) {
    const auto& members = by_label[label];
    // Rounded to nearest; a class that can spare one example is never without one on either side.
    auto count = static_cast<std::size_t>(share * static_cast<double>(members.size()) + 0.5);
    if (share > 0 && members.size() >= 2) count = std::clamp<std::size_t>(count, 1, members.size() - 1);
    else count = 0;
    const auto order = CounterRandom(seed, set.label_names.empty() ? std::string("hold-out") : "hold-out/" + set.label_names[label]).permutation(static_cast<std::int64_t>(members.size()));
    for (std::size_t i = 0; i < count; ++i) held[members[static_cast<std::size_t>(order[i])]] = true;
  }
  std::pair<ClassificationSet, ClassificationSet> out;
  out.first.label_names = out.second.label_names = set.label_names;
  for (std::size_t i = 0; i < set.examples.size(); ++i) (held[i] ? out.second : out.first).examples.push_back(set.examples[i]);
  out.first.hash = set_hash(out.first);
  out.second.hash = set_hash(out.second);
  return out;
}

TextSet read_text_set(const DataSource& source, const fs::path& base) {
  check_files(source, base);
  TextSet set;
  const auto add = [&](std::string_view document) {
    if (!trim(document).empty()) set.documents.emplace_back(document);
  };
  const auto add_trimmed = [&](std::string_view document) {  // line breaks around a separator are no part of the document
    while (!document.empty() && document.front() == '\n') document.remove_prefix(1);
    while (!document.empty() && document.back() == '\n') document.remove_suffix(1);
    add(document);
  };
  for (const std::string& name : source.files) {
    const std::size_t before = set.documents.size();
    const std::string text = replace_all(read_utf8_text(base / name), "\r\n", "\n");
    const std::string separator = source.split == "line" ? "\n" : source.split == "blank" ? "\n\n" : source.split;
    if (separator.empty()) {
      add(text);
    } else {
      for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(separator, start), text.size());
        add_trimmed(std::string_view(text).substr(start, end - start));
        start = end + separator.size();
      }
    }
    if (set.documents.size() == before) throw Error("the file holds no text").at((base / name).string());
  }
  Sha256 hash;
  for (const std::string& document : set.documents) hash.update(str(document.size(), ":")).update(document);
  set.hash = hash.hex();
  return set;
}

}  // namespace kompakt
