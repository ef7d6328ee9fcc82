// Data sets: forms of files, mistakes with their lines, every shared set, holding out.
#include <catch2/catch.hpp>
#include <map>

#include "core/files.h"
#include "data/calibration.h"
#include "data/dataset.h"
#include "data/records.h"
#include "data/tokenizer.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

struct Written {
  TemporaryFolder folder;
  DataSource source;
  Written(const std::string& name, const std::string& content, const std::string& text = "text", const std::string& label = "label") {
    write_text(folder.path() / name, content);
    source.files = {name};
    source.text = text;
    source.label = label;
  }
  ClassificationSet read(const std::vector<std::string>& names = {}) const { return read_classification(source, folder.path(), names); }
  std::string error(const std::vector<std::string>& names = {}) const {
    return error_text([&] { read(names); });
  }
};

}  // namespace

TEST_CASE("CSV: quotes, line breaks, byte order mark, CRLF") {
  const auto set = Written("a.csv", "\xEF\xBB\xBFtext,label\r\n\"a \"\"b\"\", c\nd\",x\r\nplain,y\r\n\r\n\" \"\"\",x\r\n").read();
  REQUIRE(set.examples.size() == 3);
  CHECK(set.examples[0].text == "a \"b\", c\nd");
  CHECK(set.examples[1].text == "plain");
  CHECK(set.label_names == std::vector<std::string>{"x", "y"});
  CHECK(set.examples[1].label == 1);
  CHECK(read_csv("a,\n,\n", ',', "p").size() == 2);
  CHECK(read_csv("a,", ',', "p")[0].cells == std::vector<std::string>{"a", ""});
  CHECK(read_csv("", ',', "p").empty());
  // The hash knows texts and labels.
  CHECK(set.hash != Written("a.csv", "text,label\nplain,y\n").read().hash);
  CHECK(Written("a.csv", "text,label\nq,y\n").read().hash == Written("a.jsonl", "{\"text\": \"q\", \"label\": \"y\"}\n").read().hash);
}

TEST_CASE("mistakes in data files name file and line") {
  CHECK(contains_all(Written("a.csv", "txt,label\na,b\n").error(), {"a.csv:1", "text", "did you mean", "txt"}));
  CHECK(contains_all(Written("a.csv", "text,label\nx,1\n\"open,1\n").error(), {"a.csv:3", "never ends"}));
  CHECK(contains_all(Written("a.csv", "text,label\n\"x\"y,1\n").error(), {"a.csv:2", "closing quote"}));
  CHECK(contains_all(Written("a.csv", "text,label\n\"x\ny\",1\nz\n").error(), {"a.csv:4", "1 cells"}));
  CHECK(contains_all(Written("a.csv", "text,label\n ,1\n").error(), {"a.csv:2", "empty"}));
  CHECK(contains_all(Written("a.csv", "text,label\nx,\n").error(), {"a.csv:2", "label is empty"}));
  CHECK(contains_all(Written("a.csv", "text,label\n").error(), {"a.csv", "no example"}));
  CHECK(contains_all(Written("a.csv", "text,label\nx,1\n\xE9,1\n").error(), {"a.csv:3", "UTF-8", "iconv"}));
  CHECK(contains_all(Written("a.csv", "text,label\nx,card_arival\n").error({"card_arrival", "other"}), {"a.csv:2", "card_arival", "did you mean", "card_arrival"}));
  CHECK(contains_all(Written("a.csv", "a,b\nc,d\n", "1", "3").error(), {"number 3", "1 to 2"}));
  CHECK(contains_all(Written("a.jsonl", "{\"text\": \"x\"}\n").error(), {"a.jsonl:1", "label"}));
  CHECK(contains_all(Written("a.jsonl", "{\"text\": \"x\", \"label\": 1}\n{\"text\"\n").error(), {"a.jsonl:2", "JSON"}));
  CHECK(contains_all(Written("a.jsonl", "{\"text\": \"x\", \"label\": 1.5}\n").error(), {"a.jsonl:1", "1.5"}));
  CHECK(contains_all(Written("a.txt", "LABEL\n").error(), {"a.txt:1"}));
  CHECK(contains_all(error_text([] { read_classification(DataSource{}, ".", {}); }), {"no files"}));
}

TEST_CASE("line forms: TREC, label before text, label behind a mark, parallel files, columns by number") {
  const auto trec = Written("a.label", "DESC:manner How did it ?\nABBR:exp What is it ?\n").read();
  CHECK(trec.label_names == std::vector<std::string>{"ABBR", "DESC"});
  CHECK(trec.examples[0].text == "How did it ?");
  const auto numbers = Written("a.txt", "10 ten\n9 nine\n").read();
  CHECK(numbers.label_names == std::vector<std::string>{"9", "10"});
  CHECK(Written("a.txt", "x@y is@good\r\n", "text", "@").read().examples[0].text == "x@y is");
  CHECK(Written("a.csv", "3,title\n4,other\n", "2", "1").read().examples.size() == 2);
  CHECK(Written("a.jsonl", "{\"text\": \"x\", \"label\": true}\n").read().label_names[0] == "true");
  const Written parallel("texts.txt", "one\ntwo\n", "text", "labels.txt");
  write_text(parallel.folder.path() / "labels.txt", "0\n1\n");
  CHECK(parallel.read().examples[1].label == 1);
  write_text(parallel.folder.path() / "labels.txt", "0\n");
  CHECK(contains_all(parallel.error(), {"2 texts", "1 labels"}));
}

TEST_CASE("every shared classification set loads with the size its description gives") {
  if (!shared_data("classification")) return skip("no shared data");
  struct Row {
    const char *file, *text, *label;
    std::size_t examples, labels;
  };
  const Row rows[] = {
      {"ag_news_test.csv", "3", "1", 7600, 4},
      {"banking77/train.csv", "text", "category", 10003, 77},
      {"banking77/test.csv", "text", "category", 3080, 77},
      {"cuad_clauses_a.jsonl", "text", "label", 9068, 41},
      {"financial_phrasebank_50agree.txt", "text", "@", 4846, 3},
      {"germeval2018/train.txt", "1", "2", 5009, 2},
      {"sms_spam.tsv", "SMS", "Label", 5574, 2},
      {"sms_spam_german.csv", "Text", "Spam", 5572, 2},
      {"sst2/train.txt", "text", "label", 6920, 2},
      {"trec6/train.txt", "text", "label", 5452, 6},
      {"trec6/test.txt", "text", "label", 500, 6},
      {"tweeteval_emotion/test_text.txt", "text", "tweeteval_emotion/test_labels.txt", 1421, 4},
  };
  for (const Row& row : rows) {
    DataSource source;
    source.files = {row.file};
    source.text = row.text;
    source.label = row.label;
    INFO(row.file);
    const auto set = read_classification(source, *shared_data("classification"));
    CHECK(set.examples.size() == row.examples);
    CHECK(set.label_names.size() == row.labels);
  }
}

TEST_CASE("holding out is stratified and a pure function of the seed") {
  std::string text;
  for (int i = 0; i < 100; ++i) text += std::string(i % 10 == 0 ? "rare" : "often") + " text " + std::to_string(i) + "\n";
  text += "single only one\n";
  const auto set = Written("a.txt", text).read();
  const auto [kept, held] = hold_out(set, 0.2, 5);
  CHECK(kept.examples.size() + held.examples.size() == 101);
  std::map<std::int64_t, int> counts;
  for (const Example& example : held.examples) ++counts[example.label];
  CHECK(counts[0] == 18);  // often
  CHECK(counts[1] == 2);   // rare
  CHECK(counts[2] == 0);   // a class of one stays in training
  CHECK(hold_out(set, 0.2, 5).second.hash == held.hash);
  CHECK(hold_out(set, 0.2, 6).second.hash != held.hash);
  CHECK(hold_out(set, 0, 5).second.examples.empty());
  CHECK(contains_all(error_text([&] { hold_out(set, 1, 5); }), {"share"}));
}

TEST_CASE("text sets: whole files, blank lines, lines, separators") {
  const auto read = [](const std::string& content, const std::string& split) {
    const TemporaryFolder folder;
    write_text(folder.path() / "a.txt", content);
    DataSource source;
    source.files = {"a.txt"};
    source.split = split;
    return read_text_set(source, folder.path()).documents;
  };
  using Documents = std::vector<std::string>;
  CHECK(read("a\r\nb\n\nc\n", "") == Documents{"a\nb\n\nc\n"});
  CHECK(read("a\nb\n\n\n\nc\n", "blank") == Documents{"a\nb", "c"});
  CHECK(read("a\n\nb\n", "line") == Documents{"a", "b"});
  CHECK(read("a\n<|endoftext|>\nb\n<|endoftext|>", "<|endoftext|>") == Documents{"a", "b"});
  CHECK(contains_all(error_text([&] { read("\n \n", "blank"); }), {"a.txt", "no text"}));
}

TEST_CASE("calibration windows and their overlap with evaluation text") {
  if (!shared_data("tokenizers/gpt2")) return skip("no shared data");
  const auto tokenizer = load_tokenizer(*shared_data("tokenizers/gpt2"));
  TextSet text, other;
  std::string story;
  for (int i = 0; i < 300; ++i) story += "Line " + std::to_string(i * 7919 % 1000) + " tells of " + std::to_string(i) + " things. ";
  text.documents = {story, "The end."};
  const auto windows = token_windows(text, *tokenizer, 16, 4);
  CHECK(windows.windows.size() == 4);
  CHECK(windows.windows[1].size() == 16);
  CHECK(windows.hash == token_windows(text, *tokenizer, 16, 4).hash);
  CHECK(windows.hash != token_windows(text, *tokenizer, 16, 5).hash);
  const auto all = token_windows(text, *tokenizer, 64, 0);
  CHECK(shared_spans(all, all) == static_cast<std::int64_t>(all.windows.size()) * 2);
  other.documents = {"Wholly different words stand here, " + story.substr(400, 600)};
  const auto mixed = token_windows(other, *tokenizer, 64, 0);
  CHECK(shared_spans(all, mixed) > 0);
  CHECK(contains_all(error_text([&] { check_no_overlap(all, mixed, "calibration", "test"); }), {"spans", "calibration", "test"}));
  other.documents = {std::string(2000, 'x') + " y"};
  check_no_overlap(all, token_windows(other, *tokenizer, 64, 0), "calibration", "test");
  CHECK(contains_all(error_text([&] { token_windows(text, *tokenizer, 64, 100000); }), {"too short"}));
}
