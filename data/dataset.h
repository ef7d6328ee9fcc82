// Data sets of a recipe: classification examples and plain text, from CSV, JSON lines and text files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/fields.h"

namespace kompakt {

// One entry of a recipe's `data:` map. Files are relative to the recipe.
struct DataSource {
  std::vector<std::string> files;
  std::string format = "classification";  // classification | text | sentences
  std::string text = "text";              // column or key with the text
  std::string label = "label";            // column or key with the label
  std::string split;                      // text format: "" = whole file is one document, "blank" = documents end at an empty line, "line", "<|endoftext|>"
  std::int64_t tokens = 0;                // text: stop after this many tokens; 0 = all
  std::int64_t max_length = 0;            // classification: tokens per text, [CLS] and [SEP] included; 0 = the model's own limit
  bool refuse_long = false;               // true: a longer text is an error; false: cut and counted in the report
  double holdout = 0;                     // classification `train`: share held out as dev split (stratified, by seed)
};
void fields(FieldVisitor& visitor, DataSource& source);

struct Example {
  std::string text;
  std::int64_t label = 0;
};

struct ClassificationSet {
  std::vector<Example> examples;
  std::vector<std::string> label_names;  // index = label
  std::string hash;                      // SHA-256 over texts and labels in order
};

// Reads all files (CSV with a header line, quoted fields, CRLF; TSV; JSON lines; "label text" lines of TREC).
// `label_names`: when not empty the labels must be among them (a label in test that train lacks is an Error with file:line);
// when empty they are collected and sorted. Of format `sentences`: texts without labels, all numbered 0, without names; other files hold a text a line. Errors with file:line: missing column, empty text, empty set, invalid UTF-8.
ClassificationSet read_classification(const DataSource& source, const std::filesystem::path& base, const std::vector<std::string>& label_names = {});

// Stratified split (without labels a plain one) by CounterRandom(seed): first = kept, second = held out. Deterministic.
std::pair<ClassificationSet, ClassificationSet> hold_out(const ClassificationSet& set, double share, std::uint64_t seed);

// Documents of a text source, in order.
struct TextSet {
  std::vector<std::string> documents;
  std::string hash;
};
TextSet read_text_set(const DataSource& source, const std::filesystem::path& base);

}  // namespace kompakt
