// From a batch of the student's tokens to the teacher's tokens of the same text.
#include <ATen/ATen.h>

#include <algorithm>
#include <map>

#include "core/error.h"
#include "core/hash.h"
#include "core/text.h"
#include "data/token_bytes.h"
#include "data/unicode.h"
#include "distill/cross_tokenizer.h"

namespace kompakt {
namespace {

bool cross_continues(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// Bytes of `text` without a character that its end cuts.
std::size_t cross_whole_characters(std::string_view text) {
  std::size_t start = text.size();
  while (start > 0 && text.size() - start < 4) {
    --start;
    if (cross_continues(text[start])) continue;
    const std::size_t length = utf8_length(text[start]);
    return start + length > text.size() ? start : text.size();
  }
  return text.size();
}

class CrossTokenizerTeacher final : public TeacherSource {
 public:
  CrossTokenizerTeacher(const FrozenTeacher& teacher, const Tokenizer& student_tokenizer, const Tokenizer& teacher_tokenizer)
      : live_(live_teacher(teacher)), student_{student_tokenizer, {}, false}, teacher_{teacher_tokenizer, {}, false}, device_(teacher.device()) {
    for (Side* side : {&student_, &teacher_}) {
      side->table = token_byte_table(side->tokenizer);
      side->dummy = has_dummy_prefix(side->tokenizer);
    }
    std::map<std::string_view, std::int64_t> by_bytes;
    for (std::int64_t id = 0; id < std::min<std::int64_t>(teacher_.tokenizer.vocab_size(), teacher.config().vocab); ++id)
      if (const std::string& bytes = teacher_.table[static_cast<std::size_t>(id)]; !bytes.empty()) by_bytes.emplace(bytes, id);  // the first of equals
    std::vector<std::int64_t> student_ids, teacher_ids;
    const auto pair = [&](std::int64_t mine, std::int64_t other) { student_ids.push_back(mine), teacher_ids.push_back(other); };
    const std::int64_t student_end = student_.end(), teacher_end = teacher_.end();
    if (student_end >= 0 && teacher_end >= 0) pair(student_end, teacher_end);
    for (std::int64_t id = 0; id < student_.tokenizer.vocab_size(); ++id) {
      const auto found = by_bytes.find(student_.table[static_cast<std::size_t>(id)]);
      if (found == by_bytes.end() || id == student_end || found->second == teacher_end) continue;
      pair(id, found->second);
      by_bytes.erase(found);
    }
    const auto tensor = [&](const std::vector<std::int64_t>& ids) { return at::tensor(at::ArrayRef<std::int64_t>(ids), at::kLong).to(device_); };
    student_shared_ = tensor(student_ids), teacher_shared_ = tensor(teacher_ids);
  }

  void prepare(const std::set<std::string>& taps) override {
    if (!taps.empty()) throw Error("inner values of a teacher with another tokenizer stand at other tokens than the student's").given(*taps.begin()).hint("use cross_tokenizer objectives and labels");
    live_->prepare(taps);
  }
  const ModelConfig& config() const override { return live_->config(); }
  std::string fingerprint() const override { return sha256(live_->fingerprint() + student_.tokenizer.fingerprint() + teacher_.tokenizer.fingerprint()); }

  std::int64_t aligned_spans(const TokenBatch& batch) override {
    counted_.push_back(align_batch(batch));
    return counted_.back().alignment->spans;
  }

  TeacherTargets targets(const TokenBatch& batch) override {
    const auto found = std::find_if(counted_.begin(), counted_.end(), [&](const Aligned& a) { return a.ids == batch.ids && a.documents == batch.documents && a.prompts == batch.prompts; });
    const Aligned aligned = found == counted_.end() ? align_batch(batch) : std::move(*found);
    if (found != counted_.end()) counted_.erase(found);
    TeacherTargets out = live_->targets(aligned.own);
    out.alignment = aligned.alignment;
    return out;
  }

 private:
  struct Side {
    const Tokenizer& tokenizer;
    std::vector<std::string> table;  // bytes of every id
    bool dummy = false;
    std::int64_t end() const { return tokenizer.special().eos; }
  };
  struct Document {
    std::int64_t row = 0, student_start = 0, teacher_start = 0;
    SpelledText student, teacher;
    std::vector<TokenSpan> spans;
  };
  // A batch of the student's tokens, told by its ids, documents and prompts, in the teacher's.
  struct Aligned {
    std::vector<std::int64_t> ids, documents, prompts;
    TokenBatch own;
    std::shared_ptr<const TextAlignment> alignment;
  };

  Aligned align_batch(const TokenBatch& batch) const {
    std::vector<Document> documents = read(batch);
    TokenBatch own;
    own.rows = batch.rows;
    own.lengths.assign(static_cast<std::size_t>(batch.rows), 0);
    bool packed = false;
    for (Document& document : documents) {
      std::int64_t& length = own.lengths[static_cast<std::size_t>(document.row)];
      packed = packed || (length > 0 && !document.teacher.ids.empty());
      document.teacher_start = length;
      length += static_cast<std::int64_t>(document.teacher.ids.size());
    }
    for (std::int64_t& length : own.lengths) length = std::max<std::int64_t>(length, 1);  // a row without text: one token that nobody looks at
    own.columns = *std::max_element(own.lengths.begin(), own.lengths.end());
    const auto size = static_cast<std::size_t>(own.rows * own.columns);
    own.ids.assign(size, 0);
    if (packed) own.documents.assign(size, -1), own.positions.assign(size, 0);
    AlignmentBuilder builder;
    std::int64_t number = 0;
    for (const Document& document : documents) {
      const std::int64_t place = document.row * own.columns + document.teacher_start;
      for (std::size_t i = 0; i < document.teacher.ids.size(); ++i) {
        const std::size_t at = static_cast<std::size_t>(place) + i;
        own.ids[at] = document.teacher.ids[i];
        if (packed) own.documents[at] = number, own.positions[at] = static_cast<std::int64_t>(i);
      }
      ++number;
      const std::int64_t prompt = batch.prompts.empty() ? 0 : batch.prompts[static_cast<std::size_t>(document.row)] - document.student_start;
      builder.add(document.spans, document.student.ids, document.row * batch.columns + document.student_start, document.teacher.ids, place, prompt);
    }
    auto alignment = std::make_shared<TextAlignment>(builder.finish(device_));
    alignment->student_shared = student_shared_, alignment->teacher_shared = teacher_shared_;
    alignment->student_ids = student_.tokenizer.vocab_size(), alignment->teacher_ids = teacher_.tokenizer.vocab_size();
    return {batch.ids, batch.documents, batch.prompts, std::move(own), std::move(alignment)};
  }

  std::vector<Document> read(const TokenBatch& batch) const {
    std::vector<Document> out;
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const auto first = static_cast<std::size_t>(row * batch.columns);
      const auto length = static_cast<std::size_t>(batch.lengths.empty() ? batch.columns : batch.lengths[static_cast<std::size_t>(row)]);
      for (std::size_t begin = 0; begin < length;) {
        std::size_t end = begin + 1;
        while (end < length && (batch.documents.empty() || batch.documents[first + end] == batch.documents[begin + first])) ++end;
        Document document;
        document.row = row;
        document.student_start = static_cast<std::int64_t>(begin);
        align({batch.ids.data() + first + begin, end - begin}, document);
        out.push_back(std::move(document));
        begin = end;
      }
    }
    return out;
  }

  void align(std::span<const std::int64_t> ids, Document& document) const {
    const bool ended = !ids.empty() && ids.back() == student_.end();
    document.student = spell_tokens(ended ? ids.first(ids.size() - 1) : ids, student_.table, student_.dummy);
    // The row may have cut characters at both ends.
    const std::string& bytes = document.student.bytes;
    std::size_t lead = 0;
    while (lead < bytes.size() && lead < 3 && cross_continues(bytes[lead])) ++lead;
    const std::string_view text = std::string_view(bytes).substr(lead, cross_whole_characters(bytes) - std::min(lead, cross_whole_characters(bytes)));
    for (std::int64_t& end : document.student.ends) end = std::max<std::int64_t>(0, end - static_cast<std::int64_t>(lead));
    document.teacher = spell_tokens(teacher_.tokenizer.encode(text, false, false), teacher_.table, teacher_.dummy);
    const auto [mine, other] = std::mismatch(text.begin(), text.end(), document.teacher.bytes.begin(), document.teacher.bytes.end());
    auto limit = static_cast<std::int64_t>(mine - text.begin());
    if (ended && teacher_.end() >= 0 && limit == static_cast<std::int64_t>(text.size()) && lead + text.size() == bytes.size() && other == document.teacher.bytes.end()) {
      ++limit;  // the end of the document is one more byte on both sides
      document.student.ids.push_back(student_.end()), document.teacher.ids.push_back(teacher_.end());
      document.student.ends.push_back(limit), document.teacher.ends.push_back(limit);
    }
    const std::int64_t most = live_->config().max_positions;
    if (most > 0 && static_cast<std::int64_t>(document.teacher.ids.size()) > most) {
      document.teacher.ids.resize(static_cast<std::size_t>(most));
      document.teacher.ends.resize(static_cast<std::size_t>(most));
    }
    document.spans = align_spans(document.student.ends, document.teacher.ends, limit);
  }

  std::unique_ptr<TeacherSource> live_;
  Side student_, teacher_;
  c10::Device device_;
  at::Tensor student_shared_, teacher_shared_;
  std::vector<Aligned> counted_;  // whose spans were asked for and whose targets were not yet
};

}  // namespace

std::unique_ptr<TeacherSource> cross_tokenizer_teacher(FrozenTeacher teacher, const Tokenizer& student_tokenizer, const Tokenizer& teacher_tokenizer) {
  return std::make_unique<CrossTokenizerTeacher>(std::move(teacher), student_tokenizer, teacher_tokenizer);
}

}  // namespace kompakt
