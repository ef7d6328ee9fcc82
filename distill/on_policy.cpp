// Prompts from rows, completions from a model, and the batch of both.
#include "distill/on_policy.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/generate.h"
#include "train/data_parallel.h"
#include "train/step_batches.h"

namespace kompakt {
namespace {

using Tokens = std::vector<std::int64_t>;

class CompletionSampler : public BatchSampler {
 public:
  CompletionSampler(const CompletionOptions& options, const ModelConfig& writer, SamplerFrame frame)
      : options_(options), frame_(std::move(frame)), end_(frame_.data.tokenizer ? frame_.data.tokenizer->special().eos : writer.eos) {
    if (frame_.data.kind != TaskData::Kind::text) throw Error("texts can only be written in place of text").at(frame_.title).hint("remove on_policy and teacher_text");
    std::int64_t longest = options_.prompt_tokens;
    if (options_.prompt_tokens == 0) {
      for (const Tokens& document : frame_.data.train_documents) {
        starts_.push_back(total_);
        total_ += static_cast<std::int64_t>(document.size()) + 1;  // the separator, as in TextBatches
        longest = std::max(longest, static_cast<std::int64_t>(options_.chat ? chat(document).size() : document.size()));
      }
    }
    check_completion_length(options_, longest, frame_.sequence_length, writer.max_positions, frame_.title);
  }

 protected:
  // `draw` names the stream that chooses among the documents of a row.
  Tokens prompt(const TokenBatch& batch, std::int64_t row, const std::string& draw) const { return options_.prompt_tokens == 0 ? document_prompt(batch.examples.at(static_cast<std::size_t>(row)), draw) : part_prompt(batch, row); }

  std::vector<Tokens> write(const Transformer& model, const std::vector<Tokens>& prompts, const std::vector<std::uint64_t>& seeds) const {
    GenerateOptions options;
    options.max_new_tokens = options_.max_new_tokens;
    options.temperature = options_.temperature;
    options.top_p = options_.top_p;
    if (frame_.data.tokenizer) options.vocabulary = frame_.data.tokenizer->vocab_size();
    if (end_ >= 0) options.stop = {end_};
    return generate_batch(model, prompts, options, seeds);
  }

  TokenBatch joined(const TokenBatch& batch, const std::vector<Tokens>& prompts, const std::vector<Tokens>& texts) const {
    TokenBatch out;
    out.rows = batch.rows;
    out.examples = batch.examples;
    for (std::size_t r = 0; r < prompts.size(); ++r) {
      out.prompts.push_back(static_cast<std::int64_t>(prompts[r].size()));
      out.lengths.push_back(static_cast<std::int64_t>(prompts[r].size() + texts[r].size()));
      out.columns = std::max(out.columns, out.lengths.back());
    }
    out.ids.assign(static_cast<std::size_t>(out.rows * out.columns), padding_id(frame_.data));
    for (std::size_t r = 0; r < prompts.size(); ++r) {
      const auto place = out.ids.begin() + static_cast<std::ptrdiff_t>(r) * out.columns;
      std::copy(texts[r].begin(), texts[r].end(), std::copy(prompts[r].begin(), prompts[r].end(), place));
    }
    return out;
  }

  // Texts of `count` micro batches, each written by one rank: token ids are a few bytes beside what they cost.
  std::vector<std::vector<Tokens>> shared(std::size_t count, const std::function<std::vector<Tokens>(std::size_t)>& write) const {
    std::vector<std::vector<Tokens>> out;
    for (const std::string& texts : by_turns(frame_.ranks, count, [&](std::size_t i) { return Json(write(i)).dump(); })) out.push_back(parse_json(texts, "written texts").get<std::vector<Tokens>>());
    return out;
  }

  bool ended(const Tokens& text) const { return !text.empty() && text.back() == end_; }
  const SamplerFrame& frame() const { return frame_; }
  Json completion_identity() const {
    CompletionOptions copy = options_;
    Json out = to_json(write_fields([&](FieldVisitor& visitor) { fields(visitor, copy); }));
    out["vocabulary"] = frame_.data.tokenizer ? frame_.data.tokenizer->vocab_size() : 0;
    return out;
  }

 private:
  Tokens chat(const Tokens& document) const {
    if (!frame_.data.tokenizer) throw Error("a chat template needs a tokenizer").at(frame_.title);
    return frame_.data.tokenizer->encode(apply_chat(*frame_.data.tokenizer, frame_.data.tokenizer->decode(document)), false, true);
  }

  // The first tokens of the longest document part of the row, its end token left out and one token left to write.
  Tokens part_prompt(const TokenBatch& batch, std::int64_t row) const {
    const auto first = static_cast<std::size_t>(row * batch.columns);
    const auto length = static_cast<std::size_t>(batch.lengths.empty() ? batch.columns : batch.lengths[static_cast<std::size_t>(row)]);
    std::size_t best = 0, best_size = 0;
    for (std::size_t begin = 0, end = 0; begin < length; begin = end) {
      for (end = begin + 1; end < length && (batch.documents.empty() || batch.documents[first + end] == batch.documents[first + begin]);) ++end;
      if (end - begin > best_size) best = begin, best_size = end - begin;
    }
    if (best_size > 1 && batch.ids[first + best + best_size - 1] == end_) --best_size;
    const std::size_t size = std::min(static_cast<std::size_t>(options_.prompt_tokens), std::max<std::size_t>(1, best_size - 1));
    const auto begin = batch.ids.begin() + static_cast<std::ptrdiff_t>(first + best);
    return Tokens(begin, begin + static_cast<std::ptrdiff_t>(size));
  }

  // One of the documents that begin in the row; where none does, the one that its first token belongs to.
  Tokens document_prompt(std::int64_t row, const std::string& draw) const {
    const std::int64_t begin = row * frame_.sequence_length, end = begin + frame_.sequence_length;
    auto low = std::lower_bound(starts_.begin(), starts_.end(), begin) - starts_.begin(), high = std::lower_bound(starts_.begin(), starts_.end(), end) - starts_.begin();
    std::vector<std::size_t> choice;
    for (auto i = low; i < high; ++i)
      if (!frame_.data.train_documents[static_cast<std::size_t>(i)].empty()) choice.push_back(static_cast<std::size_t>(i));
    std::size_t found = static_cast<std::size_t>(std::max<std::ptrdiff_t>(low - 1, 0));
    if (!choice.empty()) found = choice[CounterRandom(frame_.seed, draw).below(0, choice.size())];
    const Tokens& document = frame_.data.train_documents[found];
    if (options_.chat) return chat(document);
    return document.empty() ? Tokens{std::max<std::int64_t>(0, end_)} : document;
  }

  CompletionOptions options_;
  SamplerFrame frame_;
  std::int64_t end_ = -1, total_ = 0;
  Tokens starts_;  // of the documents in the joined text
};

class OnPolicySampler final : public CompletionSampler {
 public:
  OnPolicySampler(const OnPolicyOptions& options, const ModelConfig& student, SamplerFrame frame) : CompletionSampler(options, student, std::move(frame)), lambda_(options.lambda) {}

  void sample(const Transformer& model, std::int64_t step, std::vector<TokenBatch>& batches) override {
    if (!(CounterRandom(frame().seed, "on-policy").uniform(static_cast<std::uint64_t>(step)) < lambda_)) return;
    const auto start = std::chrono::steady_clock::now();
    std::int64_t tokens = 0, rows = 0, complete = 0;
    const auto stream = [&](std::int64_t row) { return str("on-policy/", step, "/", row); };
    std::vector<std::vector<Tokens>> prompts;
    for (const TokenBatch& batch : batches) {
      prompts.emplace_back();
      for (std::int64_t r = 0; r < batch.rows; ++r) prompts.back().push_back(prompt(batch, r, stream(batch.examples.at(static_cast<std::size_t>(r)))));
    }
    const std::vector<std::vector<Tokens>> written = shared(batches.size(), [&](std::size_t i) {
      std::vector<std::uint64_t> seeds;
      for (std::size_t r = 0; r < prompts[i].size(); ++r) seeds.push_back(CounterRandom(frame().seed, stream(batches[i].examples[r])).key());
      return write(model, prompts[i], seeds);
    });
    for (std::size_t i = 0; i < batches.size(); ++i) {
      batches[i] = joined(batches[i], prompts[i], written[i]);
      for (const Tokens& text : written[i]) tokens += static_cast<std::int64_t>(text.size()), complete += ended(text), ++rows;
    }
    const double seconds = std::max(1e-9, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    log_metric("sampled", {{"stage", frame().title}, {"step", step + 1}, {"tokens", tokens}, {"tokens_per_second", static_cast<double>(tokens) / seconds},
                           {"mean_length", static_cast<double>(tokens) / static_cast<double>(std::max<std::int64_t>(1, rows))}, {"ended", static_cast<double>(complete) / static_cast<double>(std::max<std::int64_t>(1, rows))}});
  }

  Json identity() const override {
    Json out = completion_identity();
    out["lambda"] = lambda_;
    return out;
  }

 private:
  double lambda_;
};

class TeacherTextSampler final : public CompletionSampler {
 public:
  TeacherTextSampler(FrozenTeacher teacher, const CompletionOptions& options, std::int64_t batch_size, const std::filesystem::path& folder, SamplerFrame frame_in)
      : CompletionSampler(options, teacher.config(), std::move(frame_in)), teacher_(std::move(teacher)) {
    key_ = sha256(str("teacher-text/2\n", teacher_.fingerprint(), "\n", frame().data.hash, "\n", frame().sequence_length, "\n", batch_size, "\n", frame().seed, "\n", completion_identity().dump()));
    make_folder(folder);
    file_ = folder / ("texts-" + key_.substr(0, 32) + ".txt");
    load();
  }

  void sample(const Transformer&, std::int64_t, std::vector<TokenBatch>& batches) override {
    std::vector<std::vector<Tokens>> prompts;
    for (const TokenBatch& batch : batches) {
      prompts.emplace_back();
      for (std::int64_t r = 0; r < batch.rows; ++r) prompts.back().push_back(prompt(batch, r, str("teacher-text/", batch.examples.at(static_cast<std::size_t>(r)))));
    }
    const std::vector<std::vector<Tokens>> written = shared(batches.size(), [&](std::size_t i) {
      const std::vector<std::int64_t>& rows = batches[i].examples;
      if (std::any_of(rows.begin(), rows.end(), [&](std::int64_t row) { return !texts_.count(row); })) return complete(batches[i], prompts[i]);
      std::vector<Tokens> texts;
      for (const std::int64_t row : rows) texts.push_back(texts_.at(row));
      return texts;
    });
    keep(batches, written);
    for (std::size_t i = 0; i < batches.size(); ++i) batches[i] = joined(batches[i], prompts[i], written[i]);
  }

  Json identity() const override { return {{"teacher_text", key_}}; }

 private:
  // All rows of the batch, so that what is written does not depend on which of them a killed run had finished; of those that were there, what is kept.
  std::vector<Tokens> complete(const TokenBatch& batch, const std::vector<Tokens>& prompts) const {
    std::vector<std::uint64_t> seeds;
    for (const std::int64_t row : batch.examples) seeds.push_back(CounterRandom(frame().seed, str("teacher-text/", row)).key());
    const auto start = std::chrono::steady_clock::now();
    std::vector<Tokens> texts = write(*teacher_.model(), prompts, seeds);
    std::int64_t tokens = 0;
    for (std::size_t r = 0; r < texts.size(); ++r) {
      tokens += static_cast<std::int64_t>(texts[r].size());
      if (const auto found = texts_.find(batch.examples[r]); found != texts_.end()) texts[r] = found->second;
    }
    const double seconds = std::max(1e-9, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    log_metric("sampled", {{"stage", frame().title}, {"by", "teacher"}, {"tokens", tokens}, {"tokens_per_second", static_cast<double>(tokens) / seconds}, {"mean_length", static_cast<double>(tokens) / static_cast<double>(texts.size())}});
    return texts;
  }

  void keep(const std::vector<TokenBatch>& batches, const std::vector<std::vector<Tokens>>& written) {
    std::string lines;
    for (std::size_t i = 0; i < batches.size(); ++i) {
      for (std::size_t r = 0; r < written[i].size(); ++r) {
        if (!texts_.emplace(batches[i].examples[r], written[i][r]).second) continue;
        std::vector<std::string> numbers{std::to_string(batches[i].examples[r])};
        for (const std::int64_t id : written[i][r]) numbers.push_back(std::to_string(id));
        lines += join(numbers, " ") + "\n";
      }
    }
    if (lines.empty() || !leads(frame().ranks)) return;
    std::ofstream out(file_, std::ios::app | std::ios::binary);
    out << lines << std::flush;
    if (!out) throw Error("the teacher's texts cannot be written", ExitCode::resource).at(file_.string()).hint("free space or choose another store");
  }

  // "row id id ..." a line; what follows the last line end was not finished.
  void load() {
    if (!std::filesystem::exists(file_)) return;
    const std::string all = read_text(file_);
    const std::size_t whole = all.rfind('\n') == std::string::npos ? 0 : all.rfind('\n') + 1;
    if (whole < all.size() && leads(frame().ranks)) std::filesystem::resize_file(file_, whole);
    for (std::size_t at = 0; at < whole;) {
      const std::size_t end = all.find('\n', at);
      Tokens numbers;
      for (const char* c = all.data() + at; c < all.data() + end;) {
        char* next = nullptr;
        numbers.push_back(std::strtoll(c, &next, 10));
        if (next == c) throw Error("a line of the teacher's texts is damaged").at(file_.string()).hint("delete the file: it is written anew");
        c = next;
      }
      if (numbers.size() < 2) throw Error("a line of the teacher's texts is damaged").at(file_.string()).hint("delete the file: it is written anew");
      texts_.emplace(numbers[0], Tokens(numbers.begin() + 1, numbers.end()));
      at = end + 1;
    }
  }

  FrozenTeacher teacher_;
  std::string key_;
  std::filesystem::path file_;
  std::map<std::int64_t, Tokens> texts_;  // by row
};

}  // namespace

void fields(FieldVisitor& visitor, CompletionOptions& options) {
  visitor.integer("max_new_tokens", options.max_new_tokens, "most tokens written after a prompt", {.min = 1, .max = 1048576});
  visitor.number("temperature", options.temperature, "of the draws; 0 = the likeliest token", {.min = 0});
  visitor.number("top_p", options.top_p, "draw from the smallest set of tokens with so much probability", {.min = 0, .max = 1, .open_min = true});
  visitor.integer("prompt_tokens", options.prompt_tokens, "tokens of the prompt: the beginning of the longest document part of a row; 0 = whole documents are prompts", {.min = 0});
  visitor.flag("chat", options.chat, "whole documents as prompts: each as a user's message in the tokenizer's chat template");
}

void fields(FieldVisitor& visitor, OnPolicyOptions& options) {
  visitor.number("lambda", options.lambda, "share of the steps whose texts the student writes; 0 = none", {.min = 0, .max = 1});
  fields(visitor, static_cast<CompletionOptions&>(options));
}

void check_completion_length(const CompletionOptions& options, std::int64_t longest, std::int64_t sequence_length, std::int64_t max_positions, const std::string& place) {
  if (options.prompt_tokens >= sequence_length) throw Error("prompt_tokens leaves nothing of a row to be learned").at(place).given(str(options.prompt_tokens)).allowed(str("below sequence_length, ", sequence_length));
  if (max_positions > 0 && longest + options.max_new_tokens > max_positions)
    throw Error(str("a prompt of ", longest, " tokens and ", options.max_new_tokens, " new ones exceed the model's context")).at(place).given(str(longest + options.max_new_tokens, " tokens")).allowed(str("at most ", max_positions)).hint("lower max_new_tokens or prompt_tokens, or leave out long documents");
}

void check_completions(const CompletionOptions& options, const std::string& key, const Place& place, Problems& problems) {
  if (options.chat && options.prompt_tokens > 0)
    problems.add(Error(key + ".chat wraps whole documents, and prompt_tokens takes their beginnings").at(place.text()).given(str("prompt_tokens: ", options.prompt_tokens)).hint("set prompt_tokens: 0"));
}

std::unique_ptr<BatchSampler> on_policy_sampler(const OnPolicyOptions& options, const ModelConfig& student, SamplerFrame frame) {
  return std::make_unique<OnPolicySampler>(options, student, std::move(frame));
}

std::unique_ptr<BatchSampler> teacher_text_sampler(FrozenTeacher teacher, const CompletionOptions& options, std::int64_t batch_size, std::filesystem::path folder, SamplerFrame frame) {
  return std::make_unique<TeacherTextSampler>(std::move(teacher), options, batch_size, folder, std::move(frame));
}

}  // namespace kompakt
