// Spelling by spelling, id by id.
#include "distill/vocabularies.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/text.h"
#include "data/token_bytes.h"
#include "data/tokenizer_description.h"

namespace kompakt {
namespace {

std::vector<std::string> vocabulary_spellings(const Tokenizer& tokenizer) {
  if (tokenizer.kind() != "wordpiece") return token_byte_table(tokenizer);
  std::vector<std::string> out;
  for (std::int64_t id = 0; id < tokenizer.vocab_size(); ++id) out.emplace_back(tokenizer.token(id));
  return out;
}

std::set<std::int64_t> vocabulary_added(const Tokenizer& tokenizer) {
  std::set<std::int64_t> ids;
  if (const TokenizerDescription* description = tokenizer.description())
    for (const AddedToken& token : description->added) ids.insert(token.id);
  return ids;
}

}  // namespace

VocabularyComparison compare_vocabularies(const Tokenizer& student, std::int64_t student_rows, const Tokenizer& teacher, std::int64_t teacher_rows) {
  VocabularyComparison out;
  out.student_ids = student.vocab_size(), out.teacher_ids = teacher.vocab_size();
  out.student_rows = student_rows, out.teacher_rows = teacher_rows;
  const std::vector<std::string> mine = vocabulary_spellings(student), other = vocabulary_spellings(teacher);
  const std::set<std::string_view> spelled(other.begin(), other.end()), unique(mine.begin(), mine.end());
  for (const std::string_view token : unique) out.shared += !token.empty() && spelled.count(token);
  const std::set<std::int64_t> student_added = vocabulary_added(student), teacher_added = vocabulary_added(teacher);
  for (std::int64_t id = 0; id < std::min(out.student_ids, out.teacher_ids); ++id) {
    const std::string &a = mine[static_cast<std::size_t>(id)], &b = other[static_cast<std::size_t>(id)];
    if (a == b) {
      ++out.same_id;
    } else if (out.first_difference < 0 && !student_added.count(id) && !teacher_added.count(id)) {
      out.first_difference = id, out.student_token = a, out.teacher_token = b;
    }
  }
  for (const SpecialTokenRow& row : special_token_rows) {
    const auto name = [&](const Tokenizer& tokenizer) { return tokenizer.special().*row.member < 0 ? std::string() : std::string(tokenizer.token(tokenizer.special().*row.member)); };
    VocabularyComparison::Special entry{row.key, name(student), name(teacher)};
    if (entry.student.empty() && entry.teacher.empty()) continue;
    out.special.push_back(std::move(entry));
  }
  const std::string a = student.chat_template(), b = teacher.chat_template();
  out.chat = a == b ? (a.empty() ? "none" : "the same") : a.empty() ? "of the teacher alone" : b.empty() ? "of the student alone" : "different";
  return out;
}

std::string VocabularyComparison::text() const {
  const auto padding = [](std::int64_t rows, std::int64_t ids) { return rows > ids ? str(" and ", rows - ids, " padding rows") : std::string(); };
  std::vector<std::string> differing;
  for (const Special& entry : special)
    if (entry.student != entry.teacher) differing.push_back(str(entry.name, " ", entry.student.empty() ? "none" : entry.student, " / ", entry.teacher.empty() ? "none" : entry.teacher));
  return str("student ", student_ids, " tokens", padding(student_rows, student_ids), ", teacher ", teacher_ids, padding(teacher_rows, teacher_ids), "; ", shared, " have the same spelling (",
             fixed(student_ids > 0 ? 100.0 * static_cast<double>(shared) / static_cast<double>(student_ids) : 0.0, 1), " % of the student's), ", same_id, " also the same id; special tokens ",
             differing.empty() ? std::string("the same") : join(differing, ", "), "; chat template ", chat);
}

Json VocabularyComparison::json() const {
  Json out{{"student_tokens", student_ids}, {"teacher_tokens", teacher_ids}, {"student_padding_rows", std::max<std::int64_t>(0, student_rows - student_ids)},
           {"teacher_padding_rows", std::max<std::int64_t>(0, teacher_rows - teacher_ids)}, {"shared", shared}, {"same_id", same_id}, {"special", Json::object()}, {"chat_template", chat}};
  for (const Special& entry : special) out["special"][entry.name] = Json::array({entry.student, entry.teacher});
  return out;
}

void check_comparable(const VocabularyComparison& comparison, const std::string& place) {
  if (comparison.comparable()) return;
  const auto quoted = [](const std::string& bytes) {
    Json text = bytes;
    return text.dump(-1, ' ', false, Json::error_handler_t::replace);
  };
  throw Error(str("student and teacher do not share a vocabulary: the id ", comparison.first_difference, " is ", quoted(comparison.student_token), " for the student and ", quoted(comparison.teacher_token), " for the teacher"))
      .at(place).given(comparison.text()).hint("use {cross_tokenizer: spans}, {cross_tokenizer: shared} or {cross_tokenizer: uld}, alone or beside labels");
}

}  // namespace kompakt
