// Two fingers on two lists of offsets.
#include "distill/span_alignment.h"

#include <ATen/ATen.h>

namespace kompakt {

std::vector<TokenSpan> align_spans(std::span<const std::int64_t> student, std::span<const std::int64_t> teacher, std::int64_t limit) {
  std::vector<TokenSpan> spans;
  const auto size = [](std::span<const std::int64_t> ends) { return static_cast<std::int64_t>(ends.size()); };
  std::int64_t s = 0, t = 0, s_begin = 0, t_begin = 0;
  while (s < size(student) && t < size(teacher)) {
    const std::int64_t s_end = student[static_cast<std::size_t>(s)], t_end = teacher[static_cast<std::size_t>(t)];
    if (s_end > limit || t_end > limit) break;
    if (s_end <= t_end) ++s;
    if (t_end <= s_end) ++t;
    if (s_end != t_end) continue;
    spans.push_back({s_begin, s, t_begin, t});
    s_begin = s, t_begin = t;
  }
  return spans;
}

void AlignmentBuilder::add(std::span<const TokenSpan> spans, std::span<const std::int64_t> student_ids, std::int64_t student_place, std::span<const std::int64_t> teacher_ids, std::int64_t teacher_place,
                           std::int64_t learned_from) {
  for (const TokenSpan& span : spans) {
    if (span.student_begin == 0 || span.teacher_begin == 0 || span.student_begin < learned_from) continue;
    const auto number = static_cast<std::int64_t>(starts_[0].size());
    const auto side = [&](int i, std::span<const std::int64_t> ids, std::int64_t place, std::int64_t begin, std::int64_t end) {
      starts_[i].push_back(place + begin - 1);
      for (std::int64_t token = begin; token < end; ++token) {
        positions_[i].push_back(place + token - 1);
        tokens_[i].push_back(ids[static_cast<std::size_t>(token)]);
        numbers_[i].push_back(number);
      }
    };
    side(0, student_ids, student_place, span.student_begin, span.student_end);
    side(1, teacher_ids, teacher_place, span.teacher_begin, span.teacher_end);
  }
}

TextAlignment AlignmentBuilder::finish(c10::Device device) const {
  const auto tensor = [&](const std::vector<std::int64_t>& values) { return at::tensor(at::ArrayRef<std::int64_t>(values), at::kLong).to(device); };
  return {tensor(starts_[0]), tensor(starts_[1]), tensor(positions_[0]), tensor(tokens_[0]), tensor(numbers_[0]), tensor(positions_[1]), tensor(tokens_[1]), tensor(numbers_[1]),
          static_cast<std::int64_t>(starts_[0].size()), {}, {}};
}

}  // namespace kompakt
