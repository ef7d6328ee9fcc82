#include "evaluate/language.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <stdexcept>

#include "core/system.h"
#include "evaluate/inputs.h"

namespace kompakt {

const char* const language_protocol = "non-overlapping windows, no BOS, every position but the first of a window scored, float32 log-probabilities";

double LanguageScores::mean_nll() const {
  double sum = 0;
  for (const double nll : window_nll) sum += nll;
  const double count = static_cast<double>(window_nll.size()) * static_cast<double>(scored_per_window);
  return count > 0 ? sum / count : 0;
}

LanguageScores score_language(const Transformer& model, const Transformer* teacher, const std::vector<std::vector<std::int64_t>>& windows, std::int64_t chunk, const std::function<void(std::int64_t)>& progress) {
  const at::NoGradGuard no_grad;
  LanguageScores scores;
  if (windows.empty()) throw std::logic_error("score_language: no windows");
  const auto length = static_cast<std::int64_t>(windows.front().size());
  if (length < 2) throw std::logic_error("score_language: windows of one token");
  scores.scored_per_window = length - 1;
  for (std::size_t index = 0; index < windows.size(); ++index) {
    check_interrupted();
    const ModelInput input = window_input(windows, index, 1, model.device());
    const at::Tensor student_hidden = model.hidden(input).squeeze(0);  // [T,d]
    const at::Tensor teacher_hidden = teacher ? teacher->hidden(input).squeeze(0) : at::Tensor();
    const at::Tensor targets = input.ids.squeeze(0);
    double student_nll = 0, teacher_nll = 0;
    for (std::int64_t first = 0; first < length - 1; first += chunk) {
      const std::int64_t last = std::min(first + chunk, length - 1);
      const at::Tensor next = targets.slice(0, first + 1, last + 1).unsqueeze(1);  // [c,1]
      const at::Tensor log_q = at::log_softmax(model.head(student_hidden.slice(0, first, last)).to(at::kFloat), -1);
      student_nll -= log_q.gather(1, next).to(at::kDouble).sum().item<double>();
      if (!teacher) continue;
      at::Tensor log_p = at::log_softmax(teacher->head(teacher_hidden.slice(0, first, last)).to(at::kFloat), -1);
      teacher_nll -= log_p.gather(1, next).to(at::kDouble).sum().item<double>();
      const at::Tensor same = log_p.argmax(-1).eq(log_q.argmax(-1)).to(at::kByte).cpu().contiguous();
      const std::int64_t rows = std::min(log_p.size(1), log_q.size(1));
      if (rows < log_p.size(1)) log_p = at::log_softmax(log_p.narrow(1, 0, rows), -1);
      const at::Tensor kl = (log_p.exp() * (log_p - log_q.narrow(1, 0, rows))).sum(-1).cpu().contiguous();  // [c]
      scores.kl.insert(scores.kl.end(), kl.const_data_ptr<float>(), kl.const_data_ptr<float>() + kl.numel());
      scores.same_top1.insert(scores.same_top1.end(), same.const_data_ptr<std::uint8_t>(), same.const_data_ptr<std::uint8_t>() + same.numel());
    }
    scores.window_nll.push_back(student_nll);
    if (teacher) scores.teacher_window_nll.push_back(teacher_nll);
    if (progress) progress(static_cast<std::int64_t>(index) + 1);
  }
  return scores;
}

}  // namespace kompakt
